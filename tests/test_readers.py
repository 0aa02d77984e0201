"""Readers: every row of a file is accounted for, whatever bytes are in it."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from bz2 import compress as bz2_compress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmfast import readers
from mlmfast.errors import RequestError
from mlmfast.fasta import read_fasta
from mlmfast.readers import Row, read_rows


def texts_and_errors(rows: Any) -> list[str | None]:
    """The text of each row, None for a row with an error."""
    return [row.text if row.error is None else None for row in rows]


@pytest.mark.parametrize(
    "content",
    [
        b"One cat.\nTwo cats.\n",
        b"One cat.\r\nTwo cats.",
        b"One cat.\rTwo cats.\r",
        b"\xef\xbb\xbfOne cat.\nTwo cats.\n",
    ],
    ids=["unix", "windows, no last line end", "old mac", "byte order mark"],
)
def test_text_keeps_all_but_the_line_end(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cats.txt").write_bytes(content)
    assert list(read_rows(str(tmp_path / "cats.txt"))) == [Row(0, "One cat."), Row(1, "Two cats.")]


def test_text_keeps_white_space_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "spaces.txt").write_bytes("  two before\n\n\ttab after\t\n\x0b\u2028one row\n".encode())
    rows = list(read_rows(str(tmp_path / "spaces.txt")))
    assert [row.text for row in rows] == ["  two before", "", "\ttab after\t", "\x0b\u2028one row"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_compressed_files_read_as_plain_ones(tmp_path: Path, suffix: str, kind: str) -> None:
    content = {"txt": "A cat.\n", "jsonl": '{"text": "A cat."}\n', "csv": "text\nA cat.\n"}[kind].encode()
    compress = {".gz": gzip.compress, ".bz2": bz2_compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"cat.{kind}{suffix}"
    path.write_bytes(compress(content))
    assert list(read_rows(str(path))) == [Row(0, "A cat.")]


def test_bad_bytes_spoil_only_their_own_line(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_bytes("Good café.\n".encode() + "Bad café.\n".encode("latin-1") + b"Good again.\n")
    rows = list(read_rows(str(path)))
    assert texts_and_errors(rows) == ["Good café.", None, "Good again."]
    assert rows[1] == Row(1, None, "row 2 is not UTF-8: byte 0xe9 at character 8")


BAD_JSON = [
    ('{"text": "unclosed', "is not JSON: Unterminated string"),
    ("", None),  # no row at all
    ('["a list"]', "is a JSON array, not an object"),
    ("17", "is a JSON number, not an object"),
    ('{"txt": "other"}', "has no field 'text'; its fields are 'txt'"),
    ('{"text": null}', "has a null in field 'text'"),
    ('{"text": 3}', "has a number in field 'text'"),
    ('{"text": true}', "has a boolean in field 'text'"),
    ('{"text": ["x"]}', "has a array in field 'text'"),
    ('{"text": "half \\ud83d"}', "holds U+D83D, half of a surrogate pair"),
    ("[" * 100_000, "is not JSON"),
    ("1" * 10_000, "is not JSON that can be read"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_bad_json_row_says_why_and_spoils_no_other(tmp_path: Path, line: str, reason: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "before"}}\n{line}\n{{"text": "after \\ud83d\\ude00", "n": 1}}\n', encoding="utf-8")
    rows = list(read_rows(str(path)))
    good = [row.text for row in rows if row.error is None]
    bad = [row.error for row in rows if row.error is not None]
    assert good == ["before", "after 😀"]
    assert [error.startswith(f"row 2 {reason}") for error in bad] == ([] if reason is None else [True]), bad


def test_csv_reads_quotes_and_line_ends_inside_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'id,text\r\n1,"A ""quoted"" cat, with\r\na tail"\r\n\r\n2,plain\r\n')
    assert [row.text for row in read_rows(str(path))] == ['A "quoted" cat, with\r\na tail', "plain"]


def test_a_stray_quote_costs_one_csv_row_and_not_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('id,text\n1,first\n2,"never closed\n3,third\n4,"a ""fourth"" one"\n5,fifth\n', encoding="utf-8")
    rows = list(read_rows(str(path)))
    assert texts_and_errors(rows) == ["first", None, "third", 'a "fourth" one', "fifth"]
    assert "row 2 is malformed CSV" in str(rows[1].error)


def test_a_stray_quote_in_the_last_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\nfirst\n"never closed\nthird\nfourth', encoding="utf-8")
    assert texts_and_errors(read_rows(str(path))) == ["first", None, "third", "fourth"]


def test_csv_rows_of_the_wrong_width_are_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,id\nA cat, a dog,1\nfine,2\nshort\n", encoding="utf-8")
    rows = list(read_rows(str(path)))
    assert texts_and_errors(rows) == [None, "fine", None]
    assert rows[0].error == "row 1 has 3 columns where the first row names 2"


def test_rows_longer_than_the_bound_are_refused_and_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_CHARACTERS", 50)
    long = "x" * 173
    (tmp_path / "long.txt").write_text(f"first\n{long}\nlast\n", encoding="utf-8")
    assert texts_and_errors(read_rows(str(tmp_path / "long.txt"))) == ["first", None, "last"]
    (tmp_path / "long.csv").write_text(f'text\nfirst\n{long}\n"open\n{long}\nlast\n', encoding="utf-8")
    assert texts_and_errors(read_rows(str(tmp_path / "long.csv"))) == ["first", None, None, None, "last"]


def test_tsv_splits_at_tabs(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("id\ttext\n1\tA cat, a dog.\n", encoding="utf-8")
    assert [row.text for row in read_rows(str(tmp_path / "rows.tsv"))] == ["A cat, a dog."]


def test_a_damaged_compressed_file_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)  # text that does not compress to nothing
    texts = ["".join(chr(97 + n) for n in rng.integers(0, 26, 60)) for _ in range(2000)]
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(gzip.compress("\n".join(texts).encode())[:-20_000])
    *good, last = read_rows(str(path))
    assert len(good) > 1000
    assert [row.text for row in good] == texts[: len(good)]
    assert "cannot be read" in str(last.error)


def test_a_text_has_no_fields(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("{}\n")
    for source, format in ((str(path), "auto"), (str(path), "text"), ("-", "auto")):
        with pytest.raises(RequestError, match=r"a line each, and has no field 'good': .* leave --field out"):
            read_rows(source, format=format, field="good")
    assert texts_and_errors(read_rows(str(path), field="text")) == ["{}"]
    with pytest.raises(RequestError, match="row 1 has no field 'good'"):  # of another format it is asked
        read_rows(str(path), format="jsonl", field="good")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "cannot read .*absent.txt: No such file"),
        ("not.txt.gz", b"plain text\n", "cannot read .*not.txt.gz"),
        ("columns.csv", b"id,sentence\n1,x\n", "no column 'text'; its fields are 'id', 'sentence'"),
        ("empty.csv", b"", "is empty"),
        ("twice.csv", b"text,text\na,b\n", "2 columns named 'text'"),
        ("fields.jsonl", b'{"a": "x"}\n{"a": "y"}\n', "no row can be read: row 1 has no field 'text'"),
        ("latin.txt", "é\n".encode("latin-1"), "no row can be read: row 1 is not UTF-8"),
        ("not.parquet", b"no parquet at all", "is not a readable Parquet file"),
    ],
)
def test_a_wrong_request_is_found_before_the_first_row(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_rows(str(tmp_path / name))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot read .*directory"):
        read_rows(str(tmp_path))


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    texts = ["First.", None, "Third, élan.", ""]
    table = pa.table({"text": texts, "word": pa.array(texts).dictionary_encode(), "id": [1, 2, 3, 4]})
    pq.write_table(table, path, row_group_size=2)
    for field in ("text", "word"):
        rows = list(read_rows(str(path), field=field))
        assert [row.text for row in rows] == texts
        assert [row.error for row in rows] == [None, f"row 2 has a null in field {field!r}, not a string", None, None]
    with pytest.raises(RequestError, match="column 'id' holds int64, not strings"):
        read_rows(str(path), field="id")
    with pytest.raises(RequestError, match="no column 'nowhere'; its fields are 'text', 'word', 'id'"):
        read_rows(str(path), field="nowhere")


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    values = pa.array([b"good", "caf\xe9".encode("latin-1"), b"also good"], pa.binary())
    pq.write_table(pa.table({"text": values.view(pa.string())}), tmp_path / "rows.parquet")
    rows = list(read_rows(str(tmp_path / "rows.parquet")))
    assert texts_and_errors(rows) == ["good", None, "also good"]
    assert "byte 0xe9 at character 4" in str(rows[1].error)


def test_parquet_without_pyarrow_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r'pip install "mlmfast\[parquet\]"'):
        read_rows(str(tmp_path / "rows.parquet"))


ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))


@given(st.lists(ANY_TEXT, max_size=8))
def test_any_text_survives_json_lines(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts))
    assert [row.text for row in read_rows(str(path))] == texts


@given(st.binary(max_size=200), st.sampled_from(["txt", "jsonl", "csv", "tsv", "parquet", "txt.gz", "csv.bz2"]))
def test_no_bytes_crash_a_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"rows.{suffix}"
    path.write_bytes(content)
    leniently = list(read_rows(str(path), lenient=True))
    try:
        rows = list(read_rows(str(path)))
    except RequestError:
        assert leniently and all(row.error is not None for row in leniently)
        return
    assert rows == leniently
    assert [row.index for row in rows] == list(range(len(rows)))
    assert all(row.error is not None or row.text is not None for row in rows)
    if suffix == "txt":  # a line is a row, whatever is in it
        expected = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removeprefix(b"\xef\xbb\xbf")
        assert len(rows) == len(expected.split(b"\n")) - (expected.endswith(b"\n") or not expected)


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b">a b", b">", b";x", b"MKV", b"\xe9"])), max_size=8)
)
def test_no_bytes_crash_the_reader_of_fasta(tmp_path_factory: pytest.TempPathFactory, content: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.fasta"
    path.write_bytes(b"\n".join(content))
    try:
        rows = list(read_fasta(str(path)))
    except RequestError as error:
        assert "is no FASTA file" in str(error)
        return
    assert [row.index for row in rows] == list(range(len(rows)))
    assert all(row.error is not None or row.text for row in rows)
