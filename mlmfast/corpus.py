"""Corpora: rows in, records of scores or continuations out, a bounded window of rows at a time."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlmfast
from mlmfast.budget import out_of_memory
from mlmfast.errors import MLMFastError, RequestError, TextError
from mlmfast.parquet import check_installed
from mlmfast.readers import Row
from mlmfast.results import Generation, Score, generic_mark
from mlmfast.shards import FORMATS, Compute, Shard, ShardFolder
from mlmfast.tokenization import EncodedText
from mlmfast.writers import FileSink, Record, Sink, StreamSink, Tally

if TYPE_CHECKING:
    from mlmfast.model import MaskedLM

# A window is scored in one call: large enough to fill batches with copies of like length, and bounded in what its
# plan holds, which grows with the square of a text's length (a copy a token, a row a token and copy).
WINDOW_ROWS = 1024
WINDOW_COST = 1 << 22
# Continuations take a pass a token, so what is lost by an interruption is kept small.
GENERATED_ROWS = 64

# What is computed to see whether a model computes anything, before any row has been.
PROBE = "A"
# Of a row at fault, in its error.
UNCOMPUTED = "cannot be computed"

# Shards -> their lines of the manifest, once their files are there.
Engine = Callable[[Iterator[Shard]], Iterator[Record]]


def write_rows(
    rows: Iterable[Row],
    sink: Sink,
    compute: Compute,
    advance: Callable[[Tally], None] = lambda tally: None,
    most: int | None = None,
    passing: Callable[[list[Record]], None] | None = None,
) -> Tally:
    """Writes a record a row, in order.

    Args:
        rows: as :func:`mlmfast.readers.read_rows` yields them; may be longer than memory.
        sink: where the records go; rows that it keeps from an earlier run are not computed again.
        compute: windows -> each with its records: :meth:`Job.compute`, or :func:`one_by_one`. A row that cannot be
            computed is no error but a record with ``error``.
        advance: told the counts of every window.
        most: rows of a window; None for :data:`WINDOW_ROWS`.
        passing: is given the records that are written, too.

    Returns:
        The sink's counts.

    Raises:
        RequestError: the options are wrong.
    """

    def missing() -> Iterator[list[Row]]:
        for window in windows(rows, most):
            found = sink.keeps(window)
            if found is None:
                yield window
            else:
                advance(Tally.of(found, kept=True))

    for window, found in compute(missing()):
        sink.write(window, found)
        advance(Tally.of(found))
        if passing is not None:
            passing(found)
    sink.finish()
    return sink.tally


def write_shards(
    shards: Iterable[Shard], folder: ShardFolder, engine: Engine, advance: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """Writes the shards that an earlier run has not written, and the manifest.

    Args:
        shards: of :func:`mlmfast.shards.shards_of`.
        folder: where they go.
        engine: computes them, here or in other processes, and yields each one's line of the manifest, in any order.
        advance: told the counts of the shards that an earlier run has written; of the others the engine tells.

    Returns:
        The folder's counts.

    Raises:
        RequestError: the options are wrong, or the input is not the one that the folder was begun with.
    """

    def missing() -> Iterator[Shard]:
        for shard in shards:
            entry = folder.kept(shard)
            if entry is None:
                yield shard
            else:
                advance(Tally.of_entry(entry, kept=True))

    for entry in engine(missing()):
        folder.add(entry)
    folder.finish()
    return folder.tally


def open_sink(
    output: str, request: dict[str, Any], shard_rows: int, stdout: BinaryIO, format: str | None = None
) -> Sink | ShardFolder:
    """Where an ``--output`` goes: ``-``, a file, or a folder (an existing one, or a name that ends in ``/``).

    Args:
        request: all that decides what the records are; only a run of an equal request is continued.
        shard_rows: of a folder.
        stdout: where ``-`` goes.
        format: of a folder's files: ``jsonl`` or ``parquet``; None for JSON Lines.

    Raises:
        RequestError: it cannot be written there. No record has been written then.
    """
    if format not in (None, *FORMATS):
        raise RequestError(f"--output-format {format} is not known; choose {' or '.join(FORMATS)}")
    if output != "-" and (output.endswith(("/", os.sep)) or Path(output).is_dir()):
        if format == "parquet":
            check_installed()
        return ShardFolder(Path(output), request, shard_rows, format or "jsonl")
    if format == "parquet" or output.endswith(".parquet"):
        raise RequestError("Parquet is written into folders: end --output in / and add --output-format parquet")
    if output == "-":
        return StreamSink(stdout)
    path = Path(output)
    if not path.resolve().parent.is_dir():
        raise RequestError(f"cannot write {output}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():  # a device or a named pipe: nothing to rename onto
        return StreamSink(path.open("wb"))
    return FileSink(path.resolve(), request)


def windows(rows: Iterable[Row], most: int | None = None) -> Iterator[list[Row]]:
    """Cuts rows into windows, by the rows alone, so that a run that continues another cuts them as that one did.

    Args:
        most: rows of a window; None for :data:`WINDOW_ROWS`.
    """
    most = WINDOW_ROWS if most is None else most
    window: list[Row] = []
    cost = 0
    for row in rows:
        window.append(row)
        cost += (len(row.text or "") // 3 + 2) ** 2
        if len(window) == most or cost >= WINDOW_COST:
            yield window
            window, cost = [], 0
    if window:
        yield window


@dataclass(frozen=True)
class Job:
    """What is done with every row, so that another process can do it, too.

    Attributes:
        model: a name or a folder.
        loading: arguments of :func:`mlmfast.load`.
        options: of :meth:`MaskedLM.score`, or of :meth:`MaskedLM.generate`, ``seed`` among them.
        generates: which of the two.
        ahead: rows may be read before those that were read are written; not where somebody types them.
    """

    model: str
    loading: Mapping[str, Any]
    options: Mapping[str, Any]
    generates: bool = False
    ahead: bool = True

    @property
    def most(self) -> int:
        """Rows of a window."""
        return GENERATED_ROWS if self.generates else WINDOW_ROWS

    @property
    def columns(self) -> dict[str, str]:
        """Of Parquet."""
        common = {"tokens": "list<string>", "logprobs": "list<float>"}
        if self.generates:
            columns = {"text": "string", "continuation": "string", **common, "stopped": "string", "cache": "string"}
        else:
            columns = {"text": "string", "pll": "double", **common, "perplexity": "double"}
            columns |= {"ranks": "list<int64>"} if self.options.get("ranks") else {}
        return columns | {"generic": "bool", "error": "string"}

    def load(self) -> MaskedLM:
        return mlmfast.load(self.model, **self.loading)

    def ready(self) -> tuple[MaskedLM, Compute]:
        """The model, and what computes windows with it."""
        lm = self.load()
        return lm, self.compute(lm)

    def compute(self, lm: MaskedLM) -> Compute:
        """Windows -> each with its records; texts are tokenised while the window before them is computed."""
        if self.generates:
            return one_by_one(partial(generate_window, lm, self.options))
        return scored(lm, self.options, self.ahead)


def one_by_one(records_of: Callable[[Sequence[Row]], list[Record]]) -> Compute:
    """What computes windows in turn; a row that fails costs no other."""
    isolated = Isolation(records_of)
    return lambda windows: ((window, isolated(window)) for window in windows)


def scored(lm: MaskedLM, options: Mapping[str, Any], ahead: bool = True) -> Compute:
    """The same for :func:`score_window`, each window read and tokenised while the one before it is computed."""
    isolated = Isolation(partial(score_window, lm, options))

    def encode(window: list[Row]) -> list[EncodedText | TextError] | None:
        try:
            return lm.encode(texts_of(window), truncation=options.get("truncation"))
        except BaseException as error:
            if not is_rows_fault(error):
                raise
            return None  # whose row it is shows when they are computed one by one

    def compute(windows: Iterator[list[Row]]) -> Iterator[tuple[list[Row], list[Record]]]:
        with ThreadPoolExecutor(1, "tokenizer") as pool:
            waiting: deque[tuple[list[Row], Future[Any]]] = deque()
            for window in chain(windows, [None]):
                if window is not None:
                    waiting.append((window, pool.submit(encode, window)))
                if waiting and (len(waiting) > ahead or window is None):
                    first, encoded = waiting.popleft()
                    yield first, isolated(first, encoded.result())

    return compute


class Isolation:
    """Windows -> their records, one window after the other.

    If one fails, its halves are computed, down to the row that is at fault, which gets ``error``; unless a row that has
    been computed before fails now, too: then no row is at fault.

    Args:
        records_of: computes some rows together; further arguments are those of the whole window.
    """

    def __init__(self, records_of: Callable[..., list[Record]]) -> None:
        self._records_of = records_of
        self._good = Row(0, PROBE)

    def __call__(self, window: Sequence[Row], *prepared: Any) -> list[Record]:
        """
        Raises:
            MLMFastError: there is not enough memory even for a row that there was enough for.
            Exception: what the window failed with, where no row is at fault.
        """
        try:
            found = self._records_of(window, *prepared)
        except BaseException as error:
            failure = _of_a_row(error)
            self._check(failure)
            found = self._apart(window, failure)
        good = (row for row, record in zip(window, found) if "error" not in record)
        self._good = next(good, self._good)
        return found

    def _check(self, failure: BaseException) -> None:
        """Raises what a window failed with if a row fails, too, that should not."""
        try:
            self._records_of([self._good])
        except BaseException as error:
            _of_a_row(error)
            if is_memory(failure):
                raise MLMFastError(
                    "there is not enough memory for a single row: free some, or take a smaller model, or fewer "
                    "--workers"
                ) from failure
            raise failure from None

    def _apart(self, window: Sequence[Row], failure: BaseException) -> list[Record]:
        """The records of a window that failed as a whole."""
        if len(window) == 1:
            text, kind = window[0].text, type(failure).__name__
            reason = "there is not enough memory" if is_memory(failure) else f"{kind}: {failure}"
            return [{"text": text, "error": f"{window[0].place} {UNCOMPUTED}: {reason}"}]
        found: list[Record] = []
        for half in (window[: len(window) // 2], window[len(window) // 2 :]):
            try:
                found += self._records_of(half)
                continue
            except BaseException as error:
                failure = _of_a_row(error)
            found += self._apart(half, failure)
        return found


def _of_a_row(error: BaseException) -> BaseException:
    """The error, if a row may be at fault; else it is raised."""
    if not is_rows_fault(error):
        raise error
    return error.with_traceback(None) if is_memory(error) else error  # frames would hold what the halves need


def is_rows_fault(error: BaseException) -> bool:
    """Whether another row might do better: not where the request is wrong, nor after an error of the device."""
    if isinstance(error, (MLMFastError, OSError)) or re.search("(CUDA|HIP) error", str(error)):
        return False
    # What a tokenizer's own code panics with is no Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_memory(error: BaseException) -> bool:
    return isinstance(error, (RuntimeError, MemoryError)) and out_of_memory(error)


def score_window(
    lm: MaskedLM, options: Mapping[str, Any], window: Sequence[Row], encoded: Sequence[Any] | None = None
) -> list[Record]:
    """The records of some rows, scored in one call.

    Args:
        options: of :meth:`MaskedLM.score`.
        encoded: :meth:`MaskedLM.encode` of :func:`texts_of` these rows, where that has been done.
    """

    def compute(texts: list[str]) -> Sequence[Any]:
        if encoded is None:
            return lm.score(texts, on_error="return", progress=False, **options)
        return lm.score(encoded, on_error="return", progress=False, **{**options, "truncation": None})

    return records(window, compute, record_of)


def texts_of(window: Sequence[Row]) -> list[str]:
    """Of those rows that could be read."""
    return [row.text for row in window if row.error is None and row.text is not None]


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
    texts = texts_of(window)
    outcomes = iter(compute(texts) if texts else [])
    return [
        {"text": row.text, "error": row.error} if row.error is not None else record(row, next(outcomes))
        for row in window
    ]


def refused(row: Row, error: TextError) -> Record:
    """What is written of a row that cannot be computed."""
    return {"text": row.text, "error": f"{row.place} {error.reason}"}


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
