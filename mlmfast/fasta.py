"""FASTA -> rows: a sequence each, its lines joined, in order, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.readers import DAMAGE, MAX_ROW_CHARACTERS, NOT_UTF8, Row, is_damage, opened


@dataclass(frozen=True)
class FastaRow(Row):
    """A sequence and its name.

    Attributes:
        name: the line after ``>``, without white space around it.
    """

    name: str = ""

    @property
    def identity(self) -> list[Any]:
        return [*super().identity, self.name]

    def fits(self, record: dict[str, Any]) -> bool:
        return super().fits(record) and record.get("name") == self.name


def read_fasta(source: str) -> Iterator[FastaRow]:
    """The sequences of a FASTA file, which may be ``.gz``, ``.bz2`` or ``.xz``, or of standard input for ``"-"``.

    White space and blank lines are left out, lines that begin with ``;`` are comments. A name without residues is a row
    with ``error``, and so is a sequence of more than :data:`MAX_ROW_CHARACTERS`, and the one at which a compressed file
    turns out to be damaged, which is then the last.

    Raises:
        RequestError: the source cannot be read, or does not begin with a name.
    """
    name: str | None = None
    lines: list[str] = []
    index = length = 0
    try:
        with opened(source, None) as stream:
            while line := stream.readline(MAX_ROW_CHARACTERS):
                if line.startswith(">"):
                    if name is not None:
                        yield _row(index, name, lines, length)
                        index += 1
                    name, lines, length = line[1:].strip(), [], 0
                    continue
                residues = "".join(line.split())
                if not residues or residues.startswith(";"):
                    continue
                if name is None:
                    raise RequestError(f"{source} is no FASTA file: it should begin with > and a name")
                length += len(residues)
                if length <= MAX_ROW_CHARACTERS:
                    lines.append(residues)
    except (OSError, *DAMAGE) as error:
        if name is None or not is_damage(error):
            raise RequestError(f"cannot read {source}: {error}") from error
        # What came before is computed, and this row says what is missing.
        fault = f"and all after it cannot be read, the file is damaged: {error}"
        yield FastaRow(index, "".join(lines), f"row {index + 1} ({_printable(name)}) {fault}", name=_printable(name))
        return
    if name is not None:
        yield _row(index, name, lines, length)


def _row(index: int, name: str, lines: list[str], length: int) -> FastaRow:
    """A sequence of so many residues, of which the first are in ``lines``."""
    text = "".join(lines)
    fault = None
    if length > MAX_ROW_CHARACTERS:
        fault = f"has {length} residues, more than the {MAX_ROW_CHARACTERS} that a row may have"
    elif not length:
        fault = "has a name and no residues"
    elif NOT_UTF8.search(text + name):
        fault = "is not UTF-8"
    name = _printable(name)
    return FastaRow(index, text, None if fault is None else f"row {index + 1} ({name}) {fault}", name=name)


def _printable(name: str) -> str:
    """A name in which bytes that are not UTF-8 have become question marks."""
    return NOT_UTF8.sub("\ufffd", name)
