"""Shape of a tile of logits in the output layer's head: (rows of tokens, columns of the vocabulary) held at a time.

In a module of its own, so that the planner can compute memory without importing torch.
"""

TILE_SHAPE = {"cpu": (1024, 2048), "cuda": (1024, 8192)}
"""Tile shape by device type. In fp32 a tile takes 8 MiB on a CPU, measured to stay in the third-level cache, and 32 MiB
on a GPU, where it has not been tuned yet."""


def tile_shape(device_type: str) -> tuple[int, int]:
    """Tile shape of a device type; any accelerator counts as a GPU."""
    return TILE_SHAPE.get(device_type, TILE_SHAPE["cuda"])
