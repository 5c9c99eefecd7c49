"""Shape of a tile of logits in the output layer's head: (rows of tokens, columns of the vocabulary) held at a time.

Apart from the head, so that memory can be planned without importing torch.
"""

TILE_SHAPE = {"cpu": (1024, 2048), "cuda": (1024, 8192)}
"""By device type: a wide tile keeps a GPU's matrix product efficient, a narrow one stays in a CPU's cache."""
