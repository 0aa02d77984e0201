"""Windows, files and folders: no row is lost or written twice, wherever a run ends."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmfast import corpus
from mlmfast.corpus import open_sink, score_window, windows, write_rows
from mlmfast.errors import RequestError, TextError
from mlmfast.readers import Row
from mlmfast.results import Score


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
    return [Row(i, text) for i, text in enumerate(texts)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# ---- windows


@given(st.lists(st.integers(0, 20_000), max_size=60), st.one_of(st.none(), st.integers(1, 20)))
def test_windows_hold_every_row_once_and_end_with_shards(lengths: list[int], shard_rows: int | None) -> None:
    rows = rows_of(["x" * length for length in lengths])
    found = list(windows(rows, shard_rows))
    assert [row for window in found for row in window] == rows
    for window in found:
        *head, _ = [(len(row.text or "") // 3 + 2) ** 2 for row in window]
        assert sum(head) < corpus.WINDOW_COST
        if shard_rows is not None:
            assert window[0].index // shard_rows == window[-1].index // shard_rows


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
    tally = write_rows(rows, sink, partial(score_window, WordModel(), {}))
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


def run(output: str, model: WordModel, texts: list[str] = TEXTS, request: Any = None, shard_rows: int = 10) -> Any:
    """One run as the command makes it: an interrupted one ends in close()."""
    sink = open_sink(output, request or {"model": "words"}, shard_rows, io.BytesIO())
    try:
        return write_rows(rows_of(texts), sink, partial(score_window, model, {}))
    except KeyboardInterrupt:
        return sink.close()


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


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("small_windows")
def test_a_folder_holds_shards_and_a_manifest(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel(), TEXTS[:25])
    assert list(shards_of(tmp_path / "out")) == [
        "manifest.json",
        "part-00000.jsonl",
        "part-00001.jsonl",
        "part-00002.jsonl",
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["request"] == {"model": "words", "shard_rows": 10}
    assert manifest["complete"] is True
    assert [(shard["rows"], shard["errors"], shard["tokens"]) for shard in manifest["shards"]] == [
        (10, 2, 32),
        (10, 2, 32),
        (5, 1, 16),
    ]
    found = [record["text"] for i in range(3) for record in lines(tmp_path / "out" / f"part-{i:05d}.jsonl")]
    assert found == TEXTS[:25]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("dies_after", range(9))
def test_an_interrupted_folder_is_continued_to_the_same_bytes(tmp_path: Path, dies_after: int) -> None:
    run(f"{tmp_path}/whole/", WordModel())
    run(f"{tmp_path}/out/", WordModel(dies_after=dies_after))
    model = WordModel()
    tally = run(f"{tmp_path}/out/", model)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
    assert (tally.rows, tally.errors) == (30, 6)
    assert len(model.calls) == 9 - dies_after  # windows of 4, 4 and 2 rows in each of three shards: none scored twice


@pytest.mark.usefixtures("small_windows")
def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel())
    before = shards_of(tmp_path / "out")
    model = WordModel()
    tally = run(str(tmp_path / "out"), model)  # existing: no slash needed
    assert model.calls == []
    assert (tally.rows, tally.kept, tally.errors, tally.tokens) == (30, 30, 6, 96)
    assert shards_of(tmp_path / "out") == before


@pytest.mark.usefixtures("small_windows")
def test_a_folder_refuses_what_it_was_not_made_from(tmp_path: Path) -> None:
    out = f"{tmp_path}/out/"
    run(out, WordModel(), TEXTS[:25])
    before = shards_of(tmp_path / "out")
    with pytest.raises(RequestError, match=r"begun by another request .model 'words', now 'others'"):
        run(out, WordModel(), request={"model": "others"})
    with pytest.raises(RequestError, match="shard_rows 10, now 7"):
        run(out, WordModel(), shard_rows=7)
    for changed in (["changed", *TEXTS[1:25]], TEXTS[:24], TEXTS[:12], TEXTS[:26], TEXTS):
        with pytest.raises(RequestError, match="made from other rows"):
            run(out, WordModel(), changed)
    assert shards_of(tmp_path / "out") == before


def test_a_folder_refuses_lost_shards_and_foreign_ones(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel())
    shard = tmp_path / "out" / "part-00001.jsonl"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(RequestError, match=r"part-00001\.jsonl is missing or not what was written"):
        run(f"{tmp_path}/out/", WordModel())
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(RequestError, match="not a manifest that can be read"):
        run(f"{tmp_path}/out/", WordModel())
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(RequestError, match="holds shards but no manifest"):
        run(f"{tmp_path}/out/", WordModel())


def test_a_full_input_that_grows_by_shards_is_gone_on_with(tmp_path: Path) -> None:
    run(f"{tmp_path}/out/", WordModel(), TEXTS[:20])
    tally = run(f"{tmp_path}/out/", WordModel(), TEXTS)
    assert (tally.rows, tally.kept) == (30, 20)
    run(f"{tmp_path}/whole/", WordModel())
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
