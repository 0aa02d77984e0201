"""The rows of a task: from local JSON Lines or from the Hub, checked, with labels as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.readers import Malformed, read_objects

INDEX = "icl_index"
SUFFIXES = (".jsonl", ".jsonl.gz")
# Of texts that are no rows, for the tasks that read such.
TEXT = ".txt"


class Rows(list[dict[str, Any]]):
    """Rows as lm_eval's tasks hold them: a list that knows its columns."""

    def __init__(self, rows: Iterable[dict[str, Any]], fields: Iterable[str]) -> None:
        super().__init__(rows)
        self.features = dict.fromkeys([*(name.partition(".")[0] for name in fields), INDEX])


class Splits(Mapping[str, Rows]):
    """Split -> its rows, read when first asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Rows]]) -> None:
        self._readers = readers
        self._rows: dict[str, Rows] = {}

    def __getitem__(self, split: str) -> Rows:
        if split not in self._rows:
            self._rows[split] = self._readers[split]()
        return self._rows[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def local_files(task: str, source: Any) -> tuple[Path, Path]:
    """Where a task's test rows are, and where those for shots are or would be.

    Args:
        task: its name without ``icl_``.
        source: a file, a folder, or ``{"test": file, "train": file}``.

    Raises:
        RequestError: there is no such file; the second one need not exist.
    """
    if isinstance(source, Mapping):
        unknown = sorted(set(source) - {"test", "train"})
        if unknown or "test" not in source:
            raise RequestError(f"data of {task} names {', '.join(source) or 'nothing'}; it takes test and train")
        test = Path(source["test"])
        train = Path(source["train"]) if "train" in source else beside(test)
        if "train" in source and not train.is_file():
            raise RequestError(f"data of {task}: there is no file {train}")
    elif isinstance(source, (str, PathLike)):
        test = Path(source)
        if test.is_dir():
            folder = test
            test = next(
                (path for end in (*SUFFIXES, TEXT) if (path := folder / (task + end)).is_file()),
                folder / f"{task}.jsonl",
            )
        train = beside(test)
    else:
        raise RequestError(f"data of {task} is {source!r}, neither a file nor a folder nor test and train")
    if not test.is_file():
        raise RequestError(f"data of {task}: there is no file {test}")
    return test, train


def beside(test: Path) -> Path:
    """``rte.jsonl`` -> ``rte.train.jsonl``, or the compressed one if only that is there."""
    stem = test.name.removesuffix(".gz").removesuffix(".jsonl")
    found = [test.with_name(f"{stem}.train{end}") for end in SUFFIXES]
    return next((path for path in found if path.is_file()), found[0])


def read_file(path: Path, fields: Mapping[str, str], labels: Sequence[Sequence[str]]) -> Rows:
    """The rows of a local file.

    Raises:
        RequestError: a row that cannot be used, by file, line and field; no row at all.
    """
    if not path.is_file():
        raise RequestError(f"there is no file {path} to draw demonstrations from")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(read_objects(str(path)), 1):
        if isinstance(row, Malformed):
            raise RequestError(f"{path}, row {number}: {row.reason}")
        rows.append(checked(row, len(rows), fields, labels, f"{path}, row {number}"))
    if not rows:
        raise RequestError(f"{path} has no rows")
    return Rows(rows, fields)


def checked(
    row: Mapping[str, Any], index: int, fields: Mapping[str, str], labels: Sequence[Sequence[str]], where: str
) -> dict[str, Any]:
    """A row's declared fields, the label as a number, and the row's place.

    Args:
        fields: field -> kind, a key of :data:`KINDS`, or ``"label"``; ``answer.value`` is a field of a field.
        labels: class by class the words that name it; what else stands for it is its number.
    """
    kept: dict[str, Any] = {}
    for name, kind in fields.items():
        top, _, inner = name.partition(".")
        value: Any = row
        for part in (top, inner) if inner else (top,):
            if not isinstance(value, Mapping) or part not in value:
                raise RequestError(f"{where}: there is no field {name!r}; the row has {', '.join(row) or 'none'}")
            value = value[part]
        if kind == "label":
            value = label_of(value, labels)
            if value is None:
                known = "; ".join(f"{i} or {' or '.join(words)}" for i, words in enumerate(labels))
                raise RequestError(f"{where}: field {name!r} is {row[name]!r}, no label; labels are {known}")
        elif not KINDS[kind](value):
            raise RequestError(f"{where}: field {name!r} is {str(value)[:60]!r}, which is not {WORDS[kind]}")
        kept[top] = row[top] if inner else value
    return {**kept, INDEX: index}


def label_of(value: Any, labels: Sequence[Sequence[str]]) -> int | None:
    """The class that a label names: a word first, else its number."""
    for number, words in enumerate(labels):
        if isinstance(value, (str, bool)) and str(value).strip().casefold() in (word.casefold() for word in words):
            return number
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    return value if type(value) is int and 0 <= value < len(labels) else None


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and value.strip().isdigit())


KINDS: dict[str, Callable[[Any], bool]] = {
    "text": is_text,
    "maybe": lambda value: isinstance(value, str),
    "texts": are_texts,
    "number": is_number,
    "lettered": lambda value: (
        isinstance(value, dict)
        and are_texts(value.get("text"))
        and are_texts(value.get("label"))
        and len(value["text"]) == len(value["label"])
    ),
    "object": lambda value: isinstance(value, dict),
}
WORDS = {
    "text": "a text",
    "maybe": "a text, which may be empty",
    "texts": "a list of texts",
    "number": "a whole number",
    "lettered": 'an object with as many "text" as "label"',
    "object": "an object",
}
