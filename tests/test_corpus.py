"""Windows, files and folders: no row is lost or written twice, wherever a run ends."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlmfast
from mlmfast import corpus, ledger, shards
from mlmfast.corpus import one_by_one, open_sink, score_window, windows, write_rows, write_shards
from mlmfast.errors import MLMFastError, RequestError, TextError
from mlmfast.fasta import FastaRow
from mlmfast.model import MaskedLM
from mlmfast.outputs import read_records
from mlmfast.readers import Row, read_rows
from mlmfast.results import Score
from mlmfast.shards import Shard, ShardFolder, written
from mlmfast.writers import Record, Tally


class WordModel:
    """Stands for a MaskedLM: a word's log-probability is minus its length; dies when asked to."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.calls: list[list[str]] = []
        self.dies_after = dies_after

    def score(self, texts: list[str], *, on_error: str, progress: bool, **options: Any) -> list[Score | TextError]:
        assert on_error == "return"
        if self.dies_after is not None and len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        return [self._one(i, text) for i, text in enumerate(texts)]

    def _one(self, index: int, text: str) -> Score | TextError:
        words = text.split()
        if not words:
            return TextError(index, "is empty")
        logprobs = -np.array([len(word) for word in words], np.float32) / 3
        return Score(text, words, np.arange(len(words)), None, logprobs)


