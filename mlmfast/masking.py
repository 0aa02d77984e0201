"""Metric -> mask plan: which positions each copy of a sequence masks, and which it scores.

A *copy* is one masked version of one sequence. Everything here is integers: token ids in, positions out;
models and packing know the rest. The metrics, by the names the field uses:

========================  ==============================================================================
``original``              one mask a copy (Salazar et al. 2020, arXiv 1910.14659)
``within_word_l2r``       the target and the later pieces of its word (Kauf & Ivanova 2023, 2305.10588)
``window``                the target and the next ``window - 1`` positions (Samuel 2024, 2406.04823)
``global_l2r``            the target and everything to its right: a left-to-right likelihood
``unmasked``              one plain pass that masks nothing (ESM's wild-type marginals)
``strided``               **approximate**: ``stride`` copies a sequence, each masking and scoring every
                          ``stride``-th scored position
========================  ==============================================================================

Special tokens are never masked and never scored, wherever a metric reaches.

What is masked does not depend on the objective that a model was trained with; where a prediction is read does: at the
token's own position, or with masked-next-token prediction (Charpentier & Samuel 2024, arXiv 2410.24159) one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlmfast.errors import RequestError

# objective -> how many positions left of a token its prediction is read
OBJECTIVES = {"mlm": 0, "mntp": 1}
METRICS = ("original", "within_word_l2r", "window", "global_l2r", "unmasked", "strided")


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One tokenised text, special tokens included.

    Attributes:
        token_ids: int64 ``[L]``.
        special: bool ``[L]``, True at CLS, SEP, PAD, MASK and their like.
        scored: bool ``[L]``, the positions whose tokens are predicted; never a special one.
        word_ids: int64 ``[L]``, the same number for all pieces of a word, -1 at special tokens; None where the
            tokenizer has no notion of words.
    """

    token_ids: np.ndarray
    special: np.ndarray
    scored: np.ndarray
    word_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """All copies of a request.

    Attributes:
        sequences: token ids of each sequence, int64 ``[L_s]``.
        mask_token_id: what a masked position reads.
        copy_sequences: int64 ``[C]``, the sequence that each copy is a version of.
        mask_offsets: int64 ``[C + 1]``, bounds of each copy's run in ``masked_positions``.
        masked_positions: int64 ``[M]``, positions masked in each copy, ascending within a copy.
        score_offsets: int64 ``[S + 1]``, bounds of each sequence's run in the three arrays below.
        score_copies: int64 ``[N]``, the copy that a token is read from.
        score_positions: int64 ``[N]``, its position in the sequence.
        targets: int64 ``[N]``, its token id.
        lookback: how many positions left of a target its prediction is read, of :data:`OBJECTIVES`.

    Raises:
        RequestError: a target has nothing that far to its left.
    """

    sequences: list[np.ndarray]
    mask_token_id: int
    copy_sequences: np.ndarray
    mask_offsets: np.ndarray
    masked_positions: np.ndarray
    score_offsets: np.ndarray
    score_copies: np.ndarray
    score_positions: np.ndarray
    targets: np.ndarray
    lookback: int = 0

    def __post_init__(self) -> None:
        if (self.score_positions < self.lookback).any():  # it would be read in the copy before its own
            raise RequestError(f"a plan with lookback={self.lookback} scores a token at the start of its sequence")

    def read_positions(self, targets: np.ndarray) -> np.ndarray:
        """Where the predictions of some targets, int64 ``[n]`` places in the arrays above, are read, int64 ``[n]``."""
        return self.score_positions[targets] - self.lookback

    @property
    def copies(self) -> int:
        """Number of copies asked for, identical ones counted as often as they occur."""
        return len(self.copy_sequences)

    @property
    def tokens(self) -> int:
        """Rows of all those copies together."""
        lengths = np.array([len(sequence) for sequence in self.sequences], np.int64)
        return int(lengths[self.copy_sequences].sum()) if self.copies else 0

    def __repr__(self) -> str:
        return (
            f"MaskPlan(sequences={len(self.sequences)}, copies={self.copies}, tokens={self.tokens}, "
            f"scored={len(self.targets)})"
        )


