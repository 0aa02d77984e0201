"""Records -> a Parquet file that appears whole. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.readers import Row
from mlmfast.writers import Record, settle


def check_installed() -> None:
    """
    Raises:
        RequestError: there is no pyarrow.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise RequestError('writing Parquet needs pyarrow: pip install "mlmfast[parquet]"') from error


class ParquetFile:
    """A file in the making, as :class:`mlmfast.writers.PartialFile`; but nothing of an earlier run is taken over.

    Args:
        target: what it will be.
        partial: what it is until then, in the same folder.
        columns: name -> Arrow's name of its type, such as ``list<string>``: the same for all files, whatever they hold.
            What a record lacks is null.
    """

    def __init__(self, target: Path, partial: Path, columns: dict[str, str]) -> None:
        import pyarrow as pa

        self.target = target
        self.partial = partial
        kinds = {"string": pa.string(), "double": pa.float64(), "float": pa.float32(), "int64": pa.int64()}
        kinds |= {"bool": pa.bool_()} | {f"list<{name}>": pa.list_(kind) for name, kind in kinds.items()}
        self._schema: Any = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
        self._writer: Any = None

    def take(self, window: Sequence[Row]) -> list[Record] | None:
        return None

    def write(self, records: Sequence[Record]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([storable(record) for record in records], schema=self._schema)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.partial, self._schema, compression="zstd")
        self._writer.write_table(table)

    def finish(self) -> int:
        """Renames it to the target, whole and on disk; returns its size in bytes."""
        writer, self._writer = self._writer, None
        writer.close()
        return settle(self.partial, self.target)

    def close(self) -> None:
        """Stops; an unfinished file is deleted."""
        if self._writer is not None:
            with suppress(OSError):  # a full disk
                self._writer.close()
            self._writer = None
        self.partial.unlink(missing_ok=True)


def storable(record: Record) -> Record:
    """A record whose texts are UTF-8: half a surrogate pair, which only texts with ``error`` hold, as ``\\ud83d``."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in record.items()
    }
