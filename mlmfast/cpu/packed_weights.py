"""Copies of weights in oneDNN's own layout, kept as long as the weight is what it was."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Rows that a packed layout is made for. oneDNN serves other numbers of rows from it at the same rate (measured from 1
# to 4096).
ROWS = 1024


def pack(weight: Tensor) -> Tensor:
    """A copy of ``weight [m, n]`` in the layout that oneDNN chooses for it.

    Raises:
        RuntimeError: oneDNN refuses.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


@dataclass(frozen=True)
class Packed:
    """A packed copy and what it was made from.

    Attributes:
        weight: the copy; None if oneDNN refused to make one.
        storage: the weight's storage, not kept alive.
        version: the weight's version counter.
    """

    weight: Tensor | None
    storage: StorageWeakRef
    version: int


class PackedWeights:
    """Packed copies by the memory that they were packed from.

    A slice of a weight shares its storage and version counter, and has a copy of its own. A change is seen by the
    storage and by the version counter, which optimisers, ``copy_`` and ``load_state_dict`` advance. Writing through
    ``parameter.data`` hides from the counter, as does writing to one of two parameters that were tied through
    ``.data``: :meth:`clear` is for that. A copy whose weight has been freed is dropped when the next one is made.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Packed] = {}
        self._lock = threading.Lock()

    def get(self, weight: Tensor) -> Tensor | None:
        """The packed copy of ``weight [m, n]``; None where there can be none."""
        if weight.is_inference():  # no version counter
            return None
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        kept = self._kept.get(key)
        # The weak reference keeps a storage's identity from being used again, so equal identities are one storage.
        if kept is None or kept.storage.cdata != weight.untyped_storage()._cdata or kept.version != weight._version:
            with self._lock:
                kept = self._make(key, weight)
        return kept.weight

    def _make(self, key: Hashable, weight: Tensor) -> Packed:
        self._kept.pop(key, None)  # before the new one is made, so that both never stand side by side
        for other in [k for k, packed in self._kept.items() if packed.storage.expired()]:
            del self._kept[other]
        storage, version = StorageWeakRef(weight.untyped_storage()), weight._version
        try:
            with torch.inference_mode(False), torch.no_grad():
                copy = pack(weight)
        except RuntimeError:
            copy = None
        packed = self._kept[key] = Packed(copy, storage, version)
        return packed

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)
