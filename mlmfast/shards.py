"""Scored rows -> a folder of JSON Lines files and the manifest that a later run continues from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.readers import Row
from mlmfast.writers import PartialFile, Record, Tally, replace


class FolderSink:
    """Shards ``part-00000.jsonl`` ... of ``shard_rows`` rows and ``manifest.json``, each renamed into place when whole.

    The manifest holds the request and, for each finished shard, its file, bytes, rows, errors, tokens and a digest of
    the texts it was made from. A later run of the same request passes over the rows of finished shards, compares their
    digest, and goes on after them; a run of another request is refused.
    """

    def __init__(self, folder: Path, request: dict[str, Any], shard_rows: int) -> None:
        if shard_rows < 1:
            raise RequestError(f"shards must have at least one row, not {shard_rows}")
        self.shard_rows: int | None = shard_rows
        self.tally = Tally()
        self._size = shard_rows
        self._folder = folder
        self._manifest: dict[str, Any] = {
            "request": request | {"shard_rows": shard_rows},
            "shards": [],
            "complete": False,
        }
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
        if self.tally.rows % self._size == 0:
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
        if self._digest.hexdigest() != entry["texts_sha256"]:
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
            raise RequestError(
                f"{self._folder} was begun by another request ({was}): repeat that one or give another folder"
            )
        for entry in shards:
            shard = self._folder / entry["file"]
            if not shard.is_file() or shard.stat().st_size != entry["bytes"]:
                raise RequestError(f"{shard} is missing or not what was written: give another folder")
        self._manifest["shards"] = shards

    def _write_manifest(self) -> None:
        self._folder.mkdir(exist_ok=True)
        replace(self._folder / "manifest.json", json.dumps(self._manifest, indent=1).encode())


def _update(digest: Any, window: Sequence[Row]) -> None:
    """Adds rows to a digest, None told apart from "" and each row's bounds from its neighbours'."""
    for row in window:
        digest.update(json.dumps(row.text).encode() + b"\n")
