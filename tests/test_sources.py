"""What an input names: files, folders, patterns; and how far some files have been read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mlmfast.errors import RequestError
from mlmfast.readers import Meter, Row, read_rows
from mlmfast.sources import inputs_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = [
        "b.jsonl",
        "a.txt",
        "deep/er/c.csv.gz",
        "notes.md",
        ".hidden.txt",
        "_manifest",
        "deep/.git/d.txt",
        "x[1].txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    return tmp_path


def names_of(folder: Path, source: str, format: str = "auto") -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in inputs_of(source, format)]


def test_a_folder_stands_for_its_files(folder: Path) -> None:
    assert names_of(folder, str(folder)) == ["a.txt", "b.jsonl", "deep/er/c.csv.gz", "x[1].txt"]
    assert names_of(folder, f"{folder}/", "text") == ["a.txt", "b.jsonl", "deep/er/c.csv.gz", "notes.md", "x[1].txt"]


def test_a_pattern_stands_for_what_fits(folder: Path) -> None:
    assert names_of(folder, f"{folder}/*.txt") == ["a.txt", "x[1].txt"]
    assert names_of(folder, f"{folder}/**/*.gz") == ["deep/er/c.csv.gz"]
    assert names_of(folder, f"{folder}/[ab].*") == ["a.txt", "b.jsonl"]


def test_a_name_that_exists_is_no_pattern(folder: Path) -> None:
    assert names_of(folder, f"{folder}/x[1].txt") == ["x[1].txt"]
    assert inputs_of("-") == ["-"]
    assert inputs_of("missing.txt") == ["missing.txt"]  # whoever opens it says so


def test_nothing_found_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, said in (
        (f"{folder}/*.parquet", "no file fits"),
        (str(tmp_path / "empty"), "no file of a known format"),
    ):
        with pytest.raises(RequestError, match=said):
            inputs_of(source)


def test_rows_of_several_files_name_theirs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{}\n')
    one, other = read_rows(str(path), several=True)
    assert one == Row(0, "one", None, str(path)) and one.place == f"row 1 of {path}"
    assert other.error is not None and other.error.startswith(f"row 2 of {path} has no field 'text'")
    assert next(iter(read_rows(str(path)))) == Row(0, "one")


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "parquet"])
def test_a_meter_tells_how_many_rows_there_may_be(tmp_path: Path, kind: str) -> None:
    texts = [f"{i:06d} some words of a row" for i in range(40_000)]
    paths = [str(tmp_path / f"{part}.{kind}") for part in "ab"]
    for path in paths:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
        else:
            content = "\n".join(texts).encode()
            Path(path).write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    meter = Meter([*paths, "-"])
    assert meter.total() is None
    seen = 0
    for path in paths:
        for row in read_rows(path, meter=meter):
            seen += 1
            if row.index == 20_000:
                assert meter.total() == pytest.approx(80_000, rel=0.15)  # files are read in blocks
    assert seen == meter.rows == meter.total() == 80_000
