"""Settings of the model and of how its ranks share it."""

from typing import Literal

from pydantic import Field

from megatron_rlvr.config.section import OptionalPath, PathText, Section

MAX_RANKS = 2**16
"""Largest size of a parallel group, far above those of any machine."""


class ModelSettings(Section):
    """Model to train."""

    path: PathText = Field(min_length=1)
    """Hugging Face folder of the model to start from: config.json, safetensors, tokenizer."""
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
