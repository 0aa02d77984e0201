"""Mask plan -> packed batches: identical copies once, no padding, a token budget, the original order kept.

A packed batch lays copies end to end; ``cu_seqlens`` marks where each begins. Copies are sorted by length, so that a
batch holds runs of equal lengths (which a backend can treat as one block), and a batch is filled to its token budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mlmfast.masking import MaskPlan
from mlmfast.staging import transferred

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Batch:
    """What the encoder reads: ``C`` copies laid end to end, ``T`` rows, ``R`` scored ones.

    Attributes:
        token_ids: int64 ``[T]``, the text's own tokens; what stands at a masked row is never read.
        cu_seqlens: int32 ``[C + 1]``, where each copy begins; the last entry is ``T``.
        masked_rows: int64 ``[M]``, rows that read the mask token, ascending.
        scored_rows: int64 ``[R]``, rows that predictions are read at, ascending.
        cu_scored: int32 ``[C + 1]``, bounds of each copy's run in ``scored_rows``.
        scored_positions: int64 ``[R]``, a scored row's place in its copy.
        max_seqlen: longest copy, known without asking a device.
        max_scored: most scored rows of a copy.
    """

    # The tensors above, which go to the device; what else a batch holds stays on the host until it is needed.
    ENCODED: ClassVar[tuple[str, ...]] = (
        "token_ids",
        "masked_rows",
        "scored_rows",
        "scored_positions",
        "cu_seqlens",
        "cu_scored",
    )

    token_ids: Tensor
    cu_seqlens: Tensor
    masked_rows: Tensor
    scored_rows: Tensor
    cu_scored: Tensor
    scored_positions: Tensor
    max_seqlen: int
    max_scored: int

    @property
    def copies(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device) -> Self:
        """The same batch with what the encoder reads on a device."""
        return self.over(transferred(self.encoded(), device))

    def encoded(self) -> list[Tensor]:
        """What the encoder reads, in the order of :attr:`ENCODED`."""
        return [getattr(self, name) for name in self.ENCODED]

    def over(self, encoded: list[Tensor]) -> Self:
        """The same batch that reads these instead of its own :meth:`encoded`."""
        fields: dict[str, Any] = dict(zip(self.ENCODED, encoded))
        return replace(self, **fields)

    def places(self) -> Tensor | None:
        """Each row's place in its copy, int64 ``[T]``; None where the rows are all of each copy."""
        return None

    def keys(self) -> tuple[Tensor, int]:
        """Bounds of the keys that each copy's rows see, int32 ``[C + 1]``, and the most of them."""
        return self.cu_seqlens, self.max_seqlen

    def shape(self) -> tuple[int, ...]:
        """What launches over it depend on: ``T, M, R, C`` and the longest of its copies."""
        return (*map(len, self.encoded()), self.max_seqlen, self.max_scored)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(copies={self.copies}, tokens={self.tokens}, scored={len(self.scored_rows)})"


@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch(Batch):
    """Whole copies of a plan, with ``N`` targets.

    Attributes:
        targets: int64 ``[N]``, token ids to be predicted.
        target_rows: int64 ``[N]``, the place in ``scored_rows`` that each target is read from; copies that serve
            several texts have several targets a row.
        order: int64 ``[N]``, each target's place in the plan's ``targets``.
    """

    targets: Tensor
    target_rows: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class PaddedBatch(Batch):
    """Sequences cut out of a padded matrix, whole, with their masks among their tokens.

    Attributes:
        position_ids: int64 ``[T]``, each row's absolute position as the embedding counts.
        copy_scale: float32 ``[C]``, :func:`mlmfast.encoder.copy_scale` of each sequence.
        token_types: int64 ``[T]``; None for type 0 everywhere.
        cells: int64 ``[T]``, each row's place in the matrix, line by line.
    """

    position_ids: Tensor
    copy_scale: Tensor
    token_types: Tensor | None
    cells: Tensor


