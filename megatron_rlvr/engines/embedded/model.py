"""The model of transformers behind the embedded engine: built without weights, filled under a checkpoint's names.

It is not the policy's model, on purpose: it is an independent implementation, against which the policy's
log-probabilities are checked in every step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from megatron_rlvr.engines.embedded.kv_cache import grouped_decode_attention

# Names listed of each kind in an error about weights.
_NAMES_SHOWN = 4
_ATTENTION = "sdpa_grouped_decode"


def refuse_partial_attention(config: PretrainedConfig) -> None:
    """Raises ValueError unless every layer attends to all earlier positions, as the cache and its mask do."""
    partial = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    for key in ("sliding_window", "attention_chunk_size"):
        if getattr(config, "layer_types", None) is None and getattr(config, key, None) is not None:
            partial.append(f"{key} {getattr(config, key)}")
    if partial:
        raise ValueError(f"the embedded engine has full attention only, and the model has {', '.join(partial)}")


def build_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with its buffers computed and its parameters tied, but uninitialised."""
    AttentionInterface.register(_ATTENTION, grouped_decode_attention)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    model.tie_weights()  # part of the initialisation that was skipped
    return model.eval().requires_grad_(False)


def checkpoint_views(model: Any) -> dict[str, torch.Tensor]:
    """Name in a Hugging Face checkpoint -> the part of ``model`` that it fills.

    transformers fuses the experts of a layer into two parameters, [expert, 2 * intermediate, hidden] (gate above up)
    and [expert, hidden, intermediate], where checkpoints have three for each expert.
    """
    views: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                views[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                views[f"{prefix}.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, down in enumerate(tensor):
                views[f"{prefix}.experts.{expert}.down_proj.weight"] = down
        else:
            views[name] = tensor
    return views


def copy_weights(
    views: dict[str, torch.Tensor], named_tensors: Iterable[tuple[str, torch.Tensor]], complaint: str
) -> None:
    """Copies a whole model into ``views``; a tied output head may be left out.

    Raises: RuntimeError, beginning with ``complaint``, naming the tensors that are missing, unknown, of the wrong
        shape, given twice, or tied and not equal. Some of ``views`` are overwritten by then.
    """
    missing = dict.fromkeys(views)
    filled: dict[int, str] = {}  # address -> name: tied parameters share theirs
    faults: dict[str, list[str]] = {"unknown": [], "of the wrong shape": [], "given twice": []}
    for name, tensor in named_tensors:
        view = views.get(name)
        if view is None:
            faults["unknown"].append(name)
        elif name not in missing:
            faults["given twice"].append(name)
        elif view.shape != tensor.shape:
            faults["of the wrong shape"].append(f"{name} {list(tensor.shape)}, not {list(view.shape)}")
            del missing[name]
        else:
            del missing[name]
            first = filled.setdefault(view.data_ptr(), name)
            if first != name and not torch.equal(view, tensor.to(view)):
                raise RuntimeError(f"{complaint}: {name} differs from {first}, to which the model's config ties it")
            view.copy_(tensor)
    faults["missing"] = [name for name in missing if views[name].data_ptr() not in filled]
    if any(faults.values()):
        listing = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names)
        raise RuntimeError(f"{complaint}: {listing}")


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
