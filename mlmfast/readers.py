"""A file or a stream -> its rows: one :class:`Row` a text, readable or not, in order, a few at a time.

A row that cannot be read becomes a row with a reason, and the rows around it are read all the same. Text is kept
exactly: only the line end is taken off, and a byte order mark at the start of the input.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mlmfast.errors import RequestError

FORMATS = ("auto", "text", "jsonl", "csv", "tsv", "parquet")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

# No model reads a text this long; without a bound, one missing line end or quote would load the whole file.
MAX_ROW_CHARACTERS = 1 << 24
# How many rows may fail from the start before the request, not the rows, is taken to be wrong.
LEAD_ROWS = 1000

DAMAGE = (EOFError, zlib.error, lzma.LZMAError)
# TextIOWrapper's surrogateescape turns byte 0xXY that is not UTF-8 into U+DCXY, which UTF-8 itself never yields.
NOT_UTF8 = re.compile("[\udc80-\udcff]")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        index: its place, counted from 0.
        text: its text exactly as it stands; None where it could not be read.
        error: why it cannot be scored; None if nothing speaks against it yet. A row's number in a message counts
            from 1, as editors number lines.
        input: the file that it is from, where there are several.
    """

    index: int
    text: str | None
    error: str | None = None
    input: str | None = None

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"row {self.index + 1}" + (f" of {self.input}" if self.input else "")

    @property
    def identity(self) -> list[Any]:
        """What its record depends on, in JSON's types; but not the reason why it cannot be scored, only that."""
        return [self.index, self.text, self.error is not None]

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether this may be its record."""
        return "text" in record and record["text"] == self.text


@dataclass(frozen=True)
class Malformed:
    """What stands in the place of a row that could not be read; ``text`` where it is known all the same."""

    reason: str
    text: str | None = None


class _RowTooLong(Exception):
    """The record that is being read has passed MAX_ROW_CHARACTERS."""


class Meter:
    """How far some files have been read, and so how many rows there may be.

    Args:
        sources: the files; their sizes are those of the compressed ones.

    Attributes:
        rows: so many were read.
    """

    def __init__(self, sources: Iterable[str]) -> None:
        self.rows = 0
        self._sizes = {source: Path(source).stat().st_size for source in sources if Path(source).is_file()}
        self._done = 0
        self._reading: tuple[str, Callable[[], float]] | None = None

    def begin(self, source: str, share: Callable[[], float]) -> None:
        """A file is read now, of which ``share`` tells how much has been, from 0 to 1; no pipe can tell."""
        self.end()
        if source in self._sizes:
            self._reading = (source, share)

    def end(self) -> None:
        if self._reading is not None:
            self._done += self._sizes[self._reading[0]]
        self._reading = None

    def total(self) -> int | None:
        """How many rows there would be if all were as long as those seen; None before anything can be said."""
        read: float = self._done
        if self._reading is not None:
            read += self._reading[1]() * self._sizes[self._reading[0]]
        return round(self.rows * sum(self._sizes.values()) / read) if read and self.rows else None


def read_rows(
    source: str,
    *,
    format: str = "auto",
    field: str = "text",
    meter: Meter | None = None,
    name: str | None = None,
    lenient: bool = False,
) -> Iterator[Row]:
    """The rows of a file or of standard input.

    Args:
        source: a path, or ``"-"`` for standard input.
        format: one of :data:`FORMATS`; ``"auto"`` goes by the suffix (``.gz``, ``.bz2``, ``.xz`` after it are
            decompressed) and takes standard input and unknown suffixes for text, a line each.
        field: the column (CSV, Parquet) or key (JSON Lines) that holds the text.
        meter: is told what is read.
        name: what rows and their errors call the file, where there are several; None for nothing.
        lenient: a file in which nothing can be read is a row with ``error``; but where the machine is at fault, that is
            raised all the same.

    Blank lines of JSON Lines and CSV are no rows; a blank line of a text is an empty row. A compressed file that turns
    out damaged ends with a row that says so.

    Raises:
        RequestError: before the first row, if the source cannot be read as asked: no such file, no such column, a
            column of a text, no pyarrow for Parquet, or (unless ``lenient``) not one of the first rows can be read.
    """
    rows = _rows(source, format, field, meter, name, lenient)
    if lenient:
        return rows
    lead = []
    for row in itertools.islice(rows, LEAD_ROWS):
        lead.append(row)
        if row.text is not None:
            break
    if lead and all(row.text is None for row in lead):
        shown = "standard input" if source == "-" else source
        raise RequestError(f"{shown}: no row can be read: {lead[0].error}")
    return itertools.chain(lead, rows)


def format_of(source: str, format: str = "auto") -> str:
    """The format a source is read in, one of :data:`FORMATS` but ``"auto"``.

    Raises:
        RequestError: the format is unknown.
    """
    if format not in FORMATS:
        raise RequestError(f"format {format!r} is not known; choose one of {', '.join(FORMATS)}")
    if format != "auto":
        return format
    path = Path(source)
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSIONS else path.suffix
    return SUFFIXES.get(suffix.lower(), "text")


def _rows(source: str, format: str, field: str, meter: Meter | None, name: str | None, lenient: bool) -> Iterator[Row]:
    kind = format_of(source, format)
    meter = meter or Meter([])
    values = (_parquet_values if kind == "parquet" else _text_values)(source, kind, field, meter)
    for index in itertools.count():
        try:
            value = next(values, None)
        except RequestError as error:
            if not lenient or isinstance(error.__cause__, OSError):
                raise
            value = Malformed(f"cannot be read: {str(error).replace(source, name or source)}")
            values = iter(())
        except Exception as error:
            if not is_damage(error):
                if isinstance(error, OSError):
                    raise RequestError(f"cannot read {source}: {error.strerror or error}") from error
                raise
            if index == 0 and not lenient:
                raise RequestError(f"cannot read {source}: {error}") from error
            # The file cannot be read past here; what came before it is scored, and this row says what is missing.
            value = Malformed(f"and all after it cannot be read, {name or 'the file'} is damaged: {error}")
            values = iter(())
        if value is None:
            meter.end()
            return
        meter.rows += 1
        if isinstance(value, str):
            value = _checked(value)
        row = Row(index, value if isinstance(value, str) else value.text, None, name)
        yield row if isinstance(value, str) else replace(row, error=f"{row.place} {value.reason}")


def is_damage(error: Exception) -> bool:
    """Whether the content is at fault, not the machine: bz2 and gzip raise an OSError that has no errno for it."""
    return isinstance(error, DAMAGE) or (isinstance(error, OSError) and error.errno is None)


def _checked(text: str) -> str | Malformed:
    """The text, or why it is none: UTF-8 and so every tokenizer has no place for half a surrogate pair."""
    found = SURROGATE.search(text)
    if found is None:
        return text
    return Malformed(f"holds U+{ord(found[0]):04X}, half of a surrogate pair, which is no character", text)


def _not_utf8(line: str) -> Malformed | None:
    found = NOT_UTF8.search(line)
    if found is None:
        return None
    return Malformed(f"is not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} at character {found.start() + 1}")


# ---- text, JSON Lines, CSV


@contextmanager
def opened(source: str, newline: str | None, meter: Meter | None = None) -> Iterator[TextIO]:
    """A source as text; bytes that are not UTF-8 stand in it as lone surrogates."""
    if source == "-":
        stream = io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", "surrogateescape", newline)
        try:
            yield stream
        finally:
            stream.detach()  # else closing the wrapper closes standard input
        return
    with open(source, "rb") as file:
        if meter is not None:
            size = max(os.fstat(file.fileno()).st_size, 1)
            meter.begin(source, lambda: 1.0 if file.closed else file.tell() / size)
        opener = COMPRESSIONS.get(Path(source).suffix.lower())
        raw: BinaryIO = file if opener is None else opener(file, "rb")
        with io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline) as stream:
            yield stream


def _text_values(source: str, kind: str, field: str, meter: Meter) -> Iterator[str | Malformed]:
    if kind == "text" and field != "text":
        raise RequestError(
            f"{'standard input' if source == '-' else source} is read as text, a line each, and has no field "
            f"{field!r}: say with --format what it is, or leave --field out"
        )
    # csv wants the line ends inside quotes as they are.
    with opened(source, "" if kind in ("csv", "tsv") else None, meter) as stream:
        if kind == "text":
            yield from _line_values(stream)
        elif kind == "jsonl":
            yield from (_json_value(record, field) for record in _json_objects(stream))
        else:
            yield from _csv_values(stream, source, field, "\t" if kind == "tsv" else ",")


def _line_values(stream: TextIO) -> Iterator[str | Malformed]:
    while line := stream.readline(MAX_ROW_CHARACTERS):
        if line.endswith("\n"):
            yield _not_utf8(line) or line[:-1]
        elif len(line) < MAX_ROW_CHARACTERS:  # the last line of a file without a line end
            yield _not_utf8(line) or line
        else:
            _skip_line(stream)
            yield Malformed(f"is longer than {MAX_ROW_CHARACTERS} characters")


def _skip_line(stream: TextIO) -> None:
    while (rest := stream.readline(MAX_ROW_CHARACTERS)) and not rest.endswith(("\n", "\r")):
        pass


def read_objects(source: str) -> Iterator[dict[str, Any] | Malformed]:
    """The objects of a JSON Lines file or, for ``"-"``, of standard input; blank lines are none.

    Raises:
        RequestError: the source cannot be read.
    """
    try:
        with opened(source, None) as stream:
            yield from _json_objects(stream)
    except (OSError, *DAMAGE) as error:
        raise RequestError(f"cannot read {source}: {error}") from error


def _json_objects(stream: TextIO) -> Iterator[dict[str, Any] | Malformed]:
    for line in _line_values(stream):
        if isinstance(line, Malformed):
            yield line
        elif line.strip():
            yield _json_object(line)


def _json_object(line: str) -> dict[str, Any] | Malformed:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return Malformed(f"is not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested too deep
        return Malformed(f"is not JSON that can be read: {error}")
    return record if isinstance(record, dict) else Malformed(f"is a JSON {_json_type(record)}, not an object")


def _json_value(record: dict[str, Any] | Malformed, field: str) -> str | Malformed:
    if isinstance(record, Malformed):
        return record
    if field not in record:
        return Malformed(f"has no field {field!r}; {_fields(list(record))}")
    value = record[field]
    if not isinstance(value, str):
        return Malformed(f"has a {_json_type(value)} in field {field!r}, not a string")
    return value


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _fields(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")
    return f"its fields are {shown}" if names else "it has no fields"


class _CsvLines:
    """Lines for csv.reader that remember what the current record has taken.

    A stray quote makes the rest of a file one field. When a record turns out malformed, all of its lines but the first
    are given back and read anew.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._ahead: deque[str] = deque()
        self._taken: list[str] = []
        self._characters = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        anew = bool(self._ahead)
        line = self._ahead.popleft() if anew else self._stream.readline(MAX_ROW_CHARACTERS)
        if not line:
            raise StopIteration
        if len(line) == MAX_ROW_CHARACTERS and not line.endswith(("\n", "\r")):
            self._characters = MAX_ROW_CHARACTERS
            if not anew:
                _skip_line(self._stream)
        self._taken.append(line)
        self._characters += len(line)
        if self._characters > MAX_ROW_CHARACTERS:
            raise _RowTooLong
        return line

    def start_record(self) -> None:
        self._taken, self._characters = [], 0

    def give_back(self) -> None:
        self._ahead.extendleft(reversed(self._taken[1:]))


