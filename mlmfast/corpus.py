"""Corpora: rows in, records of scores or continuations out, a bounded window of rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlmfast.errors import RequestError, TextError
from mlmfast.readers import Row
from mlmfast.results import Generation, Score, generic_mark
from mlmfast.shards import FolderSink
from mlmfast.writers import FileSink, Record, Sink, StreamSink, Tally

if TYPE_CHECKING:
    from mlmfast.model import MaskedLM

# A window is scored in one call: large enough to fill batches with copies of like length, and bounded in what its
# plan holds, which grows with the square of a text's length (a copy a token, a row a token and copy).
WINDOW_ROWS = 1024
WINDOW_COST = 1 << 22
# Continuations take a pass a token, so what is lost by an interruption is kept small.
GENERATED_ROWS = 64


def write_rows(
    rows: Iterable[Row],
    sink: Sink,
    records_of: Callable[[Sequence[Row]], list[Record]],
    on_window: Callable[[Tally], None] = lambda tally: None,
    most: int | None = None,
) -> Tally:
    """Writes a record a row, in order.

    Args:
        rows: as :func:`mlmfast.readers.read_rows` yields them; may be longer than memory.
        sink: where the records go; rows that it keeps from an earlier run are not computed again.
        records_of: the records of a window, :func:`score_window` or :func:`generate_window`. A row that cannot be
            computed is no error but a record with ``error``.
        on_window: called with the counts so far after every window.
        most: rows of a window; None for :data:`WINDOW_ROWS`.

    Returns:
        The sink's counts.

    Raises:
        RequestError: the options are wrong.
    """
    for window in windows(rows, sink.shard_rows, most):
        if not sink.keeps(window):
            sink.write(window, records_of(window))
        on_window(sink.tally)
    sink.finish()
    return sink.tally


def open_sink(output: str, request: dict[str, Any], shard_rows: int, stdout: BinaryIO) -> Sink:
    """Where an ``--output`` goes: ``-``, a file, or a folder (an existing one, or a name that ends in ``/``).

    Args:
        request: all that decides what the records are; only a run of an equal request is continued.
        stdout: where ``-`` goes.

    Raises:
        RequestError: it cannot be written there. Nothing has been created then.
    """
    if output == "-":
        return StreamSink(stdout)
    path = Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir():
        return FolderSink(path, request, shard_rows)
    if not path.resolve().parent.is_dir():
        raise RequestError(f"cannot write {output}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():  # a device or a named pipe: nothing to rename onto
        return StreamSink(path.open("wb"))
    return FileSink(path.resolve(), request)


def windows(rows: Iterable[Row], shard_rows: int | None = None, most: int | None = None) -> Iterator[list[Row]]:
    """Cuts rows into windows, by the rows alone, so that a run that continues another cuts them as that one did.

    Args:
        shard_rows: a window ends at every multiple of this, None for nowhere.
        most: rows of a window; None for :data:`WINDOW_ROWS`.
    """
    most = WINDOW_ROWS if most is None else most
    window: list[Row] = []
    cost = 0
    for row in rows:
        window.append(row)
        cost += (len(row.text or "") // 3 + 2) ** 2
        at_bound = shard_rows is not None and (row.index + 1) % shard_rows == 0
        if at_bound or len(window) == most or cost >= WINDOW_COST:
            yield window
            window, cost = [], 0
    if window:
        yield window


def score_window(lm: MaskedLM, options: Mapping[str, Any], window: Sequence[Row]) -> list[Record]:
    """The records of some rows, scored in one call; ``options`` of :meth:`MaskedLM.score`."""
    return records(window, lambda texts: lm.score(texts, on_error="return", progress=False, **options), record_of)


def generate_window(lm: MaskedLM, options: Mapping[str, Any], window: Sequence[Row]) -> list[Record]:
    """The records of some rows, continued in one call; ``options`` of :meth:`MaskedLM.generate`, ``seed`` among them.

    Raises:
        KeyboardInterrupt: it was interrupted; half a continuation is no record.
    """
    # A row's own, so that a sample does not depend on how rows fall into windows.
    seeds = [options["seed"] + row.index for row in window if row.error is None and row.text is not None]
    found = records(
        window,
        lambda texts: lm.generate(texts, on_error="return", progress=False, **{**options, "seed": seeds}),
        continuation_of,
    )
    if any(record.get("stopped") == "interrupted" for record in found):
        raise KeyboardInterrupt
    return found


def records(
    window: Sequence[Row],
    compute: Callable[[list[str]], Sequence[Any]],
    record: Callable[[Row, Any], Record],
) -> list[Record]:
    """The records of rows that could be read, computed in one call, and of those that could not."""
    texts = [row.text for row in window if row.error is None and row.text is not None]
    outcomes = iter(compute(texts) if texts else [])
    return [
        {"text": row.text, "error": row.error} if row.error is not None else record(row, next(outcomes))
        for row in window
    ]


def refused(row: Row, error: TextError) -> Record:
    """What is written of a row that cannot be computed."""
    return {"text": row.text, "error": f"row {row.index + 1} {error.reason}"}


def continuation_of(row: Row, outcome: Generation | TextError) -> Record:
    """What is written of a row: how it was continued, or ``error`` and why it was not."""
    if isinstance(outcome, TextError):
        return refused(row, outcome)
    return {
        "text": row.text,
        "continuation": outcome.text,
        "tokens": outcome.tokens,
        "logprobs": [float(str(x)) for x in outcome.logprobs],
        "stopped": outcome.stopped,
        "cache": outcome.cache,
        **generic_mark(outcome),
    }


def record_of(row: Row, outcome: Score | TextError) -> Record:
    """What is written of a row: its score, or ``error`` and why there is none.

    ``logprobs`` are float32 in the fewest digits that read back as the same float32; ``pll`` is their sum in float64.
    ``perplexity`` is null where it overflows, for JSON has no infinity.
    """
    if isinstance(outcome, TextError):
        return refused(row, outcome)
    record: Record = {
        "text": row.text,
        "pll": outcome.total,
        "tokens": outcome.tokens,
        "logprobs": [float(str(x)) for x in outcome.logprobs],
        "perplexity": outcome.perplexity if math.isfinite(outcome.perplexity) else None,
    }
    if outcome.ranks is not None:
        record["ranks"] = [int(rank) for rank in outcome.ranks]
    return record | generic_mark(outcome)
