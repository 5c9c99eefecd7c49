"""Memory, bytes and exactness of saving and loading the whole state of a policy, in every kind of layout.

The state is set to numbers that depend on the name of a tensor and the place in it alone. Each layout saves it within
the bound of memory, the next layout loads it and finds the same numbers, whichever ranks hold them.
"""

import multiprocessing
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launcher import Ranks
from planning_runs import Alive
from policy_runs import Layout, policy_of
from reference_training import Recipe
from torch import Tensor

VOCAB = 1800  # padded to other sizes with other numbers of tensor-parallel ranks
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 120, "num_experts": 4, "num_experts_per_tok": 2}
BOX_BYTES = 2**15
SLACK_BYTES = 2**16
"""Small tensors beside the state, such as step counts."""
DISTRIBUTED = (("use_distributed_optimizer", True),)
LAYOUTS = {
    "distributed optimizer": (
        Layout(data=2, megatron=DISTRIBUTED),
        Layout(data=4, megatron=DISTRIBUTED),
        Layout(tensor=2, sequence=True, data=2, megatron=DISTRIBUTED),
        Layout(pipeline=2, data=2, megatron=DISTRIBUTED),
        Layout(context=2, megatron=DISTRIBUTED),
        Layout(data=2, megatron=DISTRIBUTED),
        Layout(megatron=DISTRIBUTED),
        Layout(data=4, megatron=DISTRIBUTED),
    ),
    "whole optimizer": (
        Layout(data=2),
        Layout(tensor=2, sequence=True, data=2),
        Layout(pipeline=2),
        Layout(data=4),
        Layout(data=2),
    ),
}
EXPERT_LAYOUTS = {
    "distributed optimizer": (
        Layout(data=2, expert=2, megatron=DISTRIBUTED),
        Layout(data=4, expert=2, megatron=DISTRIBUTED),
        Layout(tensor=2, sequence=True, expert=2, megatron=DISTRIBUTED),
        Layout(data=2, megatron=DISTRIBUTED),
        Layout(data=2, expert=2, megatron=DISTRIBUTED),
    ),
    "whole optimizer": (Layout(data=4, expert=2), Layout(data=2), Layout(data=2, expert=2)),
}


@dataclass
class Measured:
    """Of one rank: bytes that it wrote and read, and the most bytes alive meanwhile, beyond those before."""

    written: int = 0
    saving: int = 0
    read: int = 0
    loading: int = 0
    wrong: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    made = {}
    kinds: dict[str, dict[str, Any]] = {"Qwen3": {"tie_word_embeddings": True}, "Qwen3Moe": EXPERTS}
    for kind, changes in kinds.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
        made[kind] = tmp_path_factory.mktemp("models") / kind
        getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(made[kind])
    return made


def numbers(name: str, whole: Any) -> Tensor:
    """Numbers for a local tensor, given Megatron's description of it; 0 in the padding of the vocabulary."""
    index = torch.zeros(whole.local_shape, dtype=torch.int64)
    axes = whole.prepend_axis_num
    for axis, length in enumerate(whole.global_shape):
        place = torch.tensor(whole.global_offset[axis])
        if axis >= axes:
            shape = [-1 if each == axis - axes else 1 for each in range(len(whole.local_shape))]
            place = (place + torch.arange(whole.local_shape[axis - axes])).view(shape)
        index = index * (length if axis else 1) + place
    values = ((index + zlib.crc32(name.encode()) % 977) % 8191).float() / 512 + 0.125
    if "embedding" in name or "output_layer" in name:
        values[max(0, VOCAB - whole.global_offset[0]) :] = 0
    return values


def state(policy: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, tensor of the policy on this rank, the numbers that are to be in it)."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megatron_rlvr.checkpoint.megatron.sharded_state import ShardedWeights

    for leaves in ShardedWeights(policy.chunks).leaves.values():
        for leaf in leaves.values():
            wholes = leaf.build() if isinstance(leaf, ShardedTensorFactory) else [leaf]

            def wanted(name: str, wholes: Any = wholes) -> Tensor:
                return torch.cat([numbers(name, whole) for whole in wholes])

            yield leaf.key, leaf.data.data, wanted(leaf.key)
            for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
                for name, own, place in moments(part, leaf.data):
                    yield f"{name} {leaf.key}", own, wanted(f"{name} {leaf.key}").flatten()[place]


