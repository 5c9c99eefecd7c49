"""Shape of a tile of logits in the output layer's head: (rows of tokens, columns of the vocabulary) held at a time.

In a module of its own, so that the planner can compute memory without importing torch.
"""

TILE_SHAPE = {"cpu": (1024, 2048), "cuda": (1024, 8192)}
"""Tile shape by device type. In fp32 a tile takes 8 MiB on a CPU, which stay in a core's cache, and 32 MiB on a GPU,
which stay in an H100's cache and are wide enough to keep the matrix product efficient."""
