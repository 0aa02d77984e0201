"""Two outputs of ``mlmfast score`` on the same texts, joined row by row: how far they agree, and where they do not."""

from __future__ import annotations

import heapq
import importlib
import importlib.util
import io
import itertools
import math
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlmfast.errors import RequestError
from mlmfast.outputs import read_records
from mlmfast.parquet import storable
from mlmfast.writers import Record

FIGURES = (".png", ".svg")
# More points than this hide each other, and hexagons are counted instead.
POINTS = 5_000
EXCERPT = 60


@dataclass(frozen=True)
class Difference:
    """A row on which two outputs differ; PLLs in nats."""

    row: int
    text: str
    a: float
    b: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two outputs, A and B, side by side.

    Attributes:
        names: of A and B, as given.
        rows: rows of each.
        errors: how many have ``error`` in A, in B, in either; these are in none of the numbers below.
        plls: float64 ``[2, n]`` in nats, of A and of B, for the n rows that both have scored.
        means: float64 ``[2, n]``, the same over the number of the text's tokens, which may differ between the two.
        differing: the rows that differ most in PLL, most first; equal ones are none.
    """

    names: tuple[str, str]
    rows: int
    errors: tuple[int, int, int]
    plls: np.ndarray
    means: np.ndarray
    differing: list[Difference]

    def as_dict(self) -> dict[str, Any]:
        """All of it but the rows' own numbers, for JSON; what is not defined is None."""
        return {
            "a": self.names[0],
            "b": self.names[1],
            "rows": self.rows,
            "errors": dict(zip(("a", "b", "either"), self.errors)),
            "compared": self.plls.shape[1],
            "pll": {"sum": self.plls.sum(1).tolist()} | agreement(self.plls),
            "pll_per_token": agreement(self.means),
            "differing": [asdict(one) | {"difference": one.a - one.b} for one in self.differing],
        }


def compare(a: str, b: str, top: int = 10) -> Comparison:
    """Reads two outputs side by side, a row at a time; keeps 32 bytes of each.

    Args:
        a: a file or a folder, as :func:`mlmfast.outputs.read_records` takes it.
        b: the other.
        top: how many of the rows that differ most are kept.

    Raises:
        RequestError: they are not of the same texts in the same order, or not outputs of ``mlmfast score``.
    """
    columns = [array("d") for _ in range(4)]
    errors = [0, 0, 0]
    rows = 0
    most: list[tuple[float, int, Difference]] = []  # a heap; of two that differ alike the earlier row stays
    for rows, (left, right) in enumerate(_joined(a, b), 1):
        failed = ["error" in left, "error" in right]
        errors = [count + bool(more) for count, more in zip(errors, (*failed, any(failed)))]
        if any(failed):
            continue
        found = [*_scored(left, a, rows), *_scored(right, b, rows)]
        for column, value in zip(columns, (found[0], found[2], found[1], found[3])):
            column.append(value)
        one = Difference(rows, _excerpt(left["text"]), found[0], found[2])
        if one.a != one.b:
            heapq.heappush(most, (abs(one.a - one.b), -rows, one))
        if len(most) > top:
            heapq.heappop(most)
    values = np.array([np.frombuffer(column) if column else np.empty(0) for column in columns])
    differing = [one for *_, one in sorted(most, key=lambda entry: entry[:2], reverse=True)]
    return Comparison((a, b), rows, (errors[0], errors[1], errors[2]), values[:2], values[2:], differing)


def agreement(pair: np.ndarray) -> dict[str, Any]:
    """How far two columns agree.

    Args:
        pair: float64 ``[2, n]``.

    Returns:
        ``mean`` of each; ``mean_absolute_difference`` and ``max_absolute_difference``; ``pearson`` and
        ``spearman``; ``a_higher``, ``b_higher`` and ``equal``, counts. None where there are no rows, or for a
        correlation with a column of one value only.
    """
    count = pair.shape[1]
    apart = np.abs(pair[0] - pair[1])
    higher = [int((pair[0] > pair[1]).sum()), int((pair[0] < pair[1]).sum())]
    return {
        "mean": pair.mean(1).tolist() if count else [None, None],
        "mean_absolute_difference": float(apart.mean()) if count else None,
        "max_absolute_difference": float(apart.max()) if count else None,
        "pearson": correlation(pair[0], pair[1]),
        "spearman": correlation(places(pair[0]), places(pair[1])),
        "a_higher": higher[0],
        "b_higher": higher[1],
        "equal": count - sum(higher),
    }


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's r of two columns ``[n]``; None where a column does not vary."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    one, other = (column - column.mean() for column in (one, other))
    return float(np.clip(one / np.linalg.norm(one) @ (other / np.linalg.norm(other)), -1, 1))