def halves(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch]:
    """Splits a batch of two copies or more into two with about half the rows each (out of memory: try smaller)."""
    bounds = batch.cu_seqlens
    middle = int(torch.argmin((bounds[1:-1] - batch.tokens // 2).abs())) + 1  # never an empty half
    return _part(batch, 0, middle), _part(batch, middle, batch.copies)


def _part(batch: PackedBatch, first: int, last: int) -> PackedBatch:
    rows = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
    scored = slice(int(batch.cu_scored[first]), int(batch.cu_scored[last]))
    masked = (batch.masked_rows >= rows.start) & (batch.masked_rows < rows.stop)
    mine = (batch.target_rows >= scored.start) & (batch.target_rows < scored.stop)
    cu_seqlens = batch.cu_seqlens[first : last + 1] - rows.start
    cu_scored = batch.cu_scored[first : last + 1] - scored.start
    return PackedBatch(
        token_ids=batch.token_ids[rows],
        cu_seqlens=cu_seqlens,
        masked_rows=batch.masked_rows[masked] - rows.start,
        scored_rows=batch.scored_rows[scored] - rows.start,
        cu_scored=cu_scored,
        scored_positions=batch.scored_positions[scored],
        targets=batch.targets[mine],
        target_rows=batch.target_rows[mine] - scored.start,
        order=batch.order[mine],
        max_seqlen=int(cu_seqlens.diff().max()),
        max_scored=int(cu_scored.diff().max()),
    )


def distinct_copies(plan: MaskPlan) -> tuple[np.ndarray, np.ndarray]:
    """Finds copies that read the same tokens: they are one computation.

    Candidates that differ in one token share the copy that masks it, and single-token answers share one copy.

    Returns:
        ``first`` int64 ``[U]``, the first plan copy of each kind, and ``which`` int64 ``[C]``, each plan copy's kind.
    """
    seen: dict[bytes, int] = {}
    first: list[int] = []
    which = np.empty(plan.copies, np.int64)
    for copy, sequence in enumerate(plan.copy_sequences):
        ids = plan.sequences[sequence].astype(np.int32)
        ids[plan.masked_positions[plan.mask_offsets[copy] : plan.mask_offsets[copy + 1]]] = plan.mask_token_id
        kind = seen.setdefault(ids.tobytes(), len(first))
        if kind == len(first):
            first.append(copy)
        which[copy] = kind
    return np.array(first, np.int64), which


def unique_copies(plan: MaskPlan) -> int:
    """Number of copies that have to be computed."""
    return len(distinct_copies(plan)[0])


def pack(plan: MaskPlan, batch_tokens: int) -> list[PackedBatch]:
    """Packs a plan's distinct copies into batches of at most ``batch_tokens`` rows, longest copies first.

    A copy longer than the budget has a batch of its own. Every target of the plan is in exactly one batch.
    """
    first, which = distinct_copies(plan)
    if not len(first):
        return []
    sequences = plan.copy_sequences[first]  # [U]
    lengths = np.array([len(s) for s in plan.sequences], np.int64)[sequences]
    by_length = np.argsort(-lengths, kind="stable")
    # Targets grouped by the kind of copy that they are read from, so that a batch finds its own without a search.
    kinds = which[plan.score_copies]  # [N]
    target_order = np.argsort(kinds, kind="stable")
    target_bounds = np.concatenate([[0], np.cumsum(np.bincount(kinds, minlength=len(first)))])

    batches: list[PackedBatch] = []
    members: list[int] = []
    used = 0
    for kind in by_length:
        if members and used + lengths[kind] > batch_tokens:
            batches.append(_batch(plan, first, members, target_order, target_bounds))
            members, used = [], 0
        members.append(int(kind))
        used += int(lengths[kind])
    batches.append(_batch(plan, first, members, target_order, target_bounds))
    return batches


def _batch(
    plan: MaskPlan, first: np.ndarray, members: list[int], target_order: np.ndarray, target_bounds: np.ndarray
) -> PackedBatch:
    copies = first[members]
    sequences = [plan.sequences[s] for s in plan.copy_sequences[copies]]
    starts = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
    masked = [plan.masked_positions[plan.mask_offsets[c] : plan.mask_offsets[c + 1]] for c in copies]
    order = [target_order[target_bounds[m] : target_bounds[m + 1]] for m in members]
    # Where each target is read in the batch; several targets of one copy may share a row.
    target_positions = [plan.read_positions(o) + start for o, start in zip(order, starts)]
    scored_rows, target_rows = np.unique(np.concatenate(target_positions), return_inverse=True)
    cu_scored = np.searchsorted(scored_rows, starts)
    orders = np.concatenate(order)
    return PackedBatch(
        token_ids=torch.from_numpy(np.concatenate(sequences)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        masked_rows=torch.from_numpy(np.concatenate([m + start for m, start in zip(masked, starts)])),
        scored_rows=torch.from_numpy(scored_rows),
        cu_scored=torch.from_numpy(cu_scored.astype(np.int32)),
        scored_positions=torch.from_numpy(scored_rows - np.repeat(starts[:-1], np.diff(cu_scored))),
        targets=torch.from_numpy(plan.targets[orders]),
        target_rows=torch.from_numpy(target_rows.reshape(-1)),
        order=torch.from_numpy(orders),
        max_seqlen=int(np.diff(starts).max()),
        max_scored=int(np.diff(cu_scored).max()),
    )
