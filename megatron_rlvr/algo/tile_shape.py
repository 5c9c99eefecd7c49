"""Shape of a tile of logits in the output layer's head: (rows of tokens, columns of the vocabulary) held at a time.

In a module of its own, so that the planner can compute memory without importing torch.
"""

TILE_SHAPE = {"cpu": (1024, 2048), "cuda": (4096, 4096)}
"""Tile shape by device type. In fp32 a tile takes 8 MiB on a CPU, measured to stay in the third-level cache, and 64 MiB
on a GPU. There the backward reads and writes fp32 sums of `rows` or `columns` x hidden size for 2 x rows x columns x
hidden size operations: 1024 operations a byte in either case, more than a GPU computes in the time of moving a byte.
It has not been tuned on one yet."""


def tile_shape(device_type: str) -> tuple[int, int]:
    """Tile shape of a device type; any accelerator counts as a GPU."""
    return TILE_SHAPE.get(device_type, TILE_SHAPE["cuda"])
