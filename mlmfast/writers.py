"""Scored rows -> JSON Lines: a stream, a file that appears whole or not at all, or a folder of such files.

What has been scored is never lost: records go to a file beside the target (``*.partial``) that is renamed at the end, and the
next run of the same request takes over what it finds there. It compares every row's text with the input on the way, so rows
of another input are never taken over.
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

from mlmfast.errors import RequestError
from mlmfast.readers import Row

Record = dict[str, Any]


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

    def add(self, records: Sequence[Record]) -> None:
        self.rows += len(records)
        self.errors += sum("error" in record for record in records)
        self.tokens += sum(len(record.get("tokens", ())) for record in records)


class Sink(Protocol):
    """Where the records of a run go, a window of rows at a time.

    Attributes:
        shard_rows: windows must not cross multiples of this; None where they may lie anywhere.
        tally: what has been written, by this run and by earlier ones that it continues.
    """

    shard_rows: int | None
    tally: Tally

    def keeps(self, window: Sequence[Row]) -> bool:
        """Whether an earlier run has written these rows; then they must not be written again."""

    def write(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        """Takes the records of a window that is not kept."""

    def finish(self) -> None:
        """Ends a run that has seen all rows."""

    def close(self) -> Path | None:
        """Releases the files; returns where an unfinished run has left what it scored, None if it has left nothing."""


def open_sink(output: str, request: dict[str, Any], shard_rows: int, stdout: BinaryIO) -> Sink:
    """The sink that an ``--output`` asks for: ``-``, a file, or a folder (an existing one, or a name that ends in ``/``).

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
        return StreamSink(open(path, "wb"))
    return FileSink(path.resolve(), request)


