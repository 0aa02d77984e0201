"""What a long run has finished, kept line by line: the next run of the same settings goes on from there.

JSON Lines: a header of settings, then a record for what was finished together. A record is one line, so it is there as
a whole or not at all: a run that was killed leaves at most its last line torn, which is cut off and done again.
What stands before other lines and cannot be read is no such line: it is refused, so that nothing after it is lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mlmfast.errors import RequestError

Record = dict[str, Any]
Own = TypeVar("Own", bound="Ledger")


class Ledger:
    """Opens a ledger, or begins one. One process at a time may hold it.

    Args:
        path: its file; its folder is made, too.
        settings: all that decides what the records are, in JSON's types.
        whole: what would have to be deleted to begin anew; None for the file alone.
        binds: whether a record is finished work, which other settings must not be mixed with. Without any the ledger is
            begun anew.

    Attributes:
        records: those of earlier runs, and what was added.

    Raises:
        RequestError: it was begun with other settings, is in use, is no ledger, or is damaged within.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        whole: Path | None = None,
        binds: Callable[[Record], bool] = lambda record: True,
    ) -> None:
        self.path = path
        self._whole = whole or path
        self._binds = binds
        self.records: list[Record] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+b")
        try:
            lock(self._stream, path)
            self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self._stream.close()
            raise

    def add(self, records: Sequence[Record]) -> None:
        """Keeps what was finished: it is on disk when this returns."""
        self._write(records)
        self.take(records)

    def take(self, records: Sequence[Record]) -> None:
        """Is given what the file holds, in order."""
        self.records += records

    def _read(self, settings: dict[str, Any]) -> None:
        self._stream.seek(0)
        kept = 0
        changed: list[str] = []
        for number, line in enumerate(self._stream, 1):
            record = parsed(line)
            if record is None:
                # Of a first line only a torn header is ours to cut off.
                if not kept and (line.endswith(b"\n") or not line.startswith(b'{"settings":')):
                    raise self._foreign()
                if any(map(parsed, self._stream)):
                    raise RequestError(
                        f"{self.path}, line {number} is damaged, and finished work comes after it: delete that line, "
                        "and what it held is computed again"
                    )
                break  # a machine that lost power may leave anything; what came before it stands
            if kept and not changed:
                self.take([record])
            elif kept:
                if self._binds(record):
                    raise self._other(changed)
            else:
                if not isinstance(record.get("settings"), dict):
                    raise self._foreign()
                begun = record["settings"]
                changed = [
                    f"{name} was {begun.get(name)!r} and is now {settings.get(name)!r}"
                    for name in dict.fromkeys([*begun, *settings])
                    if begun.get(name) != settings.get(name)
                ]
            kept += len(line)
        if changed:  # with nothing finished there is nothing to mix
            kept = 0
        self._stream.truncate(kept)
        if not kept:
            self._write([{"settings": settings}])

    def _other(self, changed: list[str]) -> RequestError:
        return RequestError(
            f"{self.path} was begun with other settings: {'; '.join(changed)}. Choose another --output, or delete "
            f"{self._whole} to begin anew"
        )

    def _foreign(self) -> RequestError:
        return RequestError(f"{self.path} is there and was not written by mlmfast: choose another --output")

    def _write(self, records: Sequence[Record]) -> None:
        # Not writers.encode, which refuses infinities: a model may answer with one.
        self._stream.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file; what a full disk did not take is torn, as after a kill."""
        with suppress(OSError):
            self._stream.close()

    def discard(self) -> None:
        """Deletes the file while nobody else can hold it; but Windows deletes no open file."""
        if os.name == "nt":
            self.close()
        self.path.unlink(missing_ok=True)
        self.close()


def parsed(line: bytes) -> Record | None:
    """The record of a line; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def lock(stream: Any, path: Path) -> None:
    """Two runs that wrote one file at once would cut each other's lines.

    Raises:
        RequestError: another run holds it, or has just deleted or renamed it.
    """
    try:
        fcntl: Any = import_module("fcntl")
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(f"{path} is in use by another run: wait for it") from None
    except OSError:  # a file system without locks
        return
    if not path.exists() or not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
        raise RequestError(f"{path} was in use by another run, which has ended just now: try again")
