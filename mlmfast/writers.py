"""Scored rows -> JSON Lines: a stream, or a file that appears whole or not at all.

What has been scored is never lost: records go to a file beside the target (``*.partial``) that is renamed at the end,
and the next run of the same request takes over what it finds there. It compares every row's text with the input on the
way, so rows of another input are never taken over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mlmfast.ledger import Record, lock, parsed
from mlmfast.readers import Row


@dataclass
class Tally:
    """Counts of a run.

    Attributes:
        rows: rows written, those of earlier runs included.
        errors: how many of them have ``error``.
        tokens: scored tokens in them.
        kept: how many rows an earlier run had scored.
    """

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    kept: int = 0

    @classmethod
    def of(cls, records: Sequence[Record], kept: bool = False) -> Tally:
        """The counts of some records."""
        errors = sum("error" in record for record in records)
        tokens = sum(len(record.get("tokens", ())) for record in records)
        return cls(len(records), errors, tokens, len(records) if kept else 0)

    @classmethod
    def of_entry(cls, entry: Record, kept: bool = False) -> Tally:
        """The counts of a line of a manifest."""
        return cls(entry["rows"], entry["errors"], entry["tokens"], entry["rows"] if kept else 0)

    def add(self, other: Tally) -> None:
        self.rows += other.rows
        self.errors += other.errors
        self.tokens += other.tokens
        self.kept += other.kept


class Sink(Protocol):
    """Where the records of a run go, a window of rows at a time.

    Attributes:
        tally: what has been written, by this run and by earlier ones that it continues.
    """

    tally: Tally

    def keeps(self, window: Sequence[Row]) -> list[Record] | None:
        """What an earlier run has written of these rows, which must not be written again; None if it has not."""

    def write(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        """Takes the records of a window that is not kept."""

    def finish(self) -> None:
        """Ends a run that has seen all rows."""

    def close(self) -> Path | None:
        """Releases the files; returns where an unfinished run has left what it scored, None if it has left nothing."""


def encode(record: Record) -> bytes:
    """One line of JSON Lines. Text that UTF-8 cannot hold (half a surrogate pair) is written as ``\\u`` escapes."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, allow_nan=False) + "\n").encode()


def replace(path: Path, content: bytes) -> None:
    """Writes a file that is whole, and on disk, at every moment."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def settle(partial: Path, target: Path) -> int:
    """Gives a file that was written whole its name once it is on disk; returns its size in bytes."""
    with partial.open("r+b") as stream:  # of what may only be read Windows syncs nothing
        os.fsync(stream.fileno())
    size = partial.stat().st_size
    partial.replace(target)
    return size


class StreamSink:
    """Standard output or another stream: lines as they come."""

    def __init__(self, stream: BinaryIO) -> None:
        self.tally = Tally()
        self._stream = stream

    def keeps(self, window: Sequence[Row]) -> list[Record] | None:
        return None

    def write(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        self._stream.write(b"".join(map(encode, records)))
        self._stream.flush()
        self.tally.add(Tally.of(records))

    def finish(self) -> None:
        pass

    def close(self) -> Path | None:
        return None


class PartialFile:
    """A file in the making, under a name of its own until it is whole.

    Args:
        target: what it will be.
        partial: what it is until then, in the same folder; if it exists, its records are offered to :meth:`take`.

    Raises:
        RequestError: another run is writing it.
    """

    def __init__(self, target: Path, partial: Path) -> None:
        self.target = target
        self.partial = partial
        self.taking = partial.exists()
        self._stream = partial.open("r+b" if self.taking else "xb")
        try:
            lock(self._stream, partial)
        except BaseException:
            self._stream.close()
            raise

    def take(self, window: Sequence[Row]) -> list[Record] | None:
        """The next records, if they are whole and of these rows; else cuts the file there and returns None."""
        if not self.taking:
            return None
        start = self._stream.tell()
        records = []
        for row in window:
            record = parsed(self._stream.readline())
            if record is None or not row.fits(record):
                self._stream.seek(start)
                self._stream.truncate()
                self.taking = False
                return None
            records.append(record)
        return records

    def write(self, records: Sequence[Record]) -> None:
        self._stream.write(b"".join(map(encode, records)))
        self._stream.flush()

    def finish(self) -> int:
        """Renames it to the target, whole and on disk; returns its size in bytes."""
        self._stream.truncate()  # an input that has become shorter leaves records behind
        self._stream.close()
        return settle(self.partial, self.target)

    def close(self) -> Path | None:
        """Stops; returns the partial file, None (and no file) if nothing is in it."""
        if self._stream.closed:
            return None
        with suppress(OSError):  # a full disk: what could be written has been
            self._stream.close()
        if self.partial.stat().st_size == 0:
            self.partial.unlink()
            return None
        return self.partial


class FileSink:
    """One file, renamed onto its target at the end.

    The partial file carries a digest of the request in its name: a run with other arguments does not find it.
    """

    def __init__(self, target: Path, request: dict[str, Any]) -> None:
        self.tally = Tally()
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
        self._target = target
        self._partial = target.with_name(f"{target.name}.{digest}.partial")
        self._file: PartialFile | None = None

    def keeps(self, window: Sequence[Row]) -> list[Record] | None:
        records = self._opened().take(window)
        if records is not None:
            self.tally.add(Tally.of(records, kept=True))
        return records

    def write(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        self._opened().write(records)
        self.tally.add(Tally.of(records))

    def finish(self) -> None:
        self._opened().finish()

    def close(self) -> Path | None:
        return self._file.close() if self._file else None

    def _opened(self) -> PartialFile:
        if self._file is None:
            self._file = PartialFile(self._target, self._partial)
        return self._file
