"""The same computation by other libraries, called as they call it themselves; none of their code is copied.

megatron-core is a dependency of this project. The others are installed beside it (benchmarks/requirements.txt), without
their dependencies: if a package's top level imports more than the function needs, the module of the function is
imported from its file.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from head_methods.workload import Inputs, Method, Outcome

FOLDER = Path(__file__).parents[2] / "build" / "peers"
INSTALL = "pip install --no-deps --target build/peers -r benchmarks/requirements.txt"
# The value that trl.trainer.utils passes; importing that module would require accelerate, datasets and pandas.
TRL_CHUNK_SIZE = 32768


def logits_of_megatron(inputs: Inputs) -> Tensor:
    """[S, V / ranks] fp32 logits as from Megatron's output layer: in the dtype of the weights, then cast."""
    from megatron.core import tensor_parallel

    hidden = tensor_parallel.copy_to_tensor_model_parallel_region(inputs.hidden)
    return (hidden @ inputs.weight.t()).float()


def logp_of_megatron(logits: Tensor, targets: Tensor) -> Tensor:
    """[S] log-probabilities by Megatron's cross-entropy, which overwrites the logits."""
    from megatron.core import tensor_parallel

    return -tensor_parallel.vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def log_sum_exp_minus_mean(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S] entropies by the formula that verl uses, in torch and outside of autograd (unlike verl)."""
    maximum = logits.amax(1)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    p = (logits - maximum.unsqueeze(1)).exp_()
    total = p.sum(1)
    dist.all_reduce(total, group=group)
    mean = p.div_(total.unsqueeze(1)).mul_(logits).sum(1)
    dist.all_reduce(mean, group=group)
    return maximum + total.log() - mean


def load_megatron() -> Callable[[Inputs], Outcome]:
    _initialize_megatron()

    def megatron(inputs: Inputs) -> Outcome:
        logits = logits_of_megatron(inputs)
        entropy = log_sum_exp_minus_mean(logits, inputs.group)
        logp = logp_of_megatron(logits, inputs.targets)
        return Outcome(-logp[inputs.selected].sum(), logp, entropy)

    return megatron


def load_verl() -> Callable[[Inputs], Outcome]:
    _initialize_megatron()
    module = _module_from_file("verl", "verl.utils.megatron.tensor_parallel")

    def verl(inputs: Inputs) -> Outcome:
        # The order and the clone are those of verl's Megatron engine; its entropy records a graph and keeps the logits.
        logits = logits_of_megatron(inputs)
        untouched = logits.clone()
        entropy = module.vocab_parallel_entropy(logits)
        logp = module.vocab_parallel_log_probs_from_logits(untouched.unsqueeze(1), inputs.targets.unsqueeze(1))
        logp = logp.squeeze(1)
        return Outcome(-logp[inputs.selected].sum(), logp, entropy.detach())

    return verl


def load_trl() -> Callable[[Inputs], Outcome]:
    # Backward calls trl.trainer.utils to gather a weight that DeepSpeed ZeRO-3 has sharded; here no weight is.
    gather = ModuleType("trl.trainer.utils")
    gather.maybe_gather_lm_head_ctx = lambda *weights: nullcontext()  # type: ignore[attr-defined]
    module = _module_from_file("trl", "trl.kernels.chunked_logprob", **{"trl.trainer.utils": gather})

    def trl(inputs: Inputs) -> Outcome:
        logp, entropy, *_ = module.ChunkedLogProbFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.targets, 1.0, TRL_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
        )
        return Outcome(-logp[inputs.selected].sum(), logp, entropy.detach())

    return trl


def load_liger() -> Callable[[Inputs], Outcome]:
    _find("liger_kernel")
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    # One sequence, on policy, no reference model, divided by 1: the gradient of minus the sum of selected logp.
    grpo = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False)

    def liger(inputs: Inputs) -> Outcome:
        device = inputs.targets.device
        mask = torch.zeros(1, len(inputs.targets), device=device).index_fill_(1, inputs.selected, 1.0)
        loss, _ = grpo(
            inputs.hidden.unsqueeze(0),
            inputs.weight,
            inputs.targets.unsqueeze(0),
            mask,
            torch.ones(1, device=device),
            num_items_in_batch=1,
        )
        return Outcome(loss)

    return liger


def load_liger_cross_entropy() -> Callable[[Inputs], Outcome]:
    _find("liger_kernel")
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")

    def liger_cross_entropy(inputs: Inputs) -> Outcome:
        selected = torch.full_like(inputs.targets, -100)
        selected[inputs.selected] = inputs.targets[inputs.selected]
        loss, *_ = module.LigerFusedLinearCrossEntropyFunction.apply(
            inputs.hidden, inputs.weight, selected, None, None, -100, 0.0, 0.0, "sum"
        )
        return Outcome(loss)

    return liger_cross_entropy


def _initialize_megatron() -> None:
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())


def _find(package: str) -> Path:
    """Folder of an installed package. ``FOLDER`` is searched last, so its packages shadow no others."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"not installed: {INSTALL}", name=package)
    return Path(spec.origin).parent


def _module_from_file(package: str, name: str, **stand_ins: ModuleType) -> ModuleType:
    """Import module ``name`` without its package's ``__init__`` files, which import Ray, accelerate and datasets."""
    folder = _find(package)
    *parents, _ = name.split(".")
    for depth in range(1, len(parents) + 1):
        parent = ModuleType(".".join(parents[:depth]))
        parent.__path__ = [str(folder.joinpath(*parents[1:depth]))]
        sys.modules.setdefault(parent.__name__, parent)
    for stand_in in stand_ins.values():
        sys.modules.setdefault(stand_in.__name__, stand_in)
    return importlib.import_module(name)


METHODS = {
    "megatron": Method(
        "Megatron cross-entropy + entropy", load_megatron, peer=True, note="full logits; entropy by verl's formula"
    ),
    "verl": Method("verl 0.9.1", load_verl, peer=True, note="full logits, Megatron's cross-entropy"),
    "trl": Method(
        "TRL 1.16.0 chunked",
        load_trl,
        tensor_parallel=False,
        peer=True,
        note="torch in place of its Triton kernels; tiles of 4,096 x 32,768",
    ),
    "liger": Method(
        "Liger 0.8.2 chunked GRPO",
        load_liger,
        tensor_parallel=False,
        peer=True,
        note="no entropy; gradients made in forward",
    ),
    "liger-ce": Method(
        "Liger 0.8.2 linear cross-entropy",
        load_liger_cross_entropy,
        tensor_parallel=False,
        peer=True,
        note="Triton kernels; no entropy",
    ),
}
