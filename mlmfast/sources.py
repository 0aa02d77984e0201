"""What an input names -> files: one, a folder's, or those of a pattern; and their rows."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from mlmfast.errors import RequestError
from mlmfast.readers import COMPRESSIONS, SUFFIXES, Meter, Row, read_rows
from mlmfast.shards import MANIFEST


@dataclass(frozen=True)
class Inputs:
    """The files that a source stands for.

    Attributes:
        files: their paths, or ``"-"``, in the order in which they are read.
        names: of each, for messages and manifests: the same however the source's own path is written.
        several: whether another run may find more of them, or fewer: it is a folder or a pattern.
        format, field: of :func:`mlmfast.readers.read_rows`.
    """

    files: Sequence[str]
    names: Sequence[str]
    several: bool
    format: str = "auto"
    field: str = "text"

    def rows(self, number: int, meter: Meter | None = None) -> Iterator[Row]:
        """The rows of one file.

        Raises:
            RequestError: as :func:`mlmfast.readers.read_rows`.
        """
        name = self.names[number] if self.several else None
        return read_rows(self.files[number], format=self.format, field=self.field, meter=meter, name=name)

    def resolved(self) -> Inputs:
        """The same for a process that has another working directory."""
        return replace(self, files=[absolute(file) for file in self.files])


def inputs_of(source: str, format: str = "auto", field: str = "text", output: str = "-") -> Inputs:
    """The files that a source stands for, sorted by name.

    Args:
        source: a file, ``"-"``, a folder (of which every file below it is read that has a suffix of a known format or
            ``.txt``, or with another ``format`` than ``"auto"`` every file), or a pattern: ``*``, ``?``, ``[...]``,
            ``**`` for folders of any depth. A name that exists is no pattern. Names that begin with ``.`` or ``_``,
            which other tools write beside their data, are left out of folders and patterns, and so is what lies in
            ``output``; of folders also those below them that an earlier run has filled.
        format, field: of :func:`mlmfast.readers.read_rows`.
        output: where the command writes.

    Raises:
        RequestError: a folder or pattern without files; the output is the input, or holds it.
    """
    path = Path(source).expanduser()
    if source == "-" or path.is_file() or not (path.is_dir() or glob.has_magic(source)):
        check_output(output, source)
        return Inputs([source if source == "-" else str(path)], [path.name], False, format, field)
    if path.is_dir():
        root = path
        found = [one for one in path.rglob("*") if _read_from_folders(one.relative_to(path), path, format)]
        missing = f"{source} holds no file" + (" of a known format: say which by --format" if format == "auto" else "")
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(one) for one in glob.glob(str(path), recursive=True)]
        missing = f"no file fits {source}"
    files = [one for one in found if one.is_file() and one.name[0] not in "._"]
    if not files:
        raise RequestError(missing)
    if output != "-":
        target = Path(output).resolve()
        for one in files:
            check_output(output, str(one))
        files = [one for one in files if target not in one.resolve().parents]
        if not files:
            raise RequestError(f"--output {output} holds the input {source}: give another folder")
    names = {one.relative_to(root).as_posix(): str(one) for one in files}
    return Inputs([names[name] for name in sorted(names)], sorted(names), True, format, field)


def absolute(source: str) -> str:
    """What tells a source from others, wherever a command is given."""
    return source if source == "-" else str(Path(source).expanduser().resolve())


def check_output(output: str, source: str) -> None:
    """Refuses to write over what is read.

    Raises:
        RequestError: both are one file.
    """
    if "-" not in (output, source) and Path(output).resolve() == Path(source).expanduser().resolve():
        raise RequestError(f"--output {output} is the input")


def _read_from_folders(name: Path, root: Path, format: str) -> bool:
    """Whether a file below a folder is one of its inputs."""
    if any(part[0] in "._" for part in name.parts) or (format == "auto" and not _known(name)):
        return False
    return not any((root / parent / MANIFEST).exists() for parent in name.parents if parent != Path())


def _known(path: Path) -> bool:
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSIONS else path.suffix
    return suffix.lower() in (*SUFFIXES, ".txt")
