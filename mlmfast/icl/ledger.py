"""What a long run has finished, kept line by line: the next run of the same settings goes on from there.

JSON Lines: a header of settings, then a record a finished item. A run that was killed leaves at most its last line
torn; that line is cut off and its item done again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.writers import encode


class Ledger:
    """Opens a ledger, or begins one.

    Args:
        path: its file.
        settings: all that decides what the records are, in JSON's types.

    Attributes:
        records: those of earlier runs, and what was added.

    Raises:
        RequestError: it was begun with other settings, or is no ledger.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        settings = json.loads(json.dumps(settings))
        kept = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines):
            record = _parsed(line)
            if record is None:
                break
            if number == 0:
                self._check(record, settings)
            else:
                self.records.append(record)
            kept += len(line)
        if lines and not kept and (len(lines) > 1 or not lines[0].startswith(b'{"settings":')):
            raise RequestError(f"{path} is there and was not written by mlmfast: choose another --output")
        self._stream = path.open("r+b" if path.exists() else "xb")
        self._stream.seek(kept)
        self._stream.truncate()
        if not kept:
            self._write([{"settings": settings}])

    def _check(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        begun = header.get("settings")
        if not isinstance(begun, dict):
            raise RequestError(f"{self.path} is there and was not written by mlmfast: choose another --output")
        changed = [
            f"{name} was {begun.get(name)!r} and is now {settings.get(name)!r}"
            for name in dict.fromkeys([*begun, *settings])
            if begun.get(name) != settings.get(name)
        ]
        if changed:
            raise RequestError(
                f"{self.path} was begun with other settings: {'; '.join(changed)}. Choose another --output, or delete "
                "that file to begin anew"
            )

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keeps finished items; they are in the file when this returns."""
        self._write(records)
        self.records += records

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        self._stream.write(b"".join(map(encode, records)))
        self._stream.flush()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