def rows_of(texts: list[str]) -> list[Row]:
    """As they are read: half a surrogate pair is no text."""
    return [Row(i, text, "holds U+D83D" if "\ud83d" in text else None) for i, text in enumerate(texts)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# ---- windows


@given(st.lists(st.integers(0, 20_000), max_size=60))
def test_windows_hold_every_row_once(lengths: list[int]) -> None:
    rows = rows_of(["x" * length for length in lengths])
    found = list(windows(rows))
    assert [row for window in found for row in window] == rows
    for window in found:
        *head, _ = [(len(row.text or "") // 3 + 2) ** 2 for row in window]
        assert sum(head) < corpus.WINDOW_COST


@given(st.lists(st.lists(st.integers(0, 30), max_size=30), max_size=4), st.integers(1, 12), st.integers(1, 200))
def test_shards_hold_every_row_once_and_none_of_two_inputs(
    lengths: list[list[int]], size: int, characters: int
) -> None:
    inputs = [(f"input {i}", rows_of(["x" * length for length in some])) for i, some in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_CHARACTERS", characters)
        found = list(shards.shards_of(inputs, size, several=True))
    for number, (name, rows) in enumerate(inputs):
        own = [shard for shard in found if shard.input == name]
        assert [row for shard in own for row in shard.rows] == rows
        assert [shard.name for shard in own] == [f"part-{number:05d}-{i:05d}" for i in range(len(own))]
        for shard in own:
            assert len(shard.rows) <= size
            assert sum(len(row.text or "") for row in shard.rows[:-1]) < characters


def test_windows_are_bounded_in_rows() -> None:
    endless = (Row(i, "short") for i in iter(int, 1))
    assert len(next(windows(endless))) == corpus.WINDOW_ROWS


# ---- records


def test_records(tmp_path: Path) -> None:
    rows = [
        Row(0, "a bcd"),
        Row(1, ""),
        Row(2, None, "row 3 is not UTF-8"),
        Row(3, "half \ud83d", "row 4 holds U+D83D"),
    ]
    sink = open_sink(str(tmp_path / "out.jsonl"), {}, 10, io.BytesIO())
    tally = write_rows(rows, sink, one_by_one(partial(score_window, WordModel(), {})))
    first, *bad = lines(tmp_path / "out.jsonl")
    assert list(first) == ["text", "pll", "tokens", "logprobs", "perplexity"]
    assert np.float32(first["logprobs"]).tolist() == np.float32([-1 / 3, -1]).tolist()
    assert first["pll"] == pytest.approx(-4 / 3)
    assert first["perplexity"] == pytest.approx(np.exp(2 / 3))
    assert bad == [
        {"text": "", "error": "row 2 is empty"},
        {"text": None, "error": "row 3 is not UTF-8"},
        {"text": "half \ud83d", "error": "row 4 holds U+D83D"},
    ]
    assert (tally.rows, tally.errors, tally.tokens) == (4, 3, 2)


def test_a_perplexity_that_overflows_is_null() -> None:
    score = Score("x", ["x"], np.arange(1), None, np.array([-1e4], np.float32), ranks=np.array([7]))
    record = corpus.record_of(Row(0, "x"), score)
    assert record["perplexity"] is None
    assert record["pll"] == -1e4
    assert record["ranks"] == [7]


# ---- files


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "WINDOW_ROWS", 4)


TEXTS = [f"row {i} has words" if i % 5 else "" for i in range(30)]


FACTS = {"weights": "words"}
COLUMNS = {"text": "string", "pll": "double", "tokens": "list<string>", "logprobs": "list<float>"}
COLUMNS |= {"perplexity": "double", "error": "string"}


def run(
    output: str,
    model: WordModel,
    texts: list[str] = TEXTS,
    request: Any = None,
    shard_rows: int = 10,
    format: str | None = None,
    facts: Any = None,
) -> Any:
    """One run as the command makes it: an interrupted one ends in close(), which says what it has left."""
    sink = open_sink(output, request or {"model": "words"}, shard_rows, io.BytesIO(), format)
    tally = Tally()
    compute = one_by_one(partial(score_window, model, {}))

    def engine(todo: Iterator[Shard]) -> Iterator[Record]:
        for shard in todo:
            yield written(shard, sink.paths(), COLUMNS, compute, windows, tally.add)

    try:
        if isinstance(sink, ShardFolder):
            sink.agree(facts or FACTS)
            write_shards(
                shards.shards_of([("texts", rows_of(texts))], shard_rows, several=False), sink, engine, tally.add
            )
        else:
            write_rows(rows_of(texts), sink, compute, tally.add)
    except KeyboardInterrupt:
        return sink.close()
    except BaseException:
        sink.close()
        raise
    sink.close()
    return tally


def whole_file(folder: Path) -> bytes:
    run(str(folder / "whole.jsonl"), WordModel())
    return (folder / "whole.jsonl").read_bytes()


@pytest.mark.usefixtures("small_windows")
def test_an_interrupted_file_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    left = run(str(target), WordModel(dies_after=3))
    assert not target.exists()
    assert len(lines(left)) == 12
    model = WordModel()
    tally = run(str(target), model)
    assert (tally.rows, tally.kept, tally.errors) == (30, 12, 6)
    assert sum(map(len, model.calls)) == 18
    assert target.read_bytes() == whole_file(tmp_path)
    assert not left.exists()


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("cut", [1, 70, 300, 500])
def test_a_torn_partial_file_is_continued_from_its_last_whole_window(tmp_path: Path, cut: int) -> None:
    target = tmp_path / "out.jsonl"
    left = run(str(target), WordModel(dies_after=3))
    left.write_bytes(left.read_bytes()[:-cut])
    tally = run(str(target), WordModel())
    assert tally.rows == 30
    assert tally.kept % 4 == 0
    assert tally.kept < 12
    assert target.read_bytes() == whole_file(tmp_path)


@pytest.mark.usefixtures("small_windows")
def test_rows_of_another_input_are_not_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    run(str(target), WordModel(dies_after=3))
    changed = [*TEXTS[:6], "another row", *TEXTS[7:]]
    tally = run(str(target), WordModel(), changed)
    assert tally.kept == 4  # the windows before the change
    assert [record["text"] for record in lines(target)] == changed


@pytest.mark.usefixtures("small_windows")
def test_a_shorter_input_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    run(str(target), WordModel(dies_after=3))
    run(str(target), WordModel(), TEXTS[:8])
    assert [record["text"] for record in lines(target)] == TEXTS[:8]


@pytest.mark.usefixtures("small_windows")
def test_another_request_does_not_continue_a_partial_file(tmp_path: Path) -> None:
    left = run(str(tmp_path / "out.jsonl"), WordModel(dies_after=3))
    tally = run(str(tmp_path / "out.jsonl"), WordModel(), request={"model": "others"})
    assert tally.kept == 0
    assert left.exists()


def test_an_old_output_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")
    run(str(target), WordModel(dies_after=0))
    assert target.read_text() == "old\n"
    run(str(target), WordModel())
    assert len(lines(target)) == 30


def test_a_run_that_dies_before_its_first_row_leaves_nothing(tmp_path: Path) -> None:
    assert run(str(tmp_path / "out.jsonl"), WordModel(dies_after=0)) is None
    assert list(tmp_path.iterdir()) == []


def test_an_empty_input_makes_an_empty_file(tmp_path: Path) -> None:
    run(str(tmp_path / "out.jsonl"), WordModel(), [])
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_link_is_followed_and_a_missing_folder_refused(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("old\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    run(str(tmp_path / "link.jsonl"), WordModel())
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len(lines(tmp_path / "real.jsonl")) == 30
    with pytest.raises(RequestError, match="there is no folder"):
        run(str(tmp_path / "nowhere" / "out.jsonl"), WordModel())


# ---- folders


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def manifest_of(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "_manifest")


@pytest.mark.usefixtures("small_windows")
def test_a_folder_holds_shards_and_a_manifest(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel(), TEXTS[:25])
    names = ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl"]
    assert list(files_of(tmp_path / "out")) == ["_manifest", *names]
    head, model, *entries, end = manifest_of(tmp_path / "out")
    assert head == {"settings": {"model": "words", "shard_rows": 10, "format": "jsonl"}}
    assert model == {"model": FACTS} and end == {"complete": {"shards": 3, "rows": 25, "errors": 5}}
    assert [(one["shard"], one["file"], one["input"], one["first_row"]) for one in entries] == [
        (name.removesuffix(".jsonl"), name, "texts", 10 * i) for i, name in enumerate(names)
    ]
    counts = [(one["rows"], one["errors"], one["tokens"]) for one in entries]
    assert counts == [(10, 2, 32), (10, 2, 32), (5, 1, 16)]
    found = [record["text"] for name in names for record in lines(tmp_path / "out" / name)]
    assert found == TEXTS[:25]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("dies_after", range(9))
def test_an_interrupted_folder_is_continued_to_the_same_bytes(tmp_path: Path, dies_after: int) -> None:
    run(f"{tmp_path}/whole/", WordModel())
    left = run(f"{tmp_path}/out/", WordModel(dies_after=dies_after))
    assert (left == tmp_path / "out") if dies_after else (left is None and not (tmp_path / "out").exists())
    model = WordModel()
    tally = run(f"{tmp_path}/out/", model)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert (tally.rows, tally.errors) == (30, 6)
    assert len(model.calls) == 9 - dies_after  # windows of 4, 4 and 2 rows in each of three shards: none scored twice


@pytest.mark.usefixtures("small_windows")
def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel())
    before = files_of(tmp_path / "out")
    model = WordModel()
    tally = run(str(tmp_path / "out"), model)  # existing: no slash needed
    assert model.calls == []
    assert (tally.rows, tally.kept, tally.errors, tally.tokens) == (30, 30, 6, 96)
    assert files_of(tmp_path / "out") == before


@pytest.mark.usefixtures("small_windows")
def test_a_folder_refuses_what_it_was_not_made_from(tmp_path: Path) -> None:
    out = f"{tmp_path}/out/"
    run(out, WordModel(), TEXTS[:25])
    before = files_of(tmp_path / "out")
    with pytest.raises(RequestError, match=r"begun with other settings: model was 'words' and is now 'others'"):
        run(out, WordModel(), request={"model": "others"})
    with pytest.raises(RequestError, match=rf"shard_rows was 10 and is now 7\. .* or delete {tmp_path}/out to begin"):
        run(out, WordModel(), shard_rows=7)
    with pytest.raises(RequestError, match="other weights, tokenizer or config under the same name"):
        run(out, WordModel(), facts={"weights": "others"})
    for changed in (["changed", *TEXTS[1:25]], TEXTS[:24], TEXTS[:12], TEXTS[:26], TEXTS):
        with pytest.raises(RequestError, match="made from other rows than texts now has"):
            run(out, WordModel(), changed)
    assert files_of(tmp_path / "out") == before


def test_a_request_that_came_to_nothing_binds_nobody(tmp_path: Path) -> None:
    """A run that was killed before its first shard has written a manifest; another request may have the folder."""
    folder = ShardFolder(tmp_path / "out", {"model": "wrong"}, 10)
    folder.close()
    assert not (tmp_path / "out").exists()
    folder = ShardFolder(tmp_path / "out", {"model": "wrong"}, 10)
    folder.agree({"weights": "wrong"})
    left = (tmp_path / "out" / "_manifest").read_bytes()
    folder.close()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_manifest").write_bytes(left)
    assert run(f"{tmp_path}/out/", WordModel()).rows == 30
    assert manifest_of(tmp_path / "out")[:2] == [
        {"settings": {"model": "words", "shard_rows": 10, "format": "jsonl"}},
        {"model": FACTS},
    ]


@pytest.mark.usefixtures("small_windows")
def test_weights_may_change_before_the_first_shard(tmp_path: Path) -> None:
    """And what was computed of it by the same weights is taken over, whatever the budget of batches is now."""
    out = f"{tmp_path}/out/"
    run(out, WordModel(dies_after=1), facts={"weights": "others", "batch_tokens": 1})
    assert run(out, WordModel(dies_after=1), facts={"weights": "words", "batch_tokens": 2}) == tmp_path / "out"
    model = WordModel()
    run(out, model, TEXTS[:10], facts={"weights": "words", "batch_tokens": 3})
    assert len(model.calls) == 2  # of three windows
    told = [record["model"] for record in manifest_of(tmp_path / "out") if "model" in record]
    assert [one["batch_tokens"] for one in told] == [1, 2]


def test_shards_that_no_line_names_are_not_left_among_others(tmp_path: Path) -> None:
    """A run was killed between a shard's name and its line; another request, or a shorter input, does not have it."""
    out = f"{tmp_path}/out/"

    def killed() -> None:
        run(out, WordModel())
        path = tmp_path / "out" / "_manifest"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))

    killed()
    with pytest.raises(RequestError, match="model was 'words' and is now 'others'"):
        run(out, WordModel(), request={"model": "others"})
    with pytest.raises(RequestError, match=r"no shards of this input: delete part-00001.jsonl, part-00002.jsonl, and"):
        run(out, WordModel(), TEXTS[:10])
    assert run(out, WordModel()).rows == 30


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="files are locked as POSIX does it")
    first = open_sink(f"{tmp_path}/out.jsonl", {"model": "words"}, 10, io.BytesIO())
    assert first.keeps(rows_of(["a"])) is None
    with pytest.raises(RequestError, match="in use by another run"):
        run(f"{tmp_path}/out.jsonl", WordModel())
    first.close()


@pytest.mark.skipif(sys.platform == "win32", reason="open files are deleted as POSIX does it")
def test_a_ledger_that_is_given_up_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run deletes it between its being opened and its being locked."""
    opened = Path.open

    def unlucky(path: Path, *arguments: Any) -> Any:
        stream = opened(path, *arguments)
        path.unlink()
        return stream

    monkeypatch.setattr(Path, "open", unlucky)
    with pytest.raises(RequestError, match="which has ended just now: try again"):
        ledger.Ledger(tmp_path / "_manifest", {})


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("harm", ["cut", "lost"])
def test_a_lost_shard_is_made_again(tmp_path: Path, format: str, harm: str) -> None:
    run(f"{tmp_path}/out/", WordModel(), format=format)
    before = files_of(tmp_path / "out")
    shard = tmp_path / "out" / f"part-00001.{format}"
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-5])
    else:
        shard.unlink()
    folder = ShardFolder(tmp_path / "out", {"model": "words"}, 10, format)
    assert folder.damaged == ["part-00001"]
    folder.close()
    model = WordModel()
    tally = run(f"{tmp_path}/out/", model, format=format)
    assert (tally.rows, tally.kept, len(model.calls)) == (30, 20, 3)
    after = files_of(tmp_path / "out")
    del before["_manifest"], after["_manifest"]
    assert after == before


def test_a_folder_refuses_foreign_shards_and_broken_manifests(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel())
    path = tmp_path / "out" / "_manifest"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'{"shard": "part-00000"', b'{"shard": part-00000"'))
    with pytest.raises(RequestError, match=r"_manifest, line 3 is damaged"):
        run(f"{tmp_path}/out/", WordModel())
    path.write_text("{\n")
    with pytest.raises(RequestError, match="was not written by mlmfast"):
        run(f"{tmp_path}/out/", WordModel())
    path.unlink()
    with pytest.raises(RequestError, match=r"holds shards but no _manifest"):
        run(f"{tmp_path}/out/", WordModel())


def test_an_empty_input_leaves_a_finished_folder(tmp_path: Path) -> None:
    for _ in range(2):
        assert run(f"{tmp_path}/out/", WordModel(), []).rows == 0
        assert manifest_of(tmp_path / "out")[-1] == {"complete": {"shards": 0, "rows": 0, "errors": 0}}
    assert list(read_records(f"{tmp_path}/out")) == []
    assert run(f"{tmp_path}/out/", WordModel()).rows == 30


def test_another_list_of_inputs_is_said(tmp_path: Path) -> None:
    def entry(input: str) -> Record:
        shard = Shard("part-00001-00000", input, rows_of(["a"]))
        return {"shard": shard.name, "file": "x.jsonl", "input": input, "texts_sha256": shard.digest()} | dict.fromkeys(
            ("bytes", "rows", "errors", "tokens"), 1
        )

    folder = ShardFolder(tmp_path / "out", {}, 10)
    folder.agree(FACTS)
    folder.add(entry("c.txt"))
    with pytest.raises(RequestError, match=r"was made from c\.txt, and b\.txt is in its place now"):
        folder.kept(Shard("part-00001-00000", "b.txt", rows_of(["a"])))
    folder.close()


def test_what_differs_from_the_run_that_began_is_told(tmp_path: Path) -> None:
    for facts, remarks in (
        ({"threads": 1, "batch_tokens": 512}, []),
        ({"threads": 1, "batch_tokens": 64}, []),  # taken over
        ({"threads": 8, "batch_tokens": 512}, ["threads 1, now 8"]),
    ):
        folder = ShardFolder(tmp_path / "out", {}, 10)
        assert folder.agree({**FACTS, **facts})["batch_tokens"] == 512 and folder.remarks == remarks
        folder.add(
            {"shard": "part-00000", "file": "x", "input": "x", "texts_sha256": ""}
            | dict.fromkeys(("bytes", "rows", "errors", "tokens"), 1)
        )
        folder.close()


def test_a_digest_is_of_what_is_in_the_rows(tmp_path: Path) -> None:
    """Reasons may name paths, which differ where nothing else does; a name in a FASTA file goes into its record."""

    def digest(*rows: Row) -> str:
        return Shard("part-00000", "x", rows).digest()

    one, other = (Row(0, None, f"row 1 of {where}/x is not UTF-8") for where in ("/a", "/b"))
    assert digest(one) == digest(other) != digest(Row(0, None))
    assert digest(FastaRow(0, "MDE", name="a")) != digest(FastaRow(0, "MDE", name="b"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = ShardFolder(tmp_path / "out", {"model": "words"}, 10)
    with pytest.raises(RequestError, match="in use by another run"):
        run(f"{tmp_path}/out/", WordModel())
    folder.close()
    assert run(f"{tmp_path}/out/", WordModel()).rows == 30


def test_a_full_input_that_grows_by_shards_is_gone_on_with(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel(), TEXTS[:20])
    tally = run(f"{tmp_path}/out/", WordModel(), TEXTS)
    assert (tally.rows, tally.kept) == (30, 20)
    run(f"{tmp_path}/whole/", WordModel())
    out, whole = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
    assert manifest_of(tmp_path / "out")[-1] == manifest_of(tmp_path / "whole")[-1]
    del out["_manifest"], whole["_manifest"]
    assert out == whole


def test_parquet_holds_what_json_lines_hold(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    texts = [*TEXTS, "half \ud83d"]
    for format in ("jsonl", "parquet"):
        run(f"{tmp_path}/{format}/", WordModel(), texts, shard_rows=16, format=format)
    for part in ("part-00000", "part-00001"):
        expected = lines(tmp_path / "jsonl" / f"{part}.jsonl")
        table = pq.read_table(tmp_path / "parquet" / f"{part}.parquet")
        assert table.schema.names == list(COLUMNS)
        for row, record in zip(table.to_pylist(), expected, strict=True):
            text = None if row["text"] is None else row["text"].replace("\\ud83d", "\ud83d")
            assert text == record["text"]
            for name in COLUMNS.keys() - {"text", "logprobs"}:
                assert row[name] == record.get(name)
            if "logprobs" in record:
                assert np.array_equal(np.float32(row["logprobs"]), np.float32(record["logprobs"]))


def test_parquet_needs_a_folder(tmp_path: Path) -> None:
    for output, format in ((f"{tmp_path}/a.parquet", None), ("-", "parquet"), (f"{tmp_path}/a.jsonl", "parquet")):
        with pytest.raises(RequestError, match="written into folders"):
            open_sink(output, {}, 10, io.BytesIO(), format)
    with pytest.raises(RequestError, match="--output-format csv is not known; choose jsonl or parquet"):
        open_sink(f"{tmp_path}/out/", {}, 10, io.BytesIO(), "csv")


# ---- rows that are at fault


class Poisoned(WordModel):
    """Fails on a word, as a tokenizer or a model's own code may; with what, is asked for."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def score(self, texts: list[str], **options: Any) -> Any:
        if any("poison" in text for text in texts):
            raise self.error
        return super().score(texts, **options)


class PanicException(BaseException):
    """As Rust's panics arrive, by this name."""


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IndexError("index out of range"), "cannot be computed: IndexError: index out of range"),
        (PanicException("panicked"), "cannot be computed: PanicException: panicked"),
        (MemoryError(), "cannot be computed: there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "cannot be computed: there is not enough memory"),
    ],
)
def test_a_poisoned_row_costs_no_other(tmp_path: Path, error: BaseException, said: str) -> None:
    texts = [*TEXTS[:7], "poison", *TEXTS[8:]]
    run(f"{tmp_path}/out/", Poisoned(error), texts)
    run(f"{tmp_path}/whole/", WordModel(), TEXTS)
    found = [record for i in range(3) for record in lines(tmp_path / "out" / f"part-{i:05d}.jsonl")]
    whole = [record for i in range(3) for record in lines(tmp_path / "whole" / f"part-{i:05d}.jsonl")]
    assert found[7] == {"text": "poison", "error": f"row 8 {said}"}
    assert found[:7] + found[8:] == whole[:7] + whole[8:]


