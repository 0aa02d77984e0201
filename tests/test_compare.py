"""``mlmfast compare``: rows joined, statistics against scipy's, the figure, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import sentences
from pages import logprobs_in
from typer.testing import CliRunner, Result

from mlmfast import cli
from mlmfast import compare as comparing
from mlmfast.outputs import read_records

Record = dict[str, Any]


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, list(arguments))


def record(text: str, pll: float, tokens: int = 2) -> Record:
    return {"text": text, "pll": pll, "tokens": ["a"] * tokens, "logprobs": [pll / tokens] * tokens, "perplexity": 1.0}


def error(text: str | None) -> Record:
    return {"text": text, "error": "row 1 has no token to score"}


def write(path: Path, records: list[Record]) -> str:
    content = "".join(json.dumps(one) + "\n" for one in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def outputs(tmp_path: Path, a: list[Record], b: list[Record]) -> tuple[str, str]:
    return write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)


@pytest.mark.parametrize("ties", [False, True])
def test_statistics_are_scipys(tmp_path: Path, ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(3)
    a = -random.gamma(2, 20, 200)
    b = a + random.normal(0, 10, 200)
    if ties:
        a, b = np.round(a, -1), np.round(b, -1)
    tokens = random.integers(1, 20, (2, 200))
    plls = (a.tolist(), b.tolist())
    texts = [f"text {i}" for i in range(200)]
    sides = [[record(*row) for row in zip(texts, pll, count.tolist())] for pll, count in zip(plls, tokens)]
    found = comparing.compare(*outputs(tmp_path, *sides)).as_dict()
    for name, (one, other) in (("pll", (a, b)), ("pll_per_token", (a / tokens[0], b / tokens[1]))):
        told = found[name]
        assert told["mean"] == pytest.approx([one.mean(), other.mean()])
        assert told["mean_absolute_difference"] == pytest.approx(np.abs(one - other).mean())
        assert told["max_absolute_difference"] == pytest.approx(np.abs(one - other).max())
        assert told["pearson"] == pytest.approx(stats.pearsonr(one, other).statistic)
        assert told["spearman"] == pytest.approx(stats.spearmanr(one, other).statistic)
        assert told["a_higher"] == (one > other).sum() and told["b_higher"] == (one < other).sum()
        assert told["equal"] == (one == other).sum() and (told["equal"] > 0) == ties
    assert found["pll"]["sum"] == pytest.approx([a.sum(), b.sum()])
    order = np.argsort(-np.abs(a - b), kind="stable")[:10]
    assert [one["row"] for one in found["differing"]] == (order + 1).tolist()


def test_rows_with_an_error_on_either_side_are_counted_and_left_out(tmp_path: Path) -> None:
    a = [record("x", -4.0), error("y"), error("z"), record("u", -1.0), error(None)]
    b = [record("x", -5.0), record("y", -5.0), error("z"), error("u"), error(None)]
    found = comparing.compare(*outputs(tmp_path, a, b))
    assert (found.rows, found.errors, found.plls.tolist()) == (5, (3, 3, 4), [[-4.0], [-5.0]])
    told = found.as_dict()
    assert told["errors"] == {"a": 3, "b": 3, "either": 4} and told["compared"] == 1
    assert told["pll"]["pearson"] is None and told["pll"]["mean_absolute_difference"] == 1.0


def test_nothing_in_common_is_no_crash(tmp_path: Path) -> None:
    for rows in ([], [error("x")]):
        a, b = outputs(tmp_path, rows, rows)
        told = json.loads(invoke("compare", a, b, "--json").stdout)
        assert told["compared"] == 0 and told["pll"]["mean"] == [None, None] and told["pll"]["spearman"] is None
        assert invoke("compare", a, b).exit_code == 0
        refused = invoke("compare", a, b, "--figure", str(tmp_path / "c.png"))
        assert refused.exit_code == 2 and "nothing to draw" in refused.stderr


def test_the_rows_that_differ_most(tmp_path: Path) -> None:
    a = [record(text, -1.0) for text in "abcdef"]
    b = [record(text, pll) for text, pll in zip("abcdef", (-1.0, -3.0, 1.0, -3.0, -9.0, -1.5))]
    found = comparing.compare(*outputs(tmp_path, a, b), top=3)
    assert [(one.row, one.text, one.a - one.b) for one in found.differing] == [(5, "e", 8), (2, "b", 2), (3, "c", -2)]
    assert comparing.compare(*outputs(tmp_path, a, b), top=0).differing == []


def test_the_command_prints_and_ends_well(tmp_path: Path) -> None:
    long = "[b]markup[/b] \u202e" + "very " * 40
    a = [record("x", -4.0), record(long, -1234.5), record("half \ud83d", -2.0)]
    b = [record("x", -5.5), record(long, -1240.0), error("half \ud83d")]
    result = invoke("compare", *outputs(tmp_path, a, b))
    assert result.exit_code == 0 and result.stderr == ""
    words = " ".join(result.stdout.split())
    assert "3 rows, 2 compared; with an error: 0 in A, 1 in B, 1 in either" in words
    assert "-1,238.50" in words and "Pearson correlation" in words
    assert "'[b]markup[/b] \\u202every" in words and "…'" in words
    assert (tmp_path / "a.jsonl").name in words


def test_outputs_may_be_folders_or_compressed(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("\n".join(["", *sentences(20)]))
    command = ["score", "in.txt", "--model", str(bert_folder), "--quiet", "--output"]
    assert invoke(*command, "out/", "--shard-rows", "6").exit_code == 1
    assert invoke(*command, "window.jsonl", "--metric", "window").exit_code == 1
    Path("window.jsonl.gz").write_bytes(gzip.compress(Path("window.jsonl").read_bytes()))
    told = [
        json.loads(invoke("compare", "out/", name, "--json").stdout) for name in ("window.jsonl", "window.jsonl.gz")
    ]
    assert told[0] | {"b": ""} == told[1] | {"b": ""}
    assert told[0]["rows"] == 21 and told[0]["compared"] == 20 and told[0]["pll"]["max_absolute_difference"] > 0
    itself = json.loads(invoke("compare", "out/", "out/", "--json").stdout)["pll"]
    assert "Rows that differ" not in invoke("compare", "out/", "out/").stdout
    assert itself["equal"] == 20 and itself["pearson"] == pytest.approx(1) and itself["max_absolute_difference"] == 0
    manifest = Path("out/_manifest").read_bytes().splitlines(keepends=True)
    Path("out/_manifest").write_bytes(b"".join(manifest[:-1]))
    unfinished = invoke("compare", "out/", "window.jsonl")
    assert unfinished.exit_code == 2 and "is not finished" in unfinished.stderr
    Path("out/_manifest").unlink()
    assert "has no _manifest" in invoke("compare", "out/", "window.jsonl").stderr


def test_parquet_is_read_as_json_lines_are(bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, half a surrogate pair and an order beyond what names sort to among it."""
    monkeypatch.chdir(tmp_path)
    texts = ["", "half \ud83d", *sentences(20)]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["score", "in.jsonl", "--model", str(bert_folder), "--quiet", "--shard-rows", "6", "--output"]
    for name in ("jsonl", "parquet"):
        assert invoke(*command, f"{name}/", "--output-format", name, "--html", f"{name}.html").exit_code == 1
    told = json.loads(invoke("compare", "jsonl/", "parquet/", "--json").stdout)
    assert (told["rows"], told["compared"], told["errors"]["either"]) == (22, 20, 2)
    assert told["pll"]["equal"] == 20
    pages = [Path(f"{name}.html").read_text(encoding="utf-8") for name in ("jsonl", "parquet")]
    assert pages[1].count("<tr") == pages[0].count("<tr") and logprobs_in(pages[0]) == logprobs_in(pages[1])
    cut = Path("jsonl/part-00001.jsonl")
    cut.write_bytes(cut.read_bytes().partition(b"\n")[2])  # whole lines, and yet not what was written
    refused = invoke("compare", "jsonl/", "parquet/")
    assert refused.exit_code == 2 and "part-00001.jsonl is not as it was written" in refused.stderr


