"""Counts the bytes of the tensors that are alive on one device, by storage.

Views share a storage, so it is counted once, from the first tensor that is seen of it until the last one is gone.
CUDA's caching allocator hands out multiples of 512 bytes; its fragmentation is not counted.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch

_BLOCK = 512


class StorageCounter:
    """Bytes of the storages alive, now and at their peak.

    Attributes:
        now: Bytes alive.
        peak: Most bytes alive since `reset_peak`, or since the start.
        block: Sizes are rounded up to a multiple of it.
    """

    def __init__(self, block: int = _BLOCK) -> None:
        self.now = self.peak = 0
        self.block = block
        self._sizes: dict[int, int] = {}
        self._unsettled: list[weakref.ref[torch.UntypedStorage]] | None = None
        """New storages of a block of `only_survivors`, not counted yet."""

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor; one that is counted already is only measured again."""
        storage = tensor.untyped_storage()
        if self._unsettled is not None and storage._cdata not in self._sizes:
            self._unsettled.append(weakref.ref(storage))
        else:
            self._measure(storage)

    @contextlib.contextmanager
    def only_survivors(self) -> Iterator[None]:
        """Count only those of the storages added in the block that outlive it; within such a block, no change."""
        if self._unsettled is not None:
            yield
            return
        self._unsettled = []
        try:
            yield
        finally:
            unsettled, self._unsettled = self._unsettled, None
            for storage in (reference() for reference in unsettled):
                if storage is not None:
                    self._measure(storage)

    def _measure(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // self.block) * self.block
        known = self._sizes.get(key)
        if known == size:
            return
        if known is None:
            weakref.finalize(storage, self._remove, key)
        self._sizes[key] = size
        self.now += size - (known or 0)
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def reset_peak(self) -> None:
        """Measure the peak from now on."""
        self.peak = self.now
