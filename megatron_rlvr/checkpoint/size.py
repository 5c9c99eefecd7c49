"""Bytes per parameter of a model's weights and of Adam's state, in memory and in a checkpoint, and of its parts.

The optimizer holds two moments in fp32 and, for a bfloat16 model, the weights in fp32. A checkpoint stores these and
the weights in `model.dtype`. With Megatron's distributed optimizer it also stores fp32 weights for a float32 model,
although in memory they are then the model's own.
"""

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
"""{`model.dtype`: bytes of one weight}"""
BOX_BYTES = 2**28
"""Maximum size of a part of a tensor that is written by itself; a reader holds one in memory at a time."""
_MOMENTS_BYTES, _MAIN_WEIGHT_BYTES = 8, 4


def optimizer_bytes(weight_bytes: int) -> int:
    """Return the bytes that Adam keeps in memory per parameter of a model with weights of ``weight_bytes``."""
    return _MOMENTS_BYTES + (_MAIN_WEIGHT_BYTES if weight_bytes < _MAIN_WEIGHT_BYTES else 0)


def checkpoint_bytes(parameters: int, weight_bytes: int, *, distributed_optimizer: bool) -> int:
    """Return the bytes of the tensors in one checkpoint.

    Args:
        parameters: Number of parameters of the model.
        weight_bytes: Bytes of one weight in `model.dtype`.
        distributed_optimizer: Value of `megatron.use_distributed_optimizer`.
    """
    optimizer = _MOMENTS_BYTES + _MAIN_WEIGHT_BYTES if distributed_optimizer else optimizer_bytes(weight_bytes)
    return parameters * (weight_bytes + optimizer)