def test_a_parquet_file_of_others_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for columns in ({"a": [1]}, {"text": ["x"], "logprobs": [["y"]]}, {"text": ["x"], "logprobs": [3]}):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        found = invoke("compare", f"{tmp_path}/a.parquet", f"{tmp_path}/a.parquet")
        assert found.exit_code == 2 and "give an output of mlmfast score" in found.stderr, found.stderr


def test_shards_come_in_the_order_of_numbers(tmp_path: Path) -> None:
    """More than the five digits that names are padded to."""
    manifest = [{"settings": {}}]
    for number in (100_000, 99_999):
        write(tmp_path / f"part-{number}.jsonl", [record(str(number), -1.0)])
        size = (tmp_path / f"part-{number}.jsonl").stat().st_size
        manifest.append({"shard": f"part-{number}", "file": f"part-{number}.jsonl", "bytes": size})
    write(tmp_path / "_manifest", [*manifest, {"complete": {}}])
    assert [one["text"] for one in read_records(str(tmp_path))] == ["99999", "100000"]


SAME = [record("x", -1.0), record("y", -2.0)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([SAME[0], record("z", -2.0)], "row 2 differs at character 1: 'y' in a.jsonl and 'z' in b.jsonl; compare two"),
        ([SAME[0], error(None)], "row 2 differs at character 1: 'y' in a.jsonl and '' in b.jsonl"),
        ([SAME[0]], "b.jsonl has 1 rows and a.jsonl has more"),
        ([*SAME, record("z", -3.0)], "a.jsonl has 2 rows and b.jsonl has more"),
        ([{"prompt": "x"}], "b.jsonl: row 1 has no 'text': give an output of mlmfast score"),
        ([{"text": 3}], "b.jsonl: row 1 has no 'text'"),
        ([{"text": "x", "continuation": "y"}], "b.jsonl: row 1 has no 'pll' and 'tokens'"),
        ([{"text": "x", "pll": "-1", "tokens": ["x"]}], "b.jsonl: row 1 has no 'pll' and 'tokens'"),
        ([{"text": "x", "pll": math.nan, "tokens": ["x"]}], "b.jsonl: row 1 has no 'pll' and 'tokens'"),
        ([{"text": "x", "pll": -1.0, "tokens": []}], "b.jsonl: row 1 has no 'pll' and 'tokens'"),
        ([3], "b.jsonl: line 1 is not a JSON object"),
    ],
)
def test_outputs_that_do_not_belong_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs(tmp_path, SAME, other)
    result = invoke("compare", "a.jsonl", "b.jsonl")
    assert result.exit_code == 2 and result.stdout == "" and message in result.stderr
    assert len(result.stderr.strip().split("\n")) == 1