class Broken(WordModel):
    """Fails on whatever it is asked after so many calls."""

    def __init__(self, error: Exception, after: int = 0) -> None:
        super().__init__()
        self.error = error
        self.after = after

    def score(self, texts: list[str], **options: Any) -> Any:
        if texts and len(self.calls) >= self.after:
            raise self.error
        return super().score(texts, **options)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("error", [ValueError("broken"), TypeError("'NoneType' object is not iterable"), MemoryError()])
def test_what_no_row_is_to_blame_for_ends_the_run(tmp_path: Path, error: Exception, after: int) -> None:
    """And no row has an error for it, so that it is computed when all is well again."""
    memory = isinstance(error, MemoryError)
    kind = MLMFastError if memory else type(error)
    with pytest.raises(kind, match="not enough memory for a single row" if memory else str(error)) as raised:
        run(f"{tmp_path}/out/", Broken(error, after))
    assert memory or any(entry.name == "score" for entry in raised.traceback)  # where it happened can be told
    assert run(f"{tmp_path}/out/", WordModel()).errors == 6  # which are empty
    run(f"{tmp_path}/whole/", WordModel())
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_error_of_the_device_ends_the_run(tmp_path: Path) -> None:
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side"):
        run(f"{tmp_path}/out/", Poisoned(error), ["fine", "poison", "fine"])


