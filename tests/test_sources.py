"""What an input names: files, folders, patterns; and how far some files have been read."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
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
    return [str(Path(path).relative_to(folder)) for path in inputs_of(source, format).files]


def test_a_folder_stands_for_its_files(folder: Path) -> None:
    assert names_of(folder, str(folder)) == ["a.txt", "b.jsonl", "deep/er/c.csv.gz", "x[1].txt"]
    assert names_of(folder, f"{folder}/", "text") == ["a.txt", "b.jsonl", "deep/er/c.csv.gz", "notes.md", "x[1].txt"]


def test_a_pattern_stands_for_what_fits(folder: Path) -> None:
    assert names_of(folder, f"{folder}/*.txt") == ["a.txt", "x[1].txt"]
    assert names_of(folder, f"{folder}/**/*.gz") == ["deep/er/c.csv.gz"]
    assert names_of(folder, f"{folder}/[ab].*") == ["a.txt", "b.jsonl"]


def test_a_name_that_exists_is_no_pattern(folder: Path) -> None:
    assert names_of(folder, f"{folder}/x[1].txt") == ["x[1].txt"]
    assert inputs_of("-").files == ["-"]
    assert inputs_of("missing.txt").files == ["missing.txt"]  # whoever opens it says so


def test_names_do_not_depend_on_how_a_path_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    for place, home in ((folder, "."), (folder.parent, folder.name)):
        monkeypatch.chdir(place)
        for source in (str(folder), home, f"{home}/", "~"):
            found = inputs_of(source)
            assert found.names == ["a.txt", "b.jsonl", "deep/er/c.csv.gz", "x[1].txt"] and found.several
        for source in (f"{folder}/deep/*/*.gz", f"{home}/deep/*/*.gz", "~/deep/*/*.gz"):
            assert inputs_of(source).names == ["er/c.csv.gz"]
        for source in (f"{folder}/a.txt", f"{home}/a.txt", "~/a.txt"):
            found = inputs_of(source)
            assert found.names == ["a.txt"] and not found.several and Path(found.files[0]).is_file()
    assert all(Path(file).is_absolute() for file in inputs_of(".").resolved().files)
    assert inputs_of("-").resolved().files == ["-"]


def test_outputs_are_no_inputs(folder: Path) -> None:
    """Whether this run has written them, will write them, or another has."""
    whole = names_of(folder, f"{folder}/")
    before = inputs_of(str(folder), output=f"{folder}/scores/").names
    (folder / "scores").mkdir()
    (folder / "scores" / "part-00000.jsonl").write_text("{}\n")
    assert inputs_of(str(folder), output=f"{folder}/scores/").names == before == whole
    assert "scores/part-00000.jsonl" in names_of(folder, str(folder))
    (folder / "scores" / "_manifest").write_text("{}\n")
    assert names_of(folder, str(folder)) == whole
    assert inputs_of(str(folder / "scores")).names == ["part-00000.jsonl"]  # which is asked for by name
    assert inputs_of(f"{folder}/*/part-*").names == ["scores/part-00000.jsonl"]
    (folder / "scores" / "own.txt").write_text("row")
    assert "scores/own.txt" in names_of(folder, str(folder))
    (folder / "a.txt.1234.partial").write_text("{}")
    assert "a.txt.1234.partial" not in names_of(folder, f"{folder}/*") + names_of(folder, str(folder), "text")
    for source, output, said in (
        (str(folder), f"{folder}/", "holds the input"),
        (f"{folder}/*.txt", str(folder), "holds the input"),
        (str(folder), f"{folder}/a.txt", "would be part of the input"),
        (str(folder), f"{folder}/deep/new.jsonl", "would be part of the input"),
        (f"{folder}/*", f"{folder}/new", "would be part of the input"),
        (f"{folder}/a.txt", f"{folder}/a.txt", "is the input"),
    ):
        with pytest.raises(RequestError, match=said):
            inputs_of(source, output=output)
    assert inputs_of(f"{folder}/*.txt", output=f"{folder}/new.jsonl").names == ["a.txt", "x[1].txt"]
    assert inputs_of(f"{folder}/a.txt", output=f"{folder}/").names == ["a.txt"]


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
    one, other = read_rows(str(path), name="a.jsonl")
    assert one == Row(0, "one", None, "a.jsonl") and one.place == "row 1 of a.jsonl"
    assert other.error is not None and other.error.startswith("row 2 of a.jsonl has no field 'text'")
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


@pytest.mark.skipif(sys.platform == "win32", reason="files are told apart as POSIX does it")
def test_standard_output_is_no_input(folder: Path) -> None:
    """`mlmfast score folder/ > folder/out.jsonl` would read what it writes."""
    code = f"from mlmfast.sources import inputs_of; inputs_of({str(folder)!r})"
    for name, status in (("out.jsonl", 1), ("out.log", 0)):
        with (folder / name).open("wb") as stream:
            found = subprocess.run([sys.executable, "-c", code], stdout=stream, stderr=subprocess.PIPE, text=True)
        assert found.returncode == status and ("standard output is the input" in found.stderr) == bool(status)


def test_names_that_begin_with_a_line_are_read_where_a_pattern_says_so(folder: Path) -> None:
    (folder / "_raw").mkdir()
    (folder / "_raw" / "_c.txt").write_text("row")
    assert names_of(folder, f"{folder}/**/*.txt") == ["a.txt", "x[1].txt"]
    assert names_of(folder, f"{folder}/*/_*.txt") == ["_raw/_c.txt"]


def test_a_file_that_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    """But the first one: what is wrong with it may be wrong with all."""
    for name, content in (("a.jsonl", b'{"text": "fine"}\n'), ("b.jsonl", b"{torn\n"), ("c.csv", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.txt.gz").write_bytes(b"no gzip")
    inputs = inputs_of(str(tmp_path))
    found = [list(inputs.reader(number)()) for number in range(4)]
    assert [len(rows) for rows in found] == [1, 1, 1, 1]
    assert found[2][0].error.startswith("row 1 of c.csv cannot be read: c.csv is empty")
    assert found[1][0].error.startswith("row 1 of b.jsonl is not JSON")
    assert found[3][0].error.startswith("row 1 of d.txt.gz and all after it cannot be read, d.txt.gz is damaged")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(RequestError, match=r"b\.jsonl: no row can be read"):
        inputs_of(str(tmp_path)).reader(0)()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX has named pipes")
def test_a_pipe_has_no_share(tmp_path: Path) -> None:
    """`score <(command)`: nothing can be told of how much there is, and nothing fails."""
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: Path(pipe).write_text("row\n" * 5000))
    writer.start()
    meter = Meter([pipe])
    assert [meter.total() for _ in read_rows(pipe, meter=meter)] == [None] * 5000
    writer.join()