def test_long_texts_are_shown_where_they_differ(tmp_path: Path) -> None:
    a, b = outputs(tmp_path, [record("a" * 5000 + "b", -1.0)], [record("a" * 5000 + "c", -1.0)])
    refused = invoke("compare", a, b).stderr
    assert "at character 5001" in refused and "aab'" in refused and "aac'" in refused and len(refused) < 500


@pytest.mark.parametrize("content", [b"{torn", b"\xff\xfe", b"[" * 100_000])
def test_damaged_outputs_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    result = invoke("compare", str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl"))
    assert result.exit_code == 2 and "line 1 is not JSON" in result.stderr
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": 1}\n' * 1000)[:-20])
    result = invoke("compare", str(tmp_path / "a.jsonl.gz"), str(tmp_path / "a.jsonl.gz"))
    assert result.exit_code == 2
    assert "cannot read absent" in invoke("compare", "absent", "absent").stderr


# ---- the figure


@pytest.mark.parametrize("rows", [40, 6000])
def test_the_figure_is_drawn_and_the_same_twice(tmp_path: Path, rows: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    random = np.random.default_rng(5)
    plls = -random.gamma(2, 20, rows)
    noisy = plls + random.normal(0, 3, rows)
    texts = [str(i) for i in range(rows)]
    sides = [[record(text, pll) for text, pll in zip(texts, side.tolist())] for side in (plls, noisy)]
    a, b = write(tmp_path / "$a$.jsonl", sides[0]), write(tmp_path / "b.jsonl", sides[1])
    result = invoke("compare", a, b, "--figure", str(tmp_path / "c.png"))
    assert result.exit_code == 0 and result.stderr == f"mlmfast: {tmp_path}/c.png is drawn\n"
    png = (tmp_path / "c.png").read_bytes()
    picture = image.imread(io.BytesIO(png))
    assert picture.shape[:2] == (1120, 1200)
    assert 0.005 < (picture[..., :3] < 0.99).any(-1).mean() < 0.4  # neither blank nor black
    invoke("compare", a, b, "--figure", str(tmp_path / "c.svg"))
    svg = (tmp_path / "c.svg").read_bytes()
    for suffix, content in (("png", png), ("svg", svg)):
        invoke("compare", a, b, "--figure", str(tmp_path / f"again.{suffix}"))
        assert (tmp_path / f"again.{suffix}").read_bytes() == content
    assert svg.count(b"PathCollection") == (1 if rows < comparing.POINTS else 0)
    assert "$a$.jsonl" in svg.decode()  # a comment beside the drawn label


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ("c.pdf", "name ends in .png or .svg"),
        ("a.png", "is an input too"),
        ("absent/c.png", "there is no folder absent"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.png"), SAME)
    before = Path("a.png").read_bytes()
    result = invoke("compare", "a.png", "a.png", "--figure", figure)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert Path("a.png").read_bytes() == before
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "mlmfast[eval]"' in invoke("compare", "a.png", "a.png", "--figure", "c.png").stderr