def _csv_values(stream: TextIO, source: str, field: str, delimiter: str) -> Iterator[str | Malformed]:
    # The limit is the module's, not a reader's: raised here, never lowered for someone else in this process.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_CHARACTERS))
    records = _csv_records(stream, delimiter)
    header = next(records, None)
    if header is None:
        raise RequestError(f"{source} is empty: a CSV file begins with a row of column names")
    if isinstance(header, Malformed):
        raise RequestError(f"{source}: the row of column names {header.reason}")
    if header.count(field) != 1:
        problem = f"{header.count(field)} columns named" if field in header else "no column"
        raise RequestError(f"{source} has {problem} {field!r}; {_fields(header)}: choose one with --field")
    column = header.index(field)
    for record in records:
        if isinstance(record, Malformed):
            yield record
        elif len(record) != len(header):
            yield Malformed(f"has {len(record)} columns where the first row names {len(header)}")
        else:
            yield _not_utf8(record[column]) or record[column]


def _csv_records(stream: TextIO, delimiter: str) -> Iterator[list[str] | Malformed]:
    lines = _CsvLines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.start_record()
        try:
            record = next(reader, None)
        except csv.Error as error:
            lines.give_back()
            yield Malformed(f"is malformed CSV: {error}")
        except _RowTooLong:
            lines.give_back()
            yield Malformed(f"is longer than {MAX_ROW_CHARACTERS} characters, or a quote in it is never closed")
        else:
            if record is None:
                return
            if record:
                yield record


