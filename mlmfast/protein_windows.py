"""A sequence that is longer than what is read at once -> windows of it, as ProteinGym (Notin et al. 2023) cuts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlmfast.masking import TokenSequence


@dataclass(frozen=True, eq=False)
class Residues:
    """A sequence as the model reads it.

    Attributes:
        text: as given, a letter a residue.
        sequence: its tokens, special ones included.
        positions: int64 ``[L]``, the token of each residue.
    """

    text: str
    sequence: TokenSequence
    positions: np.ndarray

    @property
    def token_ids(self) -> np.ndarray:
        """int64 ``[L]``, of the residues."""
        return self.sequence.token_ids[self.positions]


class Part(NamedTuple):
    """A window of a sequence.

    Attributes:
        owner: the sequence's place in the request.
        start: its first token there.
        sequence: the window's tokens, and which of them it predicts.
        weights: float64 ``[W]``, what a prediction at each token counts.
    """

    owner: int
    start: int
    sequence: TokenSequence
    weights: np.ndarray


def parts_of(one: Residues, owner: int, positions: np.ndarray, metric: str, window: int | None) -> list[Part]:
    """The windows that predict some tokens of a sequence: all of it, if that is not longer than ``window``.

    A masked token is read in the window around it; unmasked passes overlap, and their predictions are averaged.
    """
    length = len(one.sequence)
    if window is None or length <= window:
        return [_part(one, owner, 0, length, positions, np.ones(length))]
    if metric == "unmasked":
        weights = overlap_weights(window)
        return [_part(one, owner, start, window, positions, weights) for start in overlapping(length, window)]
    starts = np.array([window_around(position, length, window) for position in positions.tolist()], np.int64)
    own = np.ones(window)
    return [_part(one, owner, start, window, positions[starts == start], own) for start in np.unique(starts).tolist()]


def _part(one: Residues, owner: int, start: int, length: int, positions: np.ndarray, weights: np.ndarray) -> Part:
    """A window of some tokens, which scores those of ``positions`` that lie in it."""
    inside = slice(start, start + length)
    scored = np.zeros(len(one.sequence), bool)
    scored[positions] = True
    tokens = TokenSequence(one.sequence.token_ids[inside], one.sequence.special[inside], scored[inside])
    return Part(owner, start, tokens, weights)


def window_around(position: int, length: int, window: int) -> int:
    """Where ProteinGym's window of so many tokens begins that has a token in its middle, as far as the ends allow.

    ``get_optimal_window`` there; of an odd window, which it would read one token short, the middle lies left.
    """
    half = window // 2
    return min(max(0, position - half), length - window)


def overlapping(length: int, window: int) -> list[int]:
    """Where ProteinGym's overlapping windows begin: from both ends inwards by half a window, less one token.

    One more stands in the middle where the last two overlap by less than that.
    """
    step = max(1, window // 2 - 1)
    left, right = 0, length - window
    starts = [left, right]
    while left + window - 1 <= right:
        left, right = left + step, right - step
        starts += [left, right]
    if left + window - right < step:
        starts.append(length // 2 - window // 2)
    return starts


def overlap_weights(window: int) -> np.ndarray:
    """What a prediction counts by its place in an overlapping window, float64 ``[window]``.

    Sigmoid flanks of a quarter of the window. Its first and last token count in full, inner windows' too, as there.
    ProteinGym's numbers for 1024 tokens, scaled.
    """
    quarter, slope = window // 4, window / 64
    weights = np.ones(window)
    rise = np.arange(1, quarter + 1)
    weights[rise] = 1 / (1 + np.exp(-(rise - quarter / 2) / slope))
    fall = np.arange(window - 2 - quarter, window - 1)
    weights[fall] = 1 / (1 + np.exp((fall - (window - 2) + quarter / 2) / slope))
    return weights
