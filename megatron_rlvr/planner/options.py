"""What decides memory and time beside the layout: `model.dtype`, the ``megatron:`` section, whose the layers are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.config import SettingsError

_MODULES = ("core_attn", "mlp", "moe")
PLANNED_FOR = (
    "use_distributed_optimizer",
    "grad_reduce_in_fp32",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "bias_activation_fusion",
    "gradient_accumulation_fusion",
)
"""Fields of the ``megatron:`` section that the figures follow."""


@dataclass(frozen=True)
class Options:
    """What the figures follow beside the layout; see `Options.of`.

    Attributes:
        element: bytes of a weight and of an activation.
        gradient: bytes of a gradient in the buffer.
        distributed: use_distributed_optimizer.
        recompute: none, selective, full.
        block: layers of a stage that are recomputed (full, block); 0: all of them, `unit` at a time.
        unit: layers recomputed together (full, uniform).
        modules: recomputed modules (selective).
        fused_activation: bias_activation_fusion.
        fused_gradient: gradient_accumulation_fusion.
        transformer_engine: whether layers are Transformer Engine's.
    """

    element: int = 2
    gradient: int = 4
    distributed: bool = True
    recompute: str = "none"
    block: int = 0
    unit: int = 1
    modules: tuple[str, ...] = ()
    fused_activation: bool = False
    fused_gradient: bool = False
    transformer_engine: bool = True

    @classmethod
    def of(cls, dtype: str, megatron: Mapping[str, Any], transformer_engine: bool) -> "Options":
        """From `model.dtype` and a ``megatron:`` section; SettingsError for recompute that is not known here."""
        element = 2 if dtype == "bfloat16" else 4
        recompute = megatron.get("recompute_granularity") or "none"
        layers = megatron.get("recompute_num_layers") or 1
        block = megatron.get("recompute_method") == "block"
        modules = tuple(megatron.get("recompute_modules") or ("core_attn",)) if recompute == "selective" else ()
        for module in modules:
            if module not in _MODULES:
                raise SettingsError(
                    f"megatron.recompute_modules {module!r} is not planned for; known are {', '.join(_MODULES)}"
                )
        return cls(
            element=element,
            gradient=4 if megatron.get("grad_reduce_in_fp32", True) else element,
            distributed=bool(megatron.get("use_distributed_optimizer", False)),
            recompute=recompute,
            block=layers if block else 0,
            unit=1 if block else layers,
            modules=modules,
            fused_activation=bool(megatron.get("bias_activation_fusion", False)),
            fused_gradient=bool(megatron.get("gradient_accumulation_fusion", False)),
            transformer_engine=transformer_engine,
        )

    @property
    def megatron(self) -> dict[str, Any]:
        """The ``megatron:`` section that says the same, defaults left out."""
        values: dict[str, Any] = {}
        if self.distributed:
            values["use_distributed_optimizer"] = True
        if self.gradient == 2:
            values["grad_reduce_in_fp32"] = False
        if self.recompute == "full":
            method = {"recompute_method": "block" if self.block else "uniform"}
            values |= {"recompute_granularity": "full", **method, "recompute_num_layers": self.block or self.unit}
        if self.recompute == "selective":
            values |= {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        if self.fused_activation:
            values["bias_activation_fusion"] = True
        if self.fused_gradient:
            values["gradient_accumulation_fusion"] = True
        return values