def check_metric(metric: str, window: int = 3, stride: int = 8) -> None:
    """Refuses an unknown metric or an impossible setting of one with a :class:`RequestError`."""
    if metric not in METRICS:
        raise RequestError(f"metric {metric!r} is not known; choose one of {', '.join(METRICS)}")
    for name, value in (("window", window), ("stride", stride)):
        if not isinstance(value, (int, np.integer)):
            raise RequestError(f"{name}={value!r} is not a whole number")
    if metric == "window" and window < 1:
        raise RequestError(f"window={window} masks nothing; it counts the scored position too, so 1 is the least")
    if metric == "strided" and stride < 1:
        raise RequestError(f"stride={stride} makes no copies; 1 is the least")


def masks_of(
    sequence: TokenSequence, metric: str, *, window: int = 3, stride: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The copies of one sequence under a metric.

    Returns:
        ``masked`` bool ``[c, L]`` (a row a copy), ``copies`` int64 ``[n]`` and ``positions`` int64 ``[n]``:
        position ``positions[i]`` is scored in copy ``copies[i]``; positions ascend.

    Raises:
        RequestError: ``within_word_l2r`` on a sequence without word ids.
    """
    positions = np.flatnonzero(sequence.scored & ~sequence.special)
    every = np.arange(len(sequence))
    targets = positions[:, None]  # [n, 1] against `every` [L]
    copies = np.arange(len(positions))
    if metric == "original":
        masked = every == targets
    elif metric == "within_word_l2r":
        if sequence.word_ids is None:
            raise RequestError(
                "metric 'within_word_l2r' needs to know which pieces form a word, and this tokenizer does not tell "
                "(a slow tokenizer); load a fast one or use metric='original'"
            )
        same_word = sequence.word_ids == sequence.word_ids[targets]
        masked = (every == targets) | ((every > targets) & same_word)
    elif metric == "window":
        masked = (every >= targets) & (every < targets + window)
    elif metric == "global_l2r":
        masked = every >= targets
    elif metric == "unmasked":
        masked = np.zeros((min(1, len(positions)), len(sequence)), bool)
        copies = np.zeros(len(positions), np.int64)
    elif metric == "strided":
        copies = np.arange(len(positions)) % stride
        masked = np.zeros((min(stride, len(positions)), len(sequence)), bool)
        masked[copies, positions] = True
    else:
        raise RequestError(f"metric {metric!r} is not known; choose one of {', '.join(METRICS)}")
    return masked & ~sequence.special, copies, positions


def make_plan(
    sequences: Sequence[TokenSequence],
    mask_token_id: int,
    metric: str = "original",
    *,
    window: int = 3,
    stride: int = 8,
    lookback: int = 0,
) -> MaskPlan:
    """Plans every copy of every sequence.

    Args:
        sequences: what to score; one without a scored position gets no copy.
        mask_token_id: the mask's id.
        metric: one of :data:`METRICS`.
        window: positions masked by ``window``, the target among them.
        stride: copies a sequence of ``strided``.
        lookback: how many positions left of a token its prediction is read.

    Raises:
        RequestError: an unknown metric, or one that a sequence cannot serve, or a token with nothing to its left.
    """
    check_metric(metric, window, stride)
    copy_sequences: list[np.ndarray] = []
    mask_counts: list[np.ndarray] = []
    masked_positions: list[np.ndarray] = []
    score_counts = np.zeros(len(sequences) + 1, np.int64)
    score_copies: list[np.ndarray] = []
    score_positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    first_copy = 0
    for index, sequence in enumerate(sequences):
        masked, copies, positions = masks_of(sequence, metric, window=window, stride=stride)
        copy_sequences.append(np.full(len(masked), index, np.int64))
        mask_counts.append(masked.sum(1, dtype=np.int64))
        masked_positions.append(np.nonzero(masked)[1])
        score_counts[index + 1] = len(positions)
        score_copies.append(copies + first_copy)
        score_positions.append(positions)
        targets.append(sequence.token_ids[positions])
        first_copy += len(masked)
    return MaskPlan(
        sequences=[sequence.token_ids for sequence in sequences],
        mask_token_id=mask_token_id,
        copy_sequences=_joined(copy_sequences),
        mask_offsets=np.concatenate([[0], np.cumsum(_joined(mask_counts))]),
        masked_positions=_joined(masked_positions),
        score_offsets=np.cumsum(score_counts),
        score_copies=_joined(score_copies),
        score_positions=_joined(score_positions),
        targets=_joined(targets),
        lookback=lookback,
    )


def plan_of_copies(
    copies: Sequence[np.ndarray],
    positions: np.ndarray,
    targets: np.ndarray,
    mask_token_id: int,
    *,
    lookback: int = 0,
) -> MaskPlan:
    """The plan of copies that were masked elsewhere, each to predict one token.

    Args:
        copies: token ids of each, int64 ``[L_c]``, the mask's id where it is masked.
        positions: int64 ``[C]``, where each copy's prediction is read.
        targets: int64 ``[C]``, ids of what is predicted there.
        mask_token_id: the mask's id.
        lookback: how many positions left of a token the model's prediction of it is read.
    """
    masked = [np.flatnonzero(copy == mask_token_id) for copy in copies]
    every = np.arange(len(copies) + 1)
    return MaskPlan(
        sequences=list(copies),
        mask_token_id=mask_token_id,
        copy_sequences=every[:-1],
        mask_offsets=np.concatenate([[0], np.cumsum([len(places) for places in masked], dtype=np.int64)]),
        masked_positions=_joined(masked),
        score_offsets=every,
        score_copies=every[:-1],
        score_positions=positions + lookback,
        targets=targets,
        lookback=lookback,
    )


def copies_of(sequence: TokenSequence, metric: str, stride: int = 8) -> int:
    """How many copies a metric makes of a sequence."""
    scored = int((sequence.scored & ~sequence.special).sum())
    return min(scored, {"unmasked": 1, "strided": stride}.get(metric, scored))


def parted(sequence: TokenSequence, metric: str, rows: int) -> list[TokenSequence]:
    """A long sequence as several requests for some of its tokens each, so that the copies of one have ``rows`` rows.

    The copies are those of the whole request, so only metrics with a copy for each token are parted.
    """
    each = max(1, rows // max(1, len(sequence)))
    positions = np.flatnonzero(sequence.scored)
    if metric in ("unmasked", "strided") or len(positions) <= each:
        return [sequence]
    parts = []
    for start in range(0, len(positions), each):
        scored = np.zeros(len(sequence), bool)
        scored[positions[start : start + each]] = True
        parts.append(replace(sequence, scored=scored))
    return parts


def windows(sequence: TokenSequence, before: int, after: int, most: int) -> list[TokenSequence]:
    """A long text in windows of ``most`` tokens, each a request of its own that every scored token is in once.

    The last one reaches back to the length of the others; what it shares with the one before is context alone.

    Args:
        sequence: a whole text; one of at most ``most`` tokens is its own window.
        before, after: special tokens before and after the text, which each window gets too.
        most: more than those.
    """
    if len(sequence) <= most:
        return [sequence]
    end, room = len(sequence) - after, most - before - after
    found = []
    for start in range(before, end, room):
        stop = min(start + room, end)
        places = np.r_[:before, stop - room : stop, end : len(sequence)]
        scored = sequence.scored[places] & (places >= start)
        words = None if sequence.word_ids is None else sequence.word_ids[places]
        found.append(TokenSequence(sequence.token_ids[places], sequence.special[places], scored, words))
    return found


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64, copy=False)