def places(column: np.ndarray) -> np.ndarray:
    """Places ``[n]`` of values ``[n]`` in ascending order from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(column, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def check_figure(path: str, *others: str) -> None:
    """Refuses, before anything is read, a figure that could not be drawn or would be written over something else.

    Raises:
        RequestError: and the remedy.
    """
    if Path(path).suffix.lower() not in FIGURES:
        raise RequestError(f"--figure {path}: give a file whose name ends in {' or '.join(FIGURES)}")
    if Path(path).resolve() in [Path(other).resolve() for other in others]:
        raise RequestError(f"--figure {path} is an input too: give the figure another name")
    if not Path(path).resolve().parent.is_dir():
        raise RequestError(f"cannot write {path}: there is no folder {Path(path).parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError('--figure needs matplotlib: pip install "mlmfast[eval]"')


def draw(found: Comparison, form: str) -> bytes:
    """A scatter figure of the PLLs a token of A and B, with the diagonal; the same comparison is the same bytes.

    Args:
        form: ``"png"`` or ``"svg"``.

    Raises:
        RequestError: no row was scored by both.
    """
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    a, b = found.means
    if not len(a):
        raise RequestError("no row is scored in both outputs: there is nothing to draw")
    figure = figures.Figure(figsize=(6, 5.6), layout="constrained")  # draws without a screen
    axis = figure.subplots()
    low, high = float(found.means.min()), float(found.means.max())
    margin = 0.04 * (high - low) or 0.5
    ends = (low - margin, high + margin)
    if len(a) > POINTS:
        drawn = axis.hexbin(a, b, gridsize=60, extent=(*ends, *ends), bins="log", mincnt=1, cmap="viridis_r")
        figure.colorbar(drawn, ax=axis, label="rows", shrink=0.8)
    else:
        axis.scatter(a, b, s=12, alpha=0.6, linewidths=0)
    axis.plot(ends, ends, color="0.4", linewidth=1, linestyle="--")
    axis.set(xlim=ends, ylim=ends, aspect="equal")
    # A name is no formula, whatever dollars are in it.
    axis.set_xlabel(f"PLL a token, nats: {found.names[0]}", parse_math=False)
    axis.set_ylabel(f"PLL a token, nats: {found.names[1]}", parse_math=False)
    told = found.as_dict()["pll_per_token"]
    numbers = [f"{name.title()} {told[name]:.3f}" for name in ("pearson", "spearman") if told[name] is not None]
    axis.set_title(", ".join([f"{len(a):,} rows", *numbers]), fontsize="medium")
    content = io.BytesIO()
    metadata = {"Software": None} if form == "png" else {"Date": None}
    with matplotlib.rc_context({"svg.hashsalt": "mlmfast"}):
        figure.savefig(content, format=form, dpi=200, metadata=metadata)
    return content.getvalue()


def _joined(a: str, b: str) -> Iterator[tuple[Record, Record]]:
    """The records of both, row by row.

    Raises:
        RequestError: a row is not the same text in both, or one has more rows.
    """
    remedy = "compare two outputs of the same input"
    for row, (left, right) in enumerate(itertools.zip_longest(read_records(a), read_records(b)), 1):
        for record, name, other in ((left, a, b), (right, b, a)):
            if record is None:
                raise RequestError(f"{name} has {row - 1} rows and {other} has more: {remedy}")
        for record, name in ((left, a), (right, b)):
            if not isinstance(record.get("text", 0), str | None):
                raise RequestError(f"{name}: row {row} has no 'text': give an output of mlmfast score")
        # Half a surrogate pair is an escape in Parquet, and may be itself in JSON Lines.
        one, other = (storable(record)["text"] for record in (left, right))
        if one != other:
            one, other = one or "", other or ""
            apart = (place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1])
            place = next(apart, min(len(one), len(other)))
            texts = (_excerpt(text, max(0, place - EXCERPT // 2)) for text in (one, other))
            shown = " and ".join(f"{text!r} in {name}" for text, name in zip(texts, (a, b)))
            raise RequestError(f"row {row} differs at character {place + 1}: {shown}; {remedy}")
        yield left, right


def _scored(record: Record, name: str, row: int) -> tuple[float, float]:
    """The PLL of a record, and the same a token."""
    pll, tokens = record.get("pll"), record.get("tokens")
    if not isinstance(pll, (int, float)) or not math.isfinite(pll) or not isinstance(tokens, list) or not tokens:
        raise RequestError(f"{name}: row {row} has no 'pll' and 'tokens': give an output of mlmfast score")
    return float(pll), pll / len(tokens)


def _excerpt(text: str | None, start: int = 0) -> str:
    text = "" if text is None else text[start:]
    return "…" * (start > 0) + (text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…")
