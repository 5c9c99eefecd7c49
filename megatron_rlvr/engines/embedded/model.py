"""The embedded engine's transformers model: built without weights, then loaded by the names of a checkpoint.

The engine deliberately does not use the policy's model: an independent implementation samples, and the policy's
log-probabilities are compared with it in every step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from megatron_rlvr.engines.embedded.kv_cache import grouped_decode_attention

_NAMES_SHOWN = 4  # tensor names listed per kind of problem in an error message
_ATTENTION = "sdpa_grouped_decode"


def refuse_partial_attention(config: PretrainedConfig) -> None:
    """Raise ValueError unless every layer attends to all earlier positions, as the KV cache's mask assumes."""
    partial = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    for key in ("sliding_window", "attention_chunk_size"):
        if getattr(config, "layer_types", None) is None and getattr(config, key, None) is not None:
            partial.append(f"{key} {getattr(config, key)}")
    if partial:
        raise ValueError(
            f"the embedded engine supports full attention only, but the model has {', '.join(partial)}; "
            "use a model whose layers attend to all tokens"
        )


def build_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model in evaluation mode with buffers computed and parameters tied but uninitialised."""
    AttentionInterface.register(_ATTENTION, grouped_decode_attention)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    model.tie_weights()  # no_init_weights skips this part of the initialisation
    return model.eval().requires_grad_(False)


def checkpoint_views(model: Any) -> dict[str, torch.Tensor]:
    """Return views of the model's parameters by their names in a Hugging Face checkpoint.

    transformers fuses the experts of a layer into two parameters, [expert, 2 * intermediate, hidden] (gate above up)
    and [expert, hidden, intermediate]; checkpoints have three parameters for each expert.
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
    views: dict[str, torch.Tensor], named_tensors: Iterable[tuple[str, torch.Tensor]], error_prefix: str
) -> None:
    """Copy the tensors of a whole model into ``views``; a tied output head may be omitted.

    Args:
        views: Result of `checkpoint_views`.
        named_tensors: (name, tensor) pairs, in any order.
        error_prefix: Beginning of every error message.

    Raises:
        RuntimeError: With the names of tensors that are missing, unknown, of the wrong shape, repeated, or tied but not
            equal. Some of ``views`` have been overwritten by then.
    """
    missing = dict.fromkeys(views)
    filled: dict[int, str] = {}  # address -> name; tied parameters share an address
    faults: dict[str, list[str]] = {"unknown": [], "of the wrong shape": [], "repeated": []}
    for name, tensor in named_tensors:
        view = views.get(name)
        if view is None:
            faults["unknown"].append(name)
        elif name not in missing:
            faults["repeated"].append(name)
        elif view.shape != tensor.shape:
            faults["of the wrong shape"].append(f"{name} {list(tensor.shape)}, not {list(view.shape)}")
            del missing[name]
        else:
            del missing[name]
            first = filled.setdefault(view.data_ptr(), name)
            if first != name and not torch.equal(view, tensor.to(view)):
                raise RuntimeError(f"{error_prefix}: {name} differs from {first}, to which the model's config ties it")
            view.copy_(tensor)
    faults["missing"] = [name for name in missing if views[name].data_ptr() not in filled]
    if any(faults.values()):
        listing = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names)
        raise RuntimeError(f"{error_prefix}: {listing}")


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