def moments(part: Any, parameter: Any) -> Iterator[tuple[str, Tensor, slice]]:
    """Yield (name, flat tensor, its place in the parameter) of the state that an optimizer on this rank has of it."""
    if hasattr(part, "model_param_gbuf_map"):
        if parameter not in part.model_param_gbuf_map:
            return
        own = part._get_model_param_range_map(parameter)["param"]
        main, place = part._get_main_param_and_optimizer_states(parameter), slice(own.start, own.end)
    else:
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            found = [main for model, main in zip(models, mains, strict=True) if model is parameter]
            if found:
                main, place = {"param": found[0], **part.optimizer.state[found[0]]}, slice(None)
                break
        else:
            return
    for name in ("param", "exp_avg", "exp_avg_sq"):
        yield name, main[name].data.view(-1), place


def save_and_load(folder: Path, layout: Layout, source: Path | None, target: Path, background: bool) -> Measured:
    """Load a policy's state, or set it if there is no source; save it."""
    from megatron_rlvr.checkpoint.megatron import shares
    from megatron_rlvr.checkpoint.megatron.policy import load_policy, save_policy
    from megatron_rlvr.checkpoint.unpickling import RestrictedReader

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    found = Measured()
    read = RestrictedReader.read_data

    def counting(self: Any, plan: Any, planner: Any) -> Any:
        found.read += sum(self.storage_data[item.storage_index].length for item in plan.items)
        return read(self, plan, planner)

    with (
        policy_of(str(folder), layout, Recipe(), "bfloat16") as policy,
        mock.patch.object(shares, "BOX_BYTES", BOX_BYTES),
        mock.patch.object(RestrictedReader, "read_data", counting),
    ):
        for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
            part.init_state_fn(part.optimizer, part.config)
        for _, tensor, wanted in state(policy):
            tensor.copy_(torch.full_like(wanted, -1.0) if source else wanted)
        if source is not None:
            with Alive() as alive:
                load_policy(policy, source)
            found.loading = alive.peak
            found.wrong = tuple(
                name for name, tensor, wanted in state(policy) if not torch.equal(tensor, wanted.to(tensor.dtype))
            )
        tensors = [tensor for _, tensor, _ in state(policy)]
        with Alive() as alive:
            complete = save_policy(policy, target, lambda folder, digests: None, background=background)
            if background:  # training may continue
                for tensor in tensors:
                    tensor.fill_(-2.0)
            complete()
        found.saving = alive.peak
        rank = torch.distributed.get_rank()
        found.written = sum(path.stat().st_size for path in target.glob(f"__{rank}_*.distcp"))
    return found


def shards_of(layout: Layout) -> tuple[int, ...]:
    """Return what decides which rank has which part of a dense model's state."""
    return layout.tensor, layout.pipeline, layout.context * layout.data


@pytest.mark.parametrize("kind", ["distributed optimizer", "whole optimizer"])
@pytest.mark.parametrize("model", ["Qwen3", "Qwen3Moe"])
def test_a_rank_holds_what_it_writes_and_a_box_of_what_it_reads_and_any_layout_finds_the_same_state(
    ranks: Ranks, folders: dict[str, Path], model: str, kind: str, tmp_path: Path
) -> None:
    source, before = None, None
    for number, layout in enumerate((LAYOUTS if model == "Qwen3" else EXPERT_LAYOUTS)[kind]):
        target = tmp_path / str(number)
        found = ranks.run(save_and_load, layout.size, folders[model], layout, source, target, bool(number % 2))
        total = sum(each.written for each in found)
        for each in found:
            assert each.wrong == (), layout
            assert each.written > 10 * BOX_BYTES, "the bound means something"
            assert each.saving <= 1.05 * each.written, layout
            assert each.loading <= 2 * BOX_BYTES + SLACK_BYTES, layout
            if model == "Qwen3" and layout.pipeline == 1:  # whose stages have other numbers of parameters
                assert each.written <= 1.1 * total / layout.size, layout
                assert each.read <= 2 * total / layout.size, layout
                if before == shards_of(layout):
                    assert each.read == each.written, layout
        source, before = target, shards_of(layout)
