"""The key-value cache of the embedded engine, and the attention over it.

The cache is a block of slots, [row, head, column, channel] in every layer. The live sequences occupy rows 0 .. n-1
and each starts at column 0, so that a token's column is its position, and a step reads the first rows and columns as
one view. This order of the axes keeps what a step reads of a row and head in one piece: with columns outside of heads
a step took a fifth longer.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class KVCache:
    """The cells of all layers, and which of them the current step writes and reads.

    ``cache`` is what a model of transformers takes as ``past_key_values``.
    """

    def __init__(self, layers: int, rows: int, columns: int, device: torch.device) -> None:
        self.rows = rows
        self.columns = columns
        self.cache = Cache(layers=[_KVCacheLayer(self) for _ in range(layers)])
        self._row_index = torch.arange(rows, device=device)
        self._column_index = torch.arange(columns, device=device)
        self.written_rows = self.written_columns = self._row_index[:0]
        self.span = 0

    def begin_step(self, position: torch.Tensor, span: int, dtype: torch.dtype) -> torch.Tensor:
        """Makes room for one token a row; returns the mask of what each may look at.

        Args:
            position: [live] int64, the column that row i writes.
            span: columns that the step looks at: the largest position + 1.
            dtype: of the mask.

        Returns: [live, 1, 1, span], added to the scores: 0 up to the row's own position, -inf after it.
        """
        self.written_rows, self.written_columns, self.span = self._row_index[: len(position)], position, span
        unseen = self._column_index[:span] > position[:, None]
        # A mask of numbers: of a boolean one, every layer would make its own.
        mask = torch.zeros(unseen.shape, dtype=dtype, device=position.device).masked_fill_(unseen, -torch.inf)
        return mask[:, None, None, :]

    def fill(self, rows: torch.Tensor, prefilled: Cache, source: torch.Tensor) -> None:
        """Copies row ``source[i]`` of another cache into row ``rows[i]``, from the first column on."""
        others: list[Any] = prefilled.layers
        for layer, other in zip(self._layers, others, strict=True):
            layer.fill(rows, other.keys[source], other.values[source])

    def move(self, to_rows: torch.Tensor, from_rows: torch.Tensor, columns: int) -> None:
        """Copies the first ``columns`` of some rows over others."""
        for layer in self._layers:
            for cells in (layer.keys, layer.values):
                cells[to_rows, :, :columns] = cells[from_rows, :, :columns]

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers


class _KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, written in place."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, slots: KVCache) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, columns = self._slots.rows, self._slots.columns
        # Zeros, because a masked cell is multiplied by zero, which a stray NaN would survive.
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def fill(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes the first columns of ``rows``; keys and values are [len(rows), head, columns, channel]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys[rows, :, : keys.shape[2]] = keys
        self.values[rows, :, : values.shape[2]] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model: stores one column a row, and returns views of all that the step may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns, span = self._slots.written_rows, self._slots.written_columns, self._slots.span
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :span], self.values[: len(rows), :, :span]

    def get_seq_length(self) -> int:
        return self._slots.span

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.span, 0

    def get_max_length(self) -> int:
        return self._slots.columns


def grouped_decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that reads each key-value head once in a decode step, where transformers' copies it for every query head.

    query is [B, query head, T, D], key and value [B, key-value head, columns, D]. With one query token, the query
    heads that share a key-value head can stand where query positions do, since the mask is the same for all of them.
    """
    batch, query_heads, length, channels = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], -1, channels)
    output = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return output.reshape(batch, 1, query_heads, -1), None
