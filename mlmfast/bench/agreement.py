"""Whether two sides computed the same log-probabilities: without that no speed is shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlmfast.results import Generation

# float32: how far a log-probability may be from what it is compared with, times max(1, its size).
FLOAT32_BOUND = 1e-4
# bfloat16: how far from float32, as a multiple of plain torch's own distance, and beyond it: in the root mean square
# over tokens, and at the worst.
NARROW_FACTOR, NARROW_BOUND = 2.0, 1e-3
# And how far more a peer that rounds its log-probabilities to bfloat16, as a multiple of the largest: two spacings.
ROUNDING = 2.0**-7


@dataclass(frozen=True)
class Truth:
    """What sides are judged by that do not both compute in float32.

    Attributes:
        logprobs: of the same weights in float32.
        narrow: of plain torch in bfloat16.
    """

    logprobs: np.ndarray
    narrow: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Whether two sides computed the same, and by which measure.

    Attributes:
        max_abs_diff: between ours and the peer's.
        side: who is judged, the one nearer to failing: ``"mlmfast"`` or ``"the peer"``; ``"either"`` where the two are
            compared with each other.
        error: what is bounded: for float32 the largest relative distance, ``|a - b| / max(1, |b|)``; for bfloat16 the
            distance from float32, its root mean square or its largest.
        bound: what it may be.
    """

    max_abs_diff: float
    side: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # False for NaN


def agreement(
    ours: np.ndarray,
    theirs: np.ndarray,
    dtypes: tuple[str, str] = ("float32", "float32"),
    truth: Truth | None = None,
    *,
    rounds: bool = False,
) -> Agreement:
    """Compares log-probabilities ``[N]``: two float32 sides with each other, any others with the truth.

    So a peer that is wrong in bfloat16 does not widen its own bound.

    Args:
        ours, theirs: what was computed.
        dtypes: in what, ours and theirs.
        truth: needed unless both are float32.
        rounds: whether the peer rounds its log-probabilities to its dtype.
    """
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    apart = float(np.abs(ours - theirs).max())
    if dtypes == ("float32", "float32"):
        return Agreement(apart, "either", _relative(ours, theirs), FLOAT32_BOUND)
    if truth is None:
        raise ValueError("a side that computes in bfloat16 is judged by float32: pass the truth")
    judged = []
    for side, found, dtype in zip(("mlmfast", "the peer"), (ours, theirs), dtypes):
        if dtype == "float32":
            judged.append(Agreement(apart, side, _relative(found, truth.logprobs), FLOAT32_BOUND))
        else:
            rounding = ROUNDING * float(np.abs(truth.logprobs).max()) if rounds and side == "the peer" else 0.0
            for measure in (_root_mean_square, _worst):
                bound = NARROW_FACTOR * measure(truth.narrow - truth.logprobs) + NARROW_BOUND + rounding
                judged.append(Agreement(apart, side, measure(found - truth.logprobs), bound))
    wrong = [verdict for verdict in judged if not verdict.holds]
    return wrong[0] if wrong else max(judged, key=lambda verdict: verdict.error / verdict.bound)


def greedy_agreement(best: np.ndarray, given: np.ndarray) -> Agreement:
    """Whether one side's greedy choices are the other's, both in float32, but for candidates that rounding orders.

    Two sides that are each within the bound of a log-probability may disagree by twice that on which of two is larger.

    Args:
        best: the peer's largest log-probabilities, ``[N]``.
        given: the peer's log-probabilities of what we chose, ``[N]``.
    """
    best, given = best.astype(np.float64), given.astype(np.float64)
    return Agreement(_worst(best - given), "either", _relative(best, given), 2 * FLOAT32_BOUND)


def draft_agreement(drafted: Generation, plain: Generation, dtype: str, truth: Truth | None = None) -> Agreement:
    """Whether drafted tokens are the plain ones up to a choice that rounding decides.

    The log-probabilities are compared up to the first different token, that one included: after the same tokens both
    are the largest there is, so that they differ by no more than rounding, whichever it is.

    Args:
        drafted, plain: greedy generations of one prompt.
        dtype: of both.
        truth: needed for bfloat16, where each may be as far from float32 as plain torch may.
    """
    same = np.logical_and.accumulate(drafted.token_ids == plain.token_ids)
    shown = min(int(same.sum()) + 1, len(same))
    mine, theirs = (one.logprobs[:shown].astype(np.float64) for one in (drafted, plain))
    if dtype == "float32":
        return agreement(mine, theirs)
    if truth is None:
        raise ValueError("bfloat16 is judged by float32: pass the truth")
    worst = _worst(mine - theirs)
    return Agreement(worst, "either", worst, 2 * (NARROW_FACTOR * _worst(truth.narrow - truth.logprobs) + NARROW_BOUND))


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def _worst(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _relative(found: np.ndarray, right: np.ndarray) -> float:
    return float((np.abs(found - right) / np.maximum(1, np.abs(right))).max())
