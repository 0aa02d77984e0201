"""``report.md`` and the published rows: every cell of a small report, compared with text written here."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlmfast.icl import report as module


def numbers(mean: float, std: float | None, error: float | None, chance: float | None) -> dict[str, Any]:
    return {
        "mean": mean,
        "std": std,
        "standard_error": error,
        "chance": chance,
        "repetitions": [mean] * (5 if std else 1),
    }


def result(model: str, task: str, shots: int, metrics: dict[str, Any], **others: Any) -> dict[str, Any]:
    return (
        {"model": model, "task": task, "shots": shots, "seeds": [42], "cut": 0, "examples": 1767}
        | others
        | {"metrics": metrics}
    )


@pytest.fixture
def report() -> dict[str, Any]:
    described = {"kind": "masked", "parameters": 6944000, "dtype": "float32", "metrics": ["window", "original"]}
    parts = {"adjunct_island": {"accuracy": 0.61, "pairs": 100}, "wh_island": {"accuracy": 0.5, "pairs": 100}}
    return {
        "versions": {"mlmfast": "1.2.3", "lm_eval": "0.4.13"},
        "seed": 42,
        "limit": None,
        "notes": ["blimp: its protocol has 0 shots, whatever --shots says (0, 4)"],
        "models": [
            {"label": "tiny", "separator": "\\n "} | described,
            {"label": "gpt2", "separator": "\n", "kind": "causal"}
            | {"parameters": 124439808, "dtype": "float32", "metrics": []},
        ],
        "results": [
            result("tiny", "rte", 0, {"acc": numbers(0.5234, None, 0.0119, 0.5)}),
            result("tiny", "rte", 4, {"acc": numbers(0.55449, 0.01251, 0.0118, 0.5)}, cut=12),
            result("tiny", "cb", 0, {"acc": numbers(0.25, None, 0.06, 1 / 3), "f1": numbers(0.2, None, None, None)}),
            result("tiny", "wmt16_de_en", 1, {"bleu": numbers(2.34, None, None, None)}),
            result("tiny", "blimp", 0, {"acc": numbers(0.555, None, 0.035, 0.5)}, parts=parts, examples=200),
            result("gpt2", "rte", 0, {"acc": numbers(0.5, None, 0.0119, 0.5)}),
        ],
        "run": {"seconds": 12.34, "computed": 1234, "found": 56},
    }


def test_markdown(report: dict[str, Any]) -> None:
    """Row by row: ours by shots, theirs labelled, few in a row of its own, percent but for BLEU."""
    lines = module.markdown(report).splitlines()
    assert lines[:6] == [
        "# In-context evaluation",
        "",
        "| model | kind | parameters | dtype | masked together | line break of its prompts |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| tiny | masked | 6,944,000 | float32 | window, original | the characters `\\n ` |",
        "| gpt2 | causal | 124,439,808 | float32 | causal: nothing | a real one |",
    ]
    start = lines.index("## rte, accuracy")
    assert lines[start + 2 : start + 10] == [
        "1,767 examples; chance 50.0; standard error over examples at most 1.2; 5 repetitions. Requests (candidates "
        "each count) that lost their beginnings, too long for the model: tiny, 4 shots: 12.",
        "",
        "| shots | tiny | gpt2 | GPT-3 1.3B (published) | DeBERTa 1.5B (published) |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 0 | 52.3 | 50.0 | 56.0 | 64.3 |",
        "| 1 |  |  | 49.5 | 64.1 |",
        "| 4 | 55.4 ± 1.3 |  |  |  |",
        "| few |  |  | 50.9 | 62.2 |",
    ]
    start = lines.index("## cb, F1")
    assert lines[start + 2 : start + 7] == [
        "1,767 examples.",
        "",
        "| shots | tiny | gpt2 |",
        "| --- | ---: | ---: |",
        "| 0 | 20.0 |  |",
    ]
    assert "| 1 | 2.3 |  | 25.8 | 23.7 |" in lines
    assert "blimp: its protocol has 0 shots, whatever --shots says (0, 4)." in lines
    start = lines.index("## blimp, accuracy")
    assert lines[start + 2].startswith("200 examples; chance 50.0")
    assert lines[start + 8 : start + 12] == [
        "| paradigm | pairs | tiny |",
        "| --- | ---: | ---: |",
        "| adjunct_island | 100 | 61.0 |",
        "| wh_island | 100 | 50.0 |",
    ]
    assert lines[-3:] == [
        "mlmfast 1.2.3, lm_eval 0.4.13.",
        "",
        "This run: 12.3 s, 1,234 requests computed, 56 answered before.",
    ]
    text = " ".join(lines)
    assert "not measured here: Samuel (2024)" in text and "arXiv 2406.04823" in text and "Only the first" not in text
    limited = module.markdown(report | {"limit": 7})
    assert "Only the first 7 examples were judged, of BLiMP those of each paradigm." in limited


def test_averages(report: dict[str, Any]) -> None:
    """A row only where a model has all of a table's tasks, each by its first metric, in percent."""
    tasks = [name for name, one in module.published()["tasks"].items() if one["table"] == 2]
    tasks.remove("average of table 2")
    results = [result("tiny", name, 0, {"acc": numbers(0.1 * i, None, None, None)}) for i, name in enumerate(tasks)]
    results += [result("tiny", name, 1, {"acc": numbers(0.9, None, None, None)}) for name in tasks[1:]]
    results += [result("gpt2", name, 0, {"acc": numbers(0.5, None, None, None)}) for name in tasks]
    lines = module.markdown(report | {"results": results}).splitlines()
    start = lines.index("## average of table 2, mean over its tasks of what each lists first")
    assert lines[start + 2 : start + 8] == [
        "4 tasks: hellaswag, storycloze, winograd, winogrande.",
        "",
        "| shots | tiny | gpt2 | GPT-3 1.3B (published) | DeBERTa 1.5B (published) |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 0 | 15.0 | 50.0 | 65.5 | 70.2 |",
        "| few |  |  | 64.8 | 75.4 |",
    ]
    assert not any("average of table" in line for line in module.markdown(report).splitlines())


