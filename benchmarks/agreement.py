"""How two ways of scoring the same texts agree: errors in nats, correlations, and the choices that they make.

Everything takes plain arrays and is float64 throughout. A correlation is None where one of the two does not vary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs: float64 ``[n]``."""
    _, place, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place.reshape(-1)]


def pearson(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float | None:
    """The linear correlation of ``a [n]`` and ``b [n]``."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float | None:
    """The rank correlation of ``a [n]`` and ``b [n]``, with mean ranks for ties."""
    return pearson(ranks(a), ranks(b))


def errors(found: np.ndarray, right: np.ndarray) -> dict[str, float | int]:
    """Of ``found [n] - right [n]``: the mean (``bias``), and of its size the mean, 99th percentile and maximum.

    Raises:
        ValueError: nothing to compare.
    """
    if len(found) != len(right) or not len(found):
        raise ValueError(f"{len(found)} values against {len(right)}")
    off = found.astype(np.float64) - right.astype(np.float64)
    size = np.abs(off)
    return {
        "count": len(off),
        "bias": float(off.mean()),
        "mean": float(size.mean()),
        "p99": float(np.percentile(size, 99)),
        "max": float(size.max()),
    }


def choices(
    right: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray], where: np.ndarray | None = None
) -> dict[str, float | int | None]:
    """Pairs of texts: does the same one of the two score higher? A tie is a choice of its own.

    Args:
        right: totals of the good texts ``[P]`` and the bad ones, by the way that is compared with.
        found: the same by the other way.
        where: bool ``[P]``, the pairs to count; None for all.

    Returns:
        ``pairs``; ``equal``, the share with equal choices (None without pairs); ``lost`` and ``won``, how many went
        from right (the good text higher) to not right and the other way; ``widest``, the largest distance of two
        totals in ``right`` among pairs whose choice changed (0 if none did).
    """
    margin, other = right[0] - right[1], found[0] - found[1]
    if where is not None:
        margin, other = margin[where], other[where]
    changed = np.sign(margin) != np.sign(other)
    return {
        "pairs": len(margin),
        "equal": float(1 - changed.mean()) if len(margin) else None,
        "lost": int(((margin > 0) & (other <= 0)).sum()),
        "won": int(((margin <= 0) & (other > 0)).sum()),
        "widest": float(np.abs(margin[changed]).max(initial=0)),
    }