@pytest.mark.parametrize("first", [0, 4])
def test_neighbours_at_fault_cost_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Halves and windows of which every row is at fault, from the start or later."""
    monkeypatch.setattr(corpus, "WINDOW_ROWS", 16)
    texts = [f"row {i}" for i in range(90)]
    poisoned = [*range(first, 60), 88, 89]
    for i in poisoned:
        texts[i] = "poison"
    tally = run(f"{tmp_path}/out/", Poisoned(TypeError("odd")), texts, shard_rows=90)
    assert (tally.rows, tally.errors) == (90, len(poisoned))
    found = lines(tmp_path / "out" / "part-00000.jsonl")
    assert [i for i, record in enumerate(found) if "error" in record] == poisoned


# ---- any text

ODD = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(categories=["Cs", "Cc", "So", "Mn", "Cf"]), max_size=12),  # half pairs, controls, emoji ...
    st.sampled_from(
        ["\0", "\u202eabc\u202c", "שלום עולם", "👩‍👩‍👧‍👦", "é", "e\u0301", "[MASK]", "[SEP] x", "\ufffe", " " * 50]
    ),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=3), st.integers(1, 300)),
)


@pytest.fixture(scope="module")
def lm(bert_folder: Path) -> MaskedLM:
    return mlmfast.load(bert_folder)


@settings(max_examples=60)
@given(st.lists(ODD, max_size=12), st.sampled_from(["jsonl", "csv", "parquet"]))
def test_no_text_crashes_a_run(
    lm: MaskedLM, tmp_path_factory: pytest.TempPathFactory, texts: list[str], kind: str
) -> None:
    """Every row has a record in its place, and the good ones' values are those that they have alone."""
    folder = tmp_path_factory.mktemp("odd")
    path = folder / f"rows.{kind}"
    if kind == "jsonl":  # escapes: halves of surrogate pairs get through
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        texts = [text.encode("utf-8", "ignore").decode() for text in texts]
        if kind == "csv":
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
                writer.writerows([["text"], *([text.replace("\0", "")] for text in texts)])
            texts = [text.replace("\0", "") for text in texts]
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    sink = open_sink(str(folder / "out.jsonl"), {}, 10, io.BytesIO())
    try:
        tally = write_rows(read_rows(str(path)), sink, corpus.scored(lm, {}))
    except RequestError as error:
        sink.close()
        assert "no row can be read" in str(error)
        return
    found = lines(folder / "out.jsonl")
    assert (tally.rows, tally.errors) == (len(texts), sum("error" in record for record in found))
    assert [record["text"] for record in found] == texts
    for record in found:
        if "error" not in record:
            (alone,) = lm.score([record["text"]])
            assert record["pll"] == pytest.approx(alone.total, rel=1e-5)


def test_a_line_of_a_megabyte(lm: MaskedLM, tmp_path: Path) -> None:
    """Longer than the model holds: an error that says so, or the beginning, where that is asked for."""
    path = tmp_path / "long.txt"
    path.write_text("a cat\n" + "word " * 200_000 + "\na dog\n")
    for truncation, wrong in ((None, 1), ("right", 0)):
        sink = open_sink(str(tmp_path / "out.jsonl"), {"truncation": truncation}, 10, io.BytesIO())
        tally = write_rows(read_rows(str(path)), sink, corpus.scored(lm, {"truncation": truncation}))
        assert (tally.rows, tally.errors) == (3, wrong)
        found = lines(tmp_path / "out.jsonl")
        assert ("error" in found[1]) == bool(wrong) and all("pll" in found[i] for i in (0, 2))
