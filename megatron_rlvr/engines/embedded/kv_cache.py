"""KV cache of the embedded engine, and the attention over it.

Each layer holds keys and values as [row, head, column, channel]. The sequences of the running batch occupy rows
0 .. n-1 and each starts at column 0, so that a token's column is its position, and a decode step reads the first rows
and columns as one view. With this order of axes, the cells that a step reads for one row and head are contiguous; with
columns outside of heads a step took a fifth longer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class KVCache:
    """Keys and values of all layers, with the cells that the current decode step writes and reads.

    Args:
        layers: Number of decoder layers.
        rows: Maximum number of sequences.
        columns: Maximum number of tokens of a sequence.
        device: Device of the cache.

    Attributes:
        past_key_values: The same storage as a transformers cache, to be passed to the model's forward.
    """

    def __init__(self, layers: int, rows: int, columns: int, device: torch.device) -> None:
        self._row_index = torch.arange(rows, device=device)
        self._column_index = torch.arange(columns, device=device)
        self._cells = _Cells(rows, columns, self._row_index[:0], self._row_index[:0], 0)
        self.past_key_values = Cache(layers=[_KVCacheLayer(self._cells) for _ in range(layers)])

    def begin_step(self, position: torch.Tensor, span: int, dtype: torch.dtype) -> torch.Tensor:
        """Select the cell that each row writes in this step, and return the attention mask.

        Args:
            position: [rows in use] int64, the column that row i writes.
            span: Number of columns that the step reads: the largest position + 1.
            dtype: Data type of the mask.

        Returns:
            [rows in use, 1, 1, span], added to the attention scores: 0 up to the row's own position, -inf after it.
        """
        cells = self._cells
        cells.written_rows, cells.written_columns, cells.span = self._row_index[: len(position)], position, span
        masked = self._column_index[:span] > position[:, None]
        # A float mask: every layer would convert a boolean one to floats again.
        mask = torch.zeros(masked.shape, dtype=dtype, device=position.device).masked_fill_(masked, -torch.inf)
        return mask[:, None, None, :]

    def fill(self, rows: torch.Tensor, prefilled: Cache, source: torch.Tensor) -> None:
        """Copy row ``source[i]`` of a prefilled cache into row ``rows[i]``, starting at the first column."""
        others: list[Any] = prefilled.layers
        for layer, other in zip(self._layers, others, strict=True):
            layer.fill(rows, other.keys[source], other.values[source])

    def move(self, to_rows: torch.Tensor, from_rows: torch.Tensor, columns: int) -> None:
        """Copy the first ``columns`` columns of each row ``from_rows[i]`` into row ``to_rows[i]``."""
        for layer in self._layers:
            for cells in (layer.keys, layer.values):
                cells[to_rows, :, :columns] = cells[from_rows, :, :columns]

    @property
    def _layers(self) -> list[Any]:
        return self.past_key_values.layers


@dataclass(slots=True)
class _Cells:
    """Size of the cache, and the cells of the current decode step.

    The layers share this object and not the `KVCache` that holds them: in a cycle of references the cache would
    outlive its rollout until the garbage collector runs, beside the caches of later ones.
    """

    rows: int
    columns: int
    written_rows: torch.Tensor
    written_columns: torch.Tensor
    span: int


class _KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, updated in place."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, cells: _Cells) -> None:
        super().__init__()
        self._cells = cells

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, columns = self._cells.rows, self._cells.columns
        # Zeros and not empty: attention multiplies a masked cell by zero, which would keep an uninitialised NaN.
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def fill(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the first columns of ``rows`` from keys and values [len(rows), head, columns, channel]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys[rows, :, : keys.shape[2]] = keys
        self.values[rows, :, : values.shape[2]] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one column per row and return views of the rows and columns that the step reads.

        The model calls this method once per layer and step.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns, span = self._cells.written_rows, self._cells.written_columns, self._cells.span
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :span], self.values[: len(rows), :, :span]

    def get_seq_length(self) -> int:
        return self._cells.span

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cells.span, 0

    def get_max_length(self) -> int:
        return self._cells.columns


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
    """Compute SDPA without repeating key-value heads in a decode step; transformers' copies them per query head.

    With one query token, the query heads that share a key-value head can take the place of query positions, because
    the mask is the same for all of them. A prefill (more than one query token) uses transformers' own function.

    Args:
        query: [B, query head, T, D].
        key, value: [B, key-value head, columns, D].
        attention_mask: [B, 1, T, columns], added to the scores, or None.

    Returns:
        Output [B, T, query head, D], and None in place of attention weights.
    """
    batch, query_heads, length, channels = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], -1, channels)
    output = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return output.reshape(batch, 1, query_heads, -1), None
