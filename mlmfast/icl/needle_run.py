"""The grid of needles, asked of one model: a record a needle, kept as they come, and cells summed up from them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mlmfast.icl.needle import DIGITS, Cell, Grid, digits_right, fitted
from mlmfast.icl.needle_models import Asked, count
from mlmfast.ledger import Ledger

# Tokens of the prompts that are asked for at once: what an interruption may cost, and what bounds a causal model's
# batch. A masked model packs them by its own budget.
BATCH_TOKENS = 1 << 14
CHANCE = 1 / (9 * 10 ** (DIGITS - 1))  # of the six digits without a leading zero, one
DIGIT_CHANCE = 1 / 10

Record = dict[str, Any]


def ask(
    asked: Asked,
    grid: Grid,
    haystack: Sequence[str],
    separator: str,
    ledger: Ledger,
    *,
    batch_tokens: int | None = None,
    advance: Callable[[int], Any] = lambda needles: None,
    finished: Callable[[int, float, int], Any] = lambda length, seconds, needles: None,
) -> None:
    """Asks for every needle of the grid that the ledger does not have.

    Args:
        asked: the model.
        grid: all that is asked.
        haystack: sentences.
        separator: stands for the template's line breaks.
        ledger: takes a record a needle: length, place, again, number, answer, right (the whole number), digits (how
            many are right), tokens, sentences, and truncated where a causal model's prompt lost its beginning.
        batch_tokens: tokens of the prompts that are asked for at once.
        advance: told how many needles have been asked for, those of earlier runs included.
        finished: told after each length: the length, seconds, and how many needles were asked for in them.

    Lengths beyond the model's limit are left out: see :func:`summary`.

    Raises:
        RequestError: a length is too short for the template, or the haystack for a length.
    """
    done = {(record["length"], record["place"], record["again"]) for record in ledger.records}

    def prompt_of(cell: Cell) -> Any:
        return fitted(cell, grid, haystack, separator, lambda text: count(asked, text), asked.name)

    lengths = [length for length in grid.lengths if asked.limit is None or length <= asked.limit]
    for length in lengths:  # what cannot be asked is said before anything is computed
        prompt_of(Cell(length, 0, 0))
    for length in lengths:
        todo = [cell for cell in grid.cells(length) if (length, cell.place, cell.again) not in done]
        advance(grid.placements * grid.repetitions - len(todo))
        started = time.perf_counter()
        size = max((batch_tokens or BATCH_TOKENS) // length, 1)
        for first in range(0, len(todo), size):
            prompts = [prompt_of(cell) for cell in todo[first : first + size]]
            answers = asked.answers([prompt.text for prompt in prompts])
            records = []
            for prompt, answer in zip(prompts, answers):
                cell, number = prompt.cell, prompt.number
                record: Record = {"length": length, "place": cell.place, "again": cell.again, "number": number}
                record |= {"answer": answer, "right": answer == number, "digits": digits_right(answer, number)}
                record |= {"tokens": prompt.tokens, "sentences": prompt.sentences}
                truncated = asked.truncated(prompt.tokens)
                records.append(record | ({"truncated": truncated} if truncated else {}))
            ledger.add(records)
            advance(len(records))
        finished(length, time.perf_counter() - started, len(todo))


def summary(asked: Asked, grid: Grid, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a length: shares of whole numbers and of digits that are right.

    Returns:
        Of each length: ``accuracy`` (one share a placement), ``mean``, ``digits``, ``needles``, ``tokens`` (mean length
        of a prompt as counted), ``truncated`` (mean of what was cut off); or ``too_long``, the reason why nothing was
        asked.
    """
    rows: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record["place"] < grid.placements and record["again"] < grid.repetitions:
            rows[record["length"]].append(record)
    found = []
    for length in grid.lengths:
        own = rows[length]
        if asked.limit is not None and length > asked.limit:
            reason = f"{asked.name} holds {asked.limit} tokens, {length} were asked for"
            found.append({"length": length, "needles": 0, "too_long": reason})
            continue
        by_place = [[r["right"] for r in own if r["place"] == place] for place in range(grid.placements)]
        row: dict[str, Any] = {"length": length, "needles": len(own)}
        row["accuracy"] = [_mean(cell) for cell in by_place]
        row["mean"] = _mean([r["right"] for r in own])
        row["digits"] = _mean([r["digits"] / DIGITS for r in own])
        row["tokens"] = _mean([r["tokens"] for r in own])
        row["truncated"] = _mean([r.get("truncated", 0) for r in own])
        found.append(row)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
