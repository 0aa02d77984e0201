"""Rows -> a folder of files and the manifest that a later run continues from.

A shard is so many consecutive rows of one input, written to one file. What is in it depends on its rows and on the
settings in the manifest, on nothing else: neither on the shards before it nor on who computes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.ledger import Ledger
from mlmfast.readers import Row
from mlmfast.writers import PartialFile, Record, Tally

MANIFEST = "_manifest"  # JSON Lines, but not among the files that *.jsonl finds
FORMATS = ("jsonl", "parquet")
# A shard ends here, too: what is held of it at once are its texts.
SHARD_CHARACTERS = 1 << 26
# Of a model's facts: those that are taken over from the manifest, so that it does not matter what they are now.
FOLLOWED = ("batch_tokens", "products")

# Windows of rows -> each with its records, in order.
Compute = Callable[[Iterator[list[Row]]], Iterator[tuple[list[Row], list[Record]]]]


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one input.

    Attributes:
        name: of its file, without suffix.
        input: the name of the file that its rows are from.
        rows: all of them.
    """

    name: str
    input: str
    rows: Sequence[Row]

    def digest(self) -> str:
        """Of what its rows' records depend on."""
        found = hashlib.sha256()
        for row in self.rows:  # None told apart from "" and each row's bounds from its neighbours'
            found.update(json.dumps(row.identity).encode() + b"\n")
        return found.hexdigest()


def shards_of(inputs: Iterable[tuple[str, Iterable[Row]]], size: int, *, several: bool) -> Iterator[Shard]:
    """Cuts rows into shards, by the rows alone: so many rows, fewer where their texts are long, and none of two inputs.

    Args:
        inputs: name and rows of each.
        size: rows of a shard.
        several: names tell inputs apart, ``part-00001-00000``; else they count shards alone, ``part-00000``.
    """
    for number, (source, rows) in enumerate(inputs):
        yield from shards_in(source, rows, size, prefix(number, several))


def prefix(number: int, several: bool) -> str:
    """What the names of an input's shards begin with."""
    return f"part-{number:05d}-" if several else "part-"


def shards_in(source: str, rows: Iterable[Row], size: int, prefix: str) -> Iterator[Shard]:
    """Those of one input, as :func:`shards_of` cuts it."""
    for part, chunk in enumerate(chunks(rows, size)):
        yield Shard(f"{prefix}{part:05d}", source, chunk)


def chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows of each shard of one input."""
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text or "")
        if len(chunk) == size or characters >= SHARD_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class ShardFolder:
    """Shards and :data:`MANIFEST`, to which a line is added for each one that is finished.

    Of a finished shard the manifest holds name, input, bytes, rows, errors, tokens and a digest of its texts. A later
    run of the same request compares the digest with the rows that it would be made of, and goes on with the others; a
    run of another request is refused. A shard that is lost or cut off is made again.

    Args:
        folder: made if it is not there, when the first shard is begun.
        request: all that decides what the records are, so far as it is known before a model is loaded.
        shard_rows: most rows of a shard.
        format: of the shards, one of :data:`FORMATS`.

    Attributes:
        tally: what has been written, by this run and by earlier ones.
        damaged: shards that the manifest has and that are not there as they were written.
        remarks: in what this run differs from the one that began the folder, last digits perhaps too.

    Raises:
        RequestError: it cannot be written there, another run is at it, or it was begun by another request.
    """

    def __init__(self, folder: Path, request: dict[str, Any], shard_rows: int, format: str = "jsonl") -> None:
        if shard_rows < 1:
            raise RequestError(f"shards must have at least one row, not {shard_rows}")
        if folder.exists() and not folder.is_dir():
            raise RequestError(f"{folder} is a file, not a folder: leave out the slash at its end")
        if not folder.resolve().parent.is_dir():
            raise RequestError(f"cannot write {folder}: there is no folder {folder.parent}")
        self.folder = folder
        self.shard_rows = shard_rows
        self.format = format
        self.tally = Tally()
        self.remarks: list[str] = []
        self._made = not folder.exists()
        if not (folder / MANIFEST).exists() and self._files():
            raise RequestError(f"{folder} holds shards but no {MANIFEST}: give another folder")
        self._request = request | {"shard_rows": shard_rows, "format": format}
        # Shards there may be before a line names them, when a run was killed just then.
        self._ledger = Ledger(
            folder / MANIFEST, self._request, folder, lambda one: "model" not in one or bool(self._files())
        )
        # The last one counts: with nothing finished another model may take the folder.
        self._facts: Record = {}
        for one in self._ledger.records:
            self._facts = one.get("model", self._facts)
        self._entries: dict[str, Record] = {}  # the last one of a name counts
        self._entries |= {one["shard"]: one for one in self._ledger.records if "shard" in one}
        self._seen: set[str] = set()
        self._inputs: set[str] = set()
        self.damaged = [name for name, entry in self._entries.items() if not self._whole(entry)]

    def agree(self, facts: Record) -> Record:
        """Takes what is known of the model now that it is loaded; of a run that is continued that is what counts.

        Args:
            facts: its weights' digest, the budget of its batches ...

        Returns:
            What the manifest has of them.

        Raises:
            RequestError: the folder was begun with other weights.
        """
        known = self._facts
        if not known or (not self._entries and known["weights"] != facts["weights"]):
            self._ledger.add([{"model": facts}])
            self._facts = facts
        elif facts["weights"] != self._facts["weights"]:
            raise RequestError(
                f"{self.folder} was begun with other weights, tokenizer or config under the same name "
                f"({self._facts['weights'][:12]}..., now {facts['weights'][:12]}...): give another folder"
            )
        else:
            self.remarks = [
                f"{name} {self._facts.get(name)}, now {facts.get(name)}"
                for name in facts
                if name not in FOLLOWED and facts[name] != self._facts.get(name)
            ]
        return self._facts

    def kept(self, shard: Shard) -> Record | None:
        """What the manifest has of a shard that an earlier run has written.

        Raises:
            RequestError: it has, of other rows.
        """
        if shard.name not in self._entries:
            return None
        return self.verified(shard.name, shard.input, shard.digest())

    def verified(self, name: str, input: str, digest: str) -> Record | None:
        """The same for a shard of the manifest of which the rows are not at hand."""
        entry = self._entries[name]
        self._seen.add(name)
        self._inputs.add(input)
        if entry["input"] != input:
            raise RequestError(
                f"{self.folder / entry['file']} was made from {entry['input']}, and {input} is in its place now: files "
                "were added or are missing before it. Give another folder"
            )
        if entry["texts_sha256"] != digest:
            raise self._changed(entry)
        if name in self.damaged:
            return None
        self.tally.add(Tally.of_entry(entry, kept=True))
        return entry

    def digests(self) -> dict[str, str]:
        """Of the rows of each shard of the manifest, those of damaged ones among them."""
        return {name: entry["texts_sha256"] for name, entry in self._entries.items()}

    def paths(self) -> tuple[str, str]:
        """Of a shard's file when it is whole, and until then, ``{}`` standing for its name.

        The second is another one for every request: what one has left is not taken over by another.
        """
        key = hashlib.sha256(json.dumps([self._request, self._facts], sort_keys=True).encode()).hexdigest()[:8]
        target = f"{str(self.folder.resolve()).replace('{', '{{').replace('}', '}}')}/{{}}.{self.format}"
        return target, f"{target}.{key}.partial"

    def add(self, entry: Record) -> None:
        """Keeps what :func:`written` says of a shard."""
        self._ledger.add([entry])
        self._entries[entry["shard"]] = entry
        self._seen.add(entry["shard"])
        self._inputs.add(entry["input"])
        self.tally.add(Tally.of_entry(entry))

    def finish(self) -> None:
        """Ends a run that has seen all shards.

        Raises:
            RequestError: the manifest has shards of rows that the input no longer has.
        """
        for name, entry in self._entries.items():
            if name not in self._seen and entry["input"] in self._inputs:
                raise self._changed(entry)
            if name not in self._seen:
                raise RequestError(
                    f"{self.folder / entry['file']} was made from {entry['input']}, of which the input has nothing "
                    "any more: give another folder"
                )
        foreign = [path.name for path in self._files() if path.stem not in self._entries]
        if foreign:
            raise RequestError(
                f"{self.folder} holds files that are no shards of this input: delete {', '.join(foreign)}, and run the "
                "same command again"
            )
        whole = {"complete": {"shards": len(self._entries), "rows": self.tally.rows, "errors": self.tally.errors}}
        if whole not in self._ledger.records[-1:]:
            self._ledger.add([whole])
        for left in self.folder.glob("part-*.partial"):
            left.unlink(missing_ok=True)  # of requests that were given up

    def close(self) -> Path | None:
        """Lets go of the folder; returns it, None (and no folder that this run has made) if nothing is in it."""
        # Of an empty input, too, it has been said that it is complete.
        if any("model" not in one for one in self._ledger.records) or any(self.folder.glob("part-*")):
            self._ledger.close()
            return self.folder
        self._ledger.discard()
        if self._made:
            with suppress(OSError):  # something else has come into it
                self.folder.rmdir()
        return None

    def _files(self) -> list[Path]:
        """Whole shards, whoever has written them."""
        return sorted(path for format in FORMATS for path in self.folder.glob(f"part-*.{format}"))

    def _whole(self, entry: Record) -> bool:
        path = self.folder / entry["file"]
        return path.is_file() and path.stat().st_size == entry["bytes"]

    def _changed(self, entry: Record) -> RequestError:
        return RequestError(
            f"{self.folder / entry['file']} was made from other rows than {entry['input']} now has: give another folder"
        )


def written(
    shard: Shard,
    paths: tuple[str, str],
    columns: dict[str, str],
    compute: Compute,
    windows: Callable[[Iterable[Row]], Iterator[list[Row]]],
    advance: Callable[[Tally], None] = lambda tally: None,
) -> Record:
    """Computes a shard and writes its file, which appears when it is whole.

    Args:
        shard: its rows.
        paths: :meth:`ShardFolder.paths`. What an interrupted run has left in the second is taken over.
        columns: of Parquet, see :class:`mlmfast.parquet.ParquetFile`.
        compute: windows -> each with its records.
        windows: cuts rows into windows, by the rows alone.
        advance: told the counts of each window.

    Returns:
        The shard's line of the manifest.
    """
    from mlmfast.parquet import ParquetFile

    target, partial = (Path(path.format(shard.name)) for path in paths)
    file: Any = ParquetFile(target, partial, columns) if target.suffix == ".parquet" else PartialFile(target, partial)
    whole = Tally()

    def missing() -> Iterator[list[Row]]:
        for window in windows(shard.rows):
            records = file.take(window)
            if records is None:
                yield window
            else:
                count(Tally.of(records, kept=True))

    def count(one: Tally) -> None:
        whole.add(one)
        advance(one)

    try:
        for _, records in compute(missing()):
            file.write(records)
            count(Tally.of(records))
        size = file.finish()
    finally:
        file.close()
    entry = {"shard": shard.name, "file": target.name, "input": shard.input, "first_row": shard.rows[0].index}
    entry |= {"bytes": size, "rows": whole.rows, "errors": whole.errors, "tokens": whole.tokens}
    return entry | {"texts_sha256": shard.digest()}