def encode(record: Record) -> bytes:
    """One line of JSON Lines. Text that UTF-8 cannot hold (half a surrogate pair) is written as ``\\u`` escapes."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, allow_nan=False) + "\n").encode()


class StreamSink:
    """Standard output or another stream: lines as they come."""

    shard_rows = None

    def __init__(self, stream: BinaryIO) -> None:
        self.tally = Tally()
        self._stream = stream

    def keeps(self, window: Sequence[Row]) -> bool:
        return False

    def write(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        self._stream.write(b"".join(map(encode, records)))
        self._stream.flush()
        self.tally.add(records)

    def finish(self) -> None:
        pass

    def close(self) -> Path | None:
        return None


class PartialFile:
    """A file in the making, under a name of its own until it is whole.

    Args:
        target: what it will be.
        partial: what it is until then, in the same folder; if it exists, its records are offered to :meth:`take`.
    """

    def __init__(self, target: Path, partial: Path) -> None:
        self.target = target
        self.partial = partial
        self.taking = partial.exists()
        self._stream = open(partial, "r+b" if self.taking else "xb")

    def take(self, window: Sequence[Row]) -> list[Record] | None:
        """The next records, if they are whole and of these rows; else cuts the file there and returns None."""
        if not self.taking:
            return None
        start = self._stream.tell()
        records = []
        for row in window:
            record = _parsed(self._stream.readline())
            if record is None or record.get("text") != row.text:
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
        self._stream.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.tell()
        self._stream.close()
        os.replace(self.partial, self.target)
        return size

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


def _parsed(line: bytes) -> Record | None:
    """The record of a line, None if a killed run has left it torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class FileSink:
    """One file, renamed onto its target at the end.

    The partial file carries a digest of the request in its name: a run with other arguments does not find it.
    """

    shard_rows = None

    def __init__(self, target: Path, request: dict[str, Any]) -> None:
        self.tally = Tally()
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
        self._target = target
        self._partial = target.with_name(f"{target.name}.{digest}.partial")
        self._file: PartialFile | None = None

    def keeps(self, window: Sequence[Row]) -> bool:
        records = self._opened().take(window)
        if records is None:
            return False
        self.tally.add(records)
        self.tally.kept += len(records)
        return True

    def write(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        self._opened().write(records)
        self.tally.add(records)

    def finish(self) -> None:
        self._opened().finish()

    def close(self) -> Path | None:
        return self._file.close() if self._file else None

    def _opened(self) -> PartialFile:
        if self._file is None:
            self._file = PartialFile(self._target, self._partial)
        return self._file


class FolderSink:
    """Shards ``part-00000.jsonl`` ... of ``shard_rows`` rows and ``manifest.json``, each renamed into place when whole.

    The manifest holds the request and, for each finished shard, its file, bytes, rows, errors, tokens and a digest of the
    texts it was made from. A later run of the same request passes over the rows of finished shards, compares their digest, and goes
    on after them; a run of another request is refused.
    """

    def __init__(self, folder: Path, request: dict[str, Any], shard_rows: int) -> None:
        if shard_rows < 1:
            raise RequestError(f"shards must have at least one row, not {shard_rows}")
        self.shard_rows: int | None = shard_rows
        self.tally = Tally()
        self._size = shard_rows
        self._folder = folder
        self._manifest = {"request": request | {"shard_rows": shard_rows}, "shards": [], "complete": False}
        self._read_manifest()
        self._next = 0  # the shard that the next row belongs to
        self._shard = Tally()  # what that shard holds so far
        self._digest = hashlib.sha256()
        self._file: PartialFile | None = None

    def keeps(self, window: Sequence[Row]) -> bool:
        if self._next < len(self._manifest["shards"]):
            self._pass_over(window)
            return True
        records = self._opened().take(window)
        if records is None:
            return False
        self.tally.kept += len(records)
        self._add(window, records)
        return True

    def write(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        self._opened().write(records)
        self._add(window, records)

    def finish(self) -> None:
        shards = self._manifest["shards"]
        if self._next < len(shards):
            raise self._changed(shards[self._next])
        if self._shard.rows:
            self._end_shard()
        self._manifest["complete"] = True
        self._write_manifest()

    def close(self) -> Path | None:
        if self._file is not None:
            self._file.close()
        return self._folder if self._manifest["shards"] or self._shard.rows else None

    def _path(self, shard: int) -> Path:
        return self._folder / f"part-{shard:05d}.jsonl"

    def _opened(self) -> PartialFile:
        if self._file is None:
            if self._next == 0:
                self._write_manifest()
            target = self._path(self._next)
            self._file = PartialFile(target, target.with_name(target.name + ".partial"))
        return self._file

    def _add(self, window: Sequence[Row], records: Sequence[Record]) -> None:
        _update(self._digest, window)
        self._shard.add(records)
        self.tally.add(records)
        if self._shard.rows == self._size:
            self._end_shard()

    def _end_shard(self) -> None:
        size = self._opened().finish()
        entry = {"file": self._path(self._next).name, "bytes": size}
        entry |= {"rows": self._shard.rows, "errors": self._shard.errors, "tokens": self._shard.tokens}
        self._manifest["shards"].append(entry | {"texts_sha256": self._digest.hexdigest()})
        self._write_manifest()
        self._start_shard()

    def _start_shard(self) -> None:
        self._next += 1
        self._shard, self._digest, self._file = Tally(), hashlib.sha256(), None

    def _pass_over(self, window: Sequence[Row]) -> None:
        """Compares rows with those that a finished shard was made from."""
        entry = self._manifest["shards"][self._next]
        _update(self._digest, window)
        self._shard.rows += len(window)
        if self._shard.rows < entry["rows"]:
            return
        if self._shard.rows > entry["rows"] or self._digest.hexdigest() != entry["texts_sha256"]:
            raise self._changed(entry)
        for count in ("rows", "errors", "tokens"):
            setattr(self.tally, count, getattr(self.tally, count) + entry[count])
        self.tally.kept += entry["rows"]
        self._start_shard()

    def _changed(self, entry: Record) -> RequestError:
        return RequestError(
            f"{self._folder / entry['file']} was made from other rows than the input now has: give another folder"
        )

    def _read_manifest(self) -> None:
        path = self._folder / "manifest.json"
        if not path.exists():
            if self._folder.is_dir() and any(self._folder.glob("part-*.jsonl")):
                raise RequestError(f"{self._folder} holds shards but no manifest.json: give another folder")
            if self._folder.exists() and not self._folder.is_dir():
                raise RequestError(f"{self._folder} is a file, not a folder: leave out the slash at its end")
            if not self._folder.resolve().parent.is_dir():
                raise RequestError(f"cannot write {self._folder}: there is no folder {self._folder.parent}")
            return
        try:
            manifest = json.loads(path.read_bytes())
            found, shards = manifest["request"], manifest["shards"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{path} is not a manifest that can be read: give another folder") from error
        asked = self._manifest["request"]
        differing = [name for name in asked if found.get(name) != asked[name]]
        if differing:
            was = ", ".join(f"{name} {found.get(name)!r}, now {asked[name]!r}" for name in differing)
            raise RequestError(f"{self._folder} was begun by another request ({was}): repeat that one or give another folder")
        for entry in shards:
            shard = self._folder / entry["file"]
            if not shard.is_file() or shard.stat().st_size != entry["bytes"]:
                raise RequestError(f"{shard} is missing or not what was written: give another folder")
        self._manifest["shards"] = shards

    def _write_manifest(self) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / "manifest.json"
        beside = path.with_name("manifest.json.partial")
        with open(beside, "w", encoding="utf-8") as stream:
            json.dump(self._manifest, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)


def _update(digest: Any, window: Sequence[Row]) -> None:
    """Adds rows to a digest, None told apart from "" and each row's bounds from its neighbours'."""
    for row in window:
        digest.update(json.dumps(row.text).encode() + b"\n")
