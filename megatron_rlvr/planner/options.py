"""Options besides the layout that decide memory and time: `model.dtype`, the ``megatron:`` section, the layers used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.checkpoint.size import WEIGHT_BYTES
from megatron_rlvr.config import SettingsError

_KNOWN_MODULES = ("core_attn", "mlp", "moe")
MODELED_FIELDS = (
    "use_distributed_optimizer",
    "grad_reduce_in_fp32",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "bias_activation_fusion",
    "gradient_accumulation_fusion",
)
"""Fields of the ``megatron:`` section that the estimates take into account."""


@dataclass(frozen=True)
class TrainingOptions:
    """Options besides the layout that the estimates depend on; `TrainingOptions.of` reads them from settings.

    Attributes:
        weight_bytes: Bytes of a weight and of an activation.
        gradient_bytes: Bytes of a gradient in the buffer.
        distributed_optimizer: Value of use_distributed_optimizer.
        recompute: Activation checkpointing (recompute): none, selective or full.
        block_layers: Layers of a virtual stage that are recomputed (full recompute, method block); 0 for method
            uniform, which recomputes all of them, ``unit_layers`` at a time.
        unit_layers: Layers that are recomputed together (full recompute, method uniform).
        recompute_modules: Modules that are recomputed (selective recompute).
        fused_activation: Value of bias_activation_fusion.
        fused_gradient: Value of gradient_accumulation_fusion.
        transformer_engine: True if layers are Transformer Engine's, False if they are the project's own.
        reference: True if a frozen copy of the model is held as well (`loss.kl_coefficient`).
    """

    weight_bytes: int = 2
    gradient_bytes: int = 4
    distributed_optimizer: bool = True
    recompute: str = "none"
    block_layers: int = 0
    unit_layers: int = 1
    recompute_modules: tuple[str, ...] = ()
    fused_activation: bool = True
    fused_gradient: bool = False
    transformer_engine: bool = True
    reference: bool = False

    @classmethod
    def of(
        cls, dtype: str, megatron: Mapping[str, Any], transformer_engine: bool, *, reference: bool = False
    ) -> "TrainingOptions":
        """Read the options from `model.dtype` and a ``megatron:`` section; see the attributes for the others.

        Raises: SettingsError for a recomputed module that the estimates do not cover.
        """
        weight_bytes = WEIGHT_BYTES[dtype]
        recompute = megatron.get("recompute_granularity") or "none"
        layers = megatron.get("recompute_num_layers") or 1
        block = megatron.get("recompute_method") == "block"
        modules = tuple(megatron.get("recompute_modules") or ("core_attn",)) if recompute == "selective" else ()
        for module in modules:
            if module not in _KNOWN_MODULES:
                raise SettingsError(
                    f"megatron.recompute_modules: the planner has no estimate for {module!r}; "
                    f"use only {', '.join(_KNOWN_MODULES)}"
                )
        return cls(
            weight_bytes=weight_bytes,
            gradient_bytes=4 if megatron.get("grad_reduce_in_fp32", True) else weight_bytes,
            distributed_optimizer=bool(megatron.get("use_distributed_optimizer", False)),
            recompute=recompute,
            block_layers=layers if block else 0,
            unit_layers=1 if block else layers,
            recompute_modules=modules,
            fused_activation=bool(megatron.get("bias_activation_fusion", True)),
            fused_gradient=bool(megatron.get("gradient_accumulation_fusion", False)),
            transformer_engine=transformer_engine,
            reference=reference,
        )

    @property
    def megatron(self) -> dict[str, Any]:
        """The equivalent ``megatron:`` section, without the fields that keep their defaults."""
        values: dict[str, Any] = {}
        if self.distributed_optimizer:
            values["use_distributed_optimizer"] = True
        if self.gradient_bytes == 2:
            values["grad_reduce_in_fp32"] = False
        if self.recompute == "full":
            values["recompute_granularity"] = "full"
            values["recompute_method"] = "block" if self.block_layers else "uniform"
            values["recompute_num_layers"] = self.block_layers or self.unit_layers
        if self.recompute == "selective":
            values |= {"recompute_granularity": "selective", "recompute_modules": list(self.recompute_modules)}
        if not self.fused_activation:
            values["bias_activation_fusion"] = False
        if self.fused_gradient:
            values["gradient_accumulation_fusion"] = True
        return values
