"""Keys and values of rows that are not computed again: what incremental decoding and prefix-cached ranking keep.

**Approximate by nature.** In a bidirectional model every state changes when a token is appended; here earlier rows stay
as they were when they were last computed. Nothing in this module is used unless a caller asks for a cache by name.

A cache has slots of equal capacity, a sequence in each. A step computes some rows of some sequences anew, always up to
the sequence's end, and writes their keys and values where they belong. Attention then sees a slot's rows up to its
sequence's end; the unused rest of a slot, and slots that take no part, stand in ``cu_keys`` as sequences that nobody
asks. So every attention kernel serves, and no row is moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mlmfast.architectures.spec import Embedding, EncoderSpec
from mlmfast.packing import Batch
from mlmfast.staging import transferred

# Bytes that a cache may take, unless what is computed together needs more; and of an accelerator's memory that is free,
# this part.
CACHE_BYTES = 2 << 30
CACHE_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class Line:
    """What a step computes of one sequence.

    Attributes:
        slot: where the cache holds it.
        token_ids: int64 ``[L]``, the whole sequence as it is now, special tokens included.
        start: the first row that is computed anew; all rows from there to the end are.
        masked: positions that read the mask token, none before ``start``.
        scored: positions whose hidden states are wanted, ascending, none before ``start``.
    """

    slot: int
    token_ids: np.ndarray
    start: int
    masked: Sequence[int]
    scored: Sequence[int]

    @property
    def rows(self) -> int:
        """How many are computed."""
        return len(self.token_ids) - self.start


@dataclass(frozen=True, eq=False, repr=False)
class StepBatch(Batch):
    """The rows that a step computes: ``T`` of them. Each sequence stands between two that have no rows.

    Attributes:
        positions: int64 ``[T]``, each row's place in its sequence.
        position_ids: int64 ``[T]``, its absolute position as the embedding counts.
        lengths: int64 ``[T]``, the length of its sequence.
        cache_rows: int64 ``[T]``, where the cache holds it.
        copy_scale: float32 ``[C]``, :func:`mlmfast.encoder.copy_scale` of each whole sequence.
        cu_keys: int32 ``[C + 1]``, bounds in the cache of the keys that each sequence's rows see.
        max_keys: most keys of a sequence that has rows.
    """

    ENCODED: ClassVar[tuple[str, ...]] = (
        *Batch.ENCODED,
        "positions",
        "position_ids",
        "lengths",
        "cache_rows",
        "copy_scale",
        "cu_keys",
    )

    positions: Tensor
    position_ids: Tensor
    lengths: Tensor
    cache_rows: Tensor
    copy_scale: Tensor
    cu_keys: Tensor
    max_keys: int

    def places(self) -> Tensor | None:
        return self.positions

    def keys(self) -> tuple[Tensor, int]:
        return self.cu_keys, self.max_keys

    def shape(self) -> tuple[int, ...]:
        return (*super().shape(), self.max_keys)


class LayerCache:
    """One layer's keys and values ``[slots * capacity, H, D]``, and its inputs where a convolution reads them."""

    def __init__(self, keys: Tensor, values: Tensor, inputs: Tensor | None) -> None:
        self.keys = keys
        self.values = values
        self.inputs = inputs

    def extended(self, keys: Tensor, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """All keys and values, after those of a step's rows ``[T, H, D]`` were written."""
        assert isinstance(batch, StepBatch)
        self.keys.index_copy_(0, batch.cache_rows, keys)
        self.values.index_copy_(0, batch.cache_rows, values)
        return self.keys, self.values

    def with_inputs(self, hidden: Tensor, batch: Batch) -> Tensor:
        """All inputs of the layer ``[slots * capacity, d]``, after those of a step's rows ``[T, d]`` were written."""
        assert isinstance(batch, StepBatch) and self.inputs is not None
        self.inputs.index_copy_(0, batch.cache_rows, hidden)
        return self.inputs


class Cache:
    """Slots for sequences of one model.

    Args:
        spec: the model.
        slots: how many sequences.
        capacity: the longest that each may become, special tokens and masks included.

    Raises:
        RuntimeError: torch's own, out of memory: it takes ``slots * capacity * row_bytes(spec)`` bytes.
    """

    def __init__(self, spec: EncoderSpec, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        rows = slots * capacity
        self.layers: list[LayerCache] = []
        for layer in spec.layers:
            inner, width = layer.key.weight.shape
            like = layer.key.weight
            shape = (rows, spec.heads, inner // spec.heads)
            inputs = None if layer.convolution is None else like.new_zeros(rows, width)
            self.layers.append(LayerCache(like.new_zeros(shape), like.new_zeros(shape), inputs))

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Slots ``targets`` become what slots ``sources`` were before, in their first ``length`` rows."""
        moved = [(s, t) for s, t in zip(sources, targets) if s != t]
        if not moved:
            return
        both = transferred([torch.tensor(slots) for slots in zip(*moved)], self.layers[0].keys.device)
        for layer in self.layers:
            for rows in (layer.keys, layer.values, layer.inputs):
                if rows is not None:
                    held = rows.unflatten(0, (self.slots, self.capacity))[:, :length]
                    held.index_copy_(0, both[1], held.index_select(0, both[0]))

    def __repr__(self) -> str:
        return f"Cache(slots={self.slots}, capacity={self.capacity}, layers={len(self.layers)})"


def row_bytes(spec: EncoderSpec) -> int:
    """Bytes that a cache holds of one row."""
    per_layer = [2 * len(x.key.weight) + (0 if x.convolution is None else x.key.weight.shape[1]) for x in spec.layers]
    return sum(per_layer) * spec.embedding.words.dtype.itemsize


def cache_slots(spec: EncoderSpec, capacity: int, wanted: int, least: int, free: int | None) -> int:
    """How many slots a cache has.

    Args:
        spec: the model.
        capacity: rows of a slot.
        wanted: continuations that there will be.
        least: of a single search, which are computed together.
        free: bytes of the device's memory that are free; None on a CPU.
    """
    room = CACHE_BYTES if free is None else int(free * CACHE_SHARE)
    most = room // (capacity * row_bytes(spec))
    return max(least, min(wanted, most))


def step_batch(embedding: Embedding, lines: Sequence[Line], cache: Cache, granularity: int = 1) -> StepBatch:
    """Packs a step.

    Args:
        embedding: says how absolute positions are counted.
        lines: in ascending order of their slots, each slot once.
        cache: what it will be computed with.
        granularity: ``max_keys`` is rounded up to a multiple of it, so that neighbouring lengths launch alike.
    """
    rows = [line.rows for line in lines]
    starts = list(accumulate(rows, initial=0))
    begins = [line.slot * cache.capacity for line in lines]
    ends = [begin + len(line.token_ids) for begin, line in zip(begins, lines)]
    # What no line sees stands between them: [0, begin), rows of the first line, [its end, the next begin), ...
    cu_keys = [0, *(bound for pair in zip(begins, ends) for bound in pair), cache.slots * cache.capacity]
    positions = _joined(np.arange(line.start, len(line.token_ids)) for line in lines)
    longest = max(len(line.token_ids) for line in lines)
    scored = [len(line.scored) for line in lines]
    return StepBatch(
        token_ids=_joined(line.token_ids[line.start :] for line in lines),
        cu_seqlens=_between(starts),
        masked_rows=_joined(np.array(line.masked) - line.start + at for line, at in zip(lines, starts)),
        scored_rows=_joined(np.array(line.scored) - line.start + at for line, at in zip(lines, starts)),
        cu_scored=_between(list(accumulate(scored, initial=0))),
        scored_positions=_joined(np.array(line.scored) for line in lines),
        max_seqlen=max(rows),
        max_scored=max(scored),
        positions=positions,
        position_ids=_joined(position_ids(embedding, line)[line.start :] for line in lines),
        lengths=torch.from_numpy(np.repeat([len(line.token_ids) for line in lines], rows)),
        cache_rows=positions + torch.from_numpy(np.repeat(begins, rows)),
        copy_scale=torch.tensor([x for line in lines for x in (1.0, copy_scale(embedding, line))] + [1.0]),
        cu_keys=torch.tensor(cu_keys, dtype=torch.int32),
        max_keys=min(cache.capacity, -(-longest // granularity) * granularity),
    )


def position_ids(embedding: Embedding, line: Line) -> np.ndarray:
    """Absolute positions of a whole sequence, int64 ``[L]``: :func:`mlmfast.encoder.position_ids` on the host."""
    if embedding.padding_id is None:
        return np.arange(len(line.token_ids)) + embedding.first_position
    counted = line.token_ids != embedding.padding_id
    counted[list(line.masked)] = True
    return np.cumsum(counted) * counted + embedding.padding_id


def copy_scale(embedding: Embedding, line: Line) -> float:
    """Factor on the words of a whole sequence: :func:`mlmfast.encoder.copy_scale` on the host."""
    dropout = embedding.token_dropout
    if dropout is None:
        return 1.0
    masks = line.token_ids == dropout.token
    masks[list(line.masked)] = True
    return dropout.scale(int(masks.sum()), len(masks))


def _between(bounds: Sequence[int]) -> Tensor:
    """Bounds of sequences each of which stands between two empty ones, int32."""
    return torch.tensor([bound for bound in bounds for _ in range(2)], dtype=torch.int32)


def _joined(parts: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64, copy=False))
