"""What an input names -> files: one, a folder's, or those of a pattern; and their rows."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.readers import COMPRESSIONS, SUFFIXES, Row, read_rows
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

    def reader(self, number: int) -> Callable[..., Iterator[Row]]:
        """:func:`mlmfast.readers.read_rows` of one file, for whatever process; ``meter`` may be given.

        What is wrong with all files is found in the first. Of the others what cannot be read is a row with ``error``.
        """
        name = self.names[number] if self.several else None
        form: Any = {"format": self.format, "field": self.field}
        return partial(read_rows, self.files[number], **form, name=name, lenient=number > 0)

    def resolved(self) -> Inputs:
        """The same for a process that has another working directory."""
        return replace(self, files=[absolute(file) for file in self.files])


def inputs_of(source: str, format: str = "auto", field: str = "text", output: str = "-") -> Inputs:
    """The files that a source stands for, sorted by name.

    Args:
        source: a file, ``"-"``, a folder (of which every file below it is read that has a suffix of a known format or
            ``.txt``, or with another ``format`` than ``"auto"`` every file), or a pattern: ``*``, ``?``, ``[...]``,
            ``**`` for folders of any depth. A name that exists is no pattern. Names that begin with ``.`` or ``_``,
            which other tools write beside their data, are left out of folders, and of patterns that have no such name
            in them; and so are unfinished outputs and what lies in ``output``; of folders also shards that a run has
            written, unless nothing else is there.
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
        root, hidden = path, "._"
        found = [one for one in path.rglob("*") if format != "auto" or _known(one)]
        missing = f"{source} holds no file" + (" of a known format: say which by --format" if format == "auto" else "")
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        hidden = "" if any(part[0] == "_" for part in path.relative_to(root).parts) else "_"
        found = [Path(one) for one in glob.glob(str(path), recursive=True)]
        missing = f"no file fits {source}"
    names = {
        one.relative_to(root): one
        for one in found
        if one.is_file() and one.suffix != ".partial" and one.name != MANIFEST
    }
    names = {name: one for name, one in names.items() if not any(part[0] in hidden for part in name.parts)}
    if path.is_dir():
        names = {name: one for name, one in names.items() if not _is_shard(one)} or names
    if not names:
        raise RequestError(missing)
    if output != "-":
        target = Path(output).resolve()
        folders = {one.parent.resolve() for one in names.values()}  # not where a link leads
        is_file = not output.endswith(("/", os.sep)) and not target.is_dir()
        if is_file and _would_be_read(target, path, folders, format):
            raise RequestError(f"--output {output} would be part of the input {source}: give a file elsewhere")
        names = {
            name: one
            for name, one in names.items()
            if target not in (one.parent.resolve(), *one.parent.resolve().parents)
        }
        if not names:
            raise RequestError(f"--output {output} holds the input {source}: give another folder")
    for one in names.values():
        check_output(output, str(one))
    ordered = sorted((name.as_posix(), str(one)) for name, one in names.items())
    return Inputs([file for _, file in ordered], [name for name, _ in ordered], True, format, field)


def absolute(source: str) -> str:
    """What tells a source from others, wherever a command is given."""
    return source if source == "-" else str(Path(source).expanduser().resolve())


def check_output(output: str, source: str) -> None:
    """Refuses to write over what is read, or to read what is written.

    Raises:
        RequestError: both are one file.
    """
    if source == "-":
        return
    path = Path(source).expanduser()
    if output != "-":
        same = path.resolve() == Path(output).resolve()
    else:
        same = False
        with suppress(OSError, ValueError):  # no such source; standard output that is no file
            same = path.is_file() and os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    if same:
        raise RequestError(
            f"{'standard output' if output == '-' else f'--output {output}'} is the input {source}: write elsewhere"
        )


def _would_be_read(target: Path, source: Path, folders: set[Path], format: str) -> bool:
    """Whether the next run would take an output for an input."""
    if source.is_dir():
        if source.resolve() not in target.parents or not (format != "auto" or _known(target)):
            return False
        return not any(part[0] in "._" for part in target.relative_to(source.resolve()).parts)
    return target.parent in folders and fnmatch(target.name, source.name)


def _is_shard(path: Path) -> bool:
    """Whether an earlier run has written it into a folder."""
    return fnmatch(path.name, "part-*") and (path.parent / MANIFEST).exists()


def _known(path: Path) -> bool:
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSIONS else path.suffix
    return suffix.lower() in (*SUFFIXES, ".txt")
