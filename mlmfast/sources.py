"""What an input names -> files: one, a folder's, or those of a pattern."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from mlmfast.errors import RequestError
from mlmfast.readers import COMPRESSIONS, SUFFIXES


def inputs_of(source: str, format: str = "auto") -> list[str]:
    """The files that a source stands for, sorted by name.

    Args:
        source: a file, ``"-"``, a folder (of which every file below it is read that has a suffix of a known format or
            ``.txt``, or with another ``format`` than ``"auto"`` every file), or a pattern: ``*``, ``?``, ``[...]``,
            ``**`` for folders of any depth. A name that exists is no pattern. Names that begin with ``.`` or ``_``,
            which other tools write beside their data, are left out of folders and patterns.

    Raises:
        RequestError: a folder or pattern without files.
    """
    if source == "-" or Path(source).is_file() or not (Path(source).is_dir() or glob.has_magic(source)):
        return [source]
    if Path(source).is_dir():
        found = [str(path) for path in Path(source).rglob("*") if format != "auto" or _known(path)]
        shown = [Path(path).relative_to(source).parts for path in found]
        missing = f"{source} holds no file" + (" of a known format: say which by --format" if format == "auto" else "")
    else:
        found = glob.glob(os.path.expanduser(source), recursive=True)
        shown = [(Path(path).name,) for path in found]
        missing = f"no file fits {source}"
    files = [path for path, parts in zip(found, shown) if not any(part[0] in "._" for part in parts)]
    files = sorted(path for path in files if Path(path).is_file())
    if not files:
        raise RequestError(missing)
    return files


def _known(path: Path) -> bool:
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSIONS else path.suffix
    return suffix.lower() in (*SUFFIXES, ".txt")