# ---- Parquet


def _parquet_values(source: str, kind: str, field: str, meter: Meter) -> Iterator[str | Malformed]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RequestError('reading Parquet needs pyarrow: pip install "mlmfast[parquet]"') from error
    if source == "-":
        raise RequestError("Parquet cannot be read from standard input, its index stands at the end: give a file")
    with Path(source).open("rb") as stream:
        try:
            file = pq.ParquetFile(stream)
            schema = file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{source} is not a readable Parquet file: {error}") from error
        if schema.names.count(field) != 1:
            raise RequestError(f"{source} has no column {field!r}; {_fields(schema.names)}: choose one with --field")
        type = schema.field(field).type
        if pa.types.is_dictionary(type):
            type = type.value_type
        if not (pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)):
            raise RequestError(f"{source}: column {field!r} holds {type}, not strings")
        rows, before = max(file.metadata.num_rows, 1), meter.rows
        meter.begin(source, lambda: (meter.rows - before) / rows)
        batches = file.iter_batches(batch_size=1024, columns=[field])
        while True:
            try:
                batch = next(batches, None)
            except pa.ArrowException as error:
                raise EOFError(str(error)) from error  # damage in the middle, as of a compressed file
            if batch is None:
                return
            # As bytes: one value that is not UTF-8 would fail its whole batch.
            for value in batch.column(0).cast(type).cast(pa.large_binary()).to_pylist():
                yield _decoded(value, field)


def _decoded(value: bytes | None, field: str) -> str | Malformed:
    if value is None:
        return Malformed(f"has a null in field {field!r}, not a string")
    text = value.decode("utf-8", "surrogateescape")
    return _not_utf8(text) or text
