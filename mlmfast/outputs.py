"""What a run has written, read back: a file of JSON Lines, or a folder of shards, to its records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlmfast.errors import RequestError
from mlmfast.parquet import check_installed
from mlmfast.readers import COMPRESSIONS, DAMAGE
from mlmfast.shards import MANIFEST
from mlmfast.writers import Record


def read_records(source: str) -> Iterator[Record]:
    """The records of an output in its order, one at a time.

    Args:
        source: a file (also compressed: ``.gz``, ``.bz2``, ``.xz``), or a folder that ``--output`` has filled.

    Raises:
        RequestError: there is none, it is not whole, or a line of it is no JSON object.
    """
    path = Path(source)
    for part, size in _shards(path) if path.is_dir() else [(path, None)]:
        try:
            if size not in (None, part.stat().st_size):
                raise RequestError(f"{part} is not as it was written: run the command that fills {path} again")
            yield from (_rows_of if part.suffix == ".parquet" else _lines)(part)
        except (OSError, *DAMAGE) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise RequestError(f"cannot read {part}: {reason or error}") from error


def _shards(folder: Path) -> list[tuple[Path, int | None]]:
    """The files that a manifest names, in order, and their sizes in bytes."""
    path = folder / MANIFEST
    try:
        records = list(_lines(path))
    except FileNotFoundError as error:
        raise RequestError(f"{folder} has no {MANIFEST}: give a file, or a folder that --output has filled") from error
    if not records or "complete" not in records[-1]:
        raise RequestError(f"{folder} is not finished: run the command that fills it again, which continues it")
    # In the order of the input, in which several processes do not finish; the last line of a shard counts.
    files = {record["shard"]: record for record in records if "shard" in record}
    names = sorted(files, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    return [(folder / files[name]["file"], files[name]["bytes"]) for name in names]


def _rows_of(path: Path) -> Iterator[Record]:
    """Of a Parquet file, what is null left out, as JSON Lines leave it out; but a row's text and perplexity may be."""
    check_installed()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as stream:
            file = pq.ParquetFile(stream)
            # Of float32 the digits that read back as the same, as JSON Lines have them.
            floats = {field.name for field in file.schema_arrow if field.type == pa.list_(pa.float32())}
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    for name in floats.intersection(name for name in row if row[name] is not None):
                        row[name] = [float(str(x)) for x in np.float32(row[name])]
                    nullable = {"text"} if row.get("error") is not None else {"text", "perplexity"}
                    yield {name: value for name, value in row.items() if value is not None or name in nullable}
    except pa.ArrowException as error:
        raise RequestError(f"{path} is not a readable Parquet file: {error}") from error


def _lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as stream:
        plain = stream.read(1) == b"{"  # an --output is not compressed, whatever its name
    with (open if plain else COMPRESSIONS.get(path.suffix.lower(), open))(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}: line {number} is not JSON ({error}): give JSON Lines") from error
            if not isinstance(record, dict):
                raise RequestError(f"{path}: line {number} is not a JSON object: give an output of mlmfast")
            yield record
