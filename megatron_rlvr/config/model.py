"""Settings of the model and of how its ranks share it."""

from typing import Literal

from pydantic import Field

from megatron_rlvr.config.section import OptionalPath, PathText, Section, SettingsError

MAX_RANKS = 2**16
"""Largest size of a parallel group, far above those of any machine."""


class ModelSettings(Section):
    """Model to train."""

    path: PathText = Field(min_length=1)
    """Hugging Face folder of the model to start from: config.json, safetensors, tokenizer. Or a GGUF file, which is
    unpacked to such a folder beside it."""
    tokenizer: OptionalPath = None
    """Tokenizer folder, or a sentencepiece .model file; null: the model's folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations. The optimizer keeps float32 weights in either case."""


class ParallelSettings(Section):
    """Sizes of the parallel groups. The ranks that remain are data-parallel."""

    tensor: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Tensor parallel size: number of ranks that share the weights of each layer."""
    pipeline: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Pipeline parallel size: number of stages that the layers are divided into."""
    virtual_pipeline: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Virtual stages per pipeline stage (interleaved schedule): a smaller pipeline bubble for more communication."""
    first_stage_layers: int | None = Field(default=None, ge=1, le=2**16)
    """Layers of the first pipeline stage; null: as many as of every other stage."""
    last_stage_layers: int | None = Field(default=None, ge=1, le=2**16)
    """Layers of the last pipeline stage; null: as many as of every other stage."""
    context: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Context parallel size: number of ranks that share each sequence, to shard the activations of long responses."""
    expert: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Expert parallel size: number of ranks that share the experts of each MoE layer; divides tensor x context x
    data."""
    sequence: bool = False
    """Sequence parallel: shard the activations of norms over the tensor-parallel ranks. Needs `parallel.tensor` > 1."""

    @property
    def replica(self) -> int:
        """Number of ranks in a data-parallel replica, which hold one copy of the model (but not of all experts)."""
        return self.tensor * self.context * self.pipeline

    def stages(self, layers: int) -> list[list[range]]:
        """Divide the layers of a model over the pipeline, as Megatron does.

        Args:
            layers: Number of layers.

        Returns:
            For each pipeline stage, the layers of each of its virtual stages, numbered from 0.

        Raises:
            SettingsError: If the layers do not divide.
        """
        ends = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        given = {stage: count for stage, count in ends.items() if count is not None}
        middle, left = self.pipeline - len(given), layers - sum(given.values())
        sizes = [given.get(stage, left // max(1, middle)) for stage in range(self.pipeline)]
        if min(sizes) < 1 or sum(sizes) != layers or any(size % self.virtual_pipeline for size in sizes):
            raise SettingsError(self._does_not_divide(layers, bool(given)))
        stages: list[list[range]] = [[] for _ in sizes]
        start = 0
        for _ in range(self.virtual_pipeline):
            for stage, size in zip(stages, sizes, strict=True):
                stage.append(range(start, start + size // self.virtual_pipeline))
                start = stage[-1].stop
        return stages

    def _does_not_divide(self, layers: int, uneven: bool) -> str:
        names = ("pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers")
        written = [f"parallel.{name}={getattr(self, name)}" for name in names]
        shown = " x ".join(written[: 1 if self.virtual_pipeline == 1 else 2])
        if not uneven:
            return (
                f"{shown}: does not divide the {layers} layers; choose a divisor, or set parallel.first_stage_layers "
                "or last_stage_layers"
            )
        ends = " and ".join(text for text in written[2:] if not text.endswith("None"))
        return (
            f"{ends}: the {layers} layers do not divide that way by {shown}; give every stage the same number of "
            "layers, but for the first and the last"
        )