def test_the_gpt2_papers_scores_say_what_is_inferred(report: dict[str, Any]) -> None:
    known = [result("gpt2", "gpt2_wsc_partial", 0, {"acc": numbers(0.5, None, None, 0.5)})]
    assert "it stands under partial." in module.markdown(report | {"results": known})
    assert "it stands under partial." not in module.markdown(report)


def test_the_terminal_has_the_same_numbers(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    module.show(report)
    out = capsys.readouterr().out
    for cell in ("55.4 ± 1.3", "52.3", "64.3", "2.3", "few", "rte, accuracy"):
        assert cell in out


def test_published_scores() -> None:
    """Every task of the evaluation that the tables have; cells from each table's corners."""
    found = module.published()["tasks"]
    assert len(found) == 25 + 4
    theirs = {name: one["scores"] for name, one in found.items()}
    assert theirs["boolq"]["GPT-3 1.3B"] == {"0": 62.4, "1": 63.7, "few": 64.1}
    assert theirs["wsc"]["DeBERTa 1.5B"] == {"0": 71.2, "1": 69.6, "few": 75.0}
    assert theirs["hellaswag"]["GPT-3 1.3B"]["0"] == 54.7 and theirs["winogrande"]["DeBERTa 1.5B"]["few"] == 68.8
    assert theirs["wmt16_de_en"]["GPT-3 1.3B"]["1"] == 25.8 and theirs["wmt16_en_ro"]["DeBERTa 1.5B"]["few"] == 4.1
    assert theirs["nq"]["GPT-3 1.3B"]["0"] == 4.4 and theirs["openbookqa"]["DeBERTa 1.5B"]["few"] == 50.4
    assert theirs["arc_challenge"]["DeBERTa 1.5B"]["0"] == 36.5 and theirs["arc_easy"]["DeBERTa 1.5B"]["0"] == 55.1
    assert all(set(scores) == {"0", "1", "few"} for one in theirs.values() for scores in one.values())
    # A column that had slipped would not keep its row's mean.
    for table, tolerance in ((2, 0.06), (3, 0.06), (4, 0.06)):
        names = [name for name, one in found.items() if one["table"] == table and not name.startswith("average")]
        scores = {shots: [theirs[name]["DeBERTa 1.5B"][shots] for name in names] for shots in ("0", "1", "few")}
        for shots, values in scores.items():
            printed = theirs[f"average of table {table}"]["DeBERTa 1.5B"][shots]
            assert sum(values) / len(values) == pytest.approx(printed, abs=tolerance)


def test_every_task_with_a_published_score_is_one_of_ours() -> None:
    pytest.importorskip("lm_eval", reason='pip install "mlmfast[eval]"')
    from mlmfast.icl.evaluate import known_tasks

    names = {name for name in module.published()["tasks"] if not name.startswith("average")}
    assert names <= set(known_tasks())


def test_files_are_whole(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the file of before, and nothing beside it."""
    module.write(tmp_path / "out", report, [{"a": "\ud800"}])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"report.json", "report.md", "samples.jsonl.gz"}

    def full(descriptor: int) -> None:
        os.ftruncate(descriptor, 10)
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    other = copy.deepcopy(report)
    other["seed"] = 43
    with pytest.raises(OSError, match="no space"):
        module.write(tmp_path / "out", other, [])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
