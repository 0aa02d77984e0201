"""Every task of the paper under a masked and a causal model, by the command line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import causal
import checkpoints
import icl_rows
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from mlmfast import cli

pytest.importorskip("lm_eval", reason='pip install "mlmfast[eval]"')

METRICS = {"cb": ["acc", "f1"], "multirc": ["exact_match", "f1"], "record": ["exact_match", "f1"]}
METRICS |= {name: ["bleu"] for name in icl_rows.TRANSLATIONS}
METRICS |= {name: ["exact_match"] for name in ("nq", "triviaqa", "webqs")}
# One over the number of candidates; the rows here have three endings of HellaSwag's.
CHANCE = {"boolq": 0.5, "cb": 1 / 3, "copa": 0.5, "rte": 0.5, "wic": 0.5, "hellaswag": 1 / 3, "storycloze": 0.5}
CHANCE |= {"winogrande": 0.5, "piqa": 0.5}


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("all")
    for name in ("masked", "causal", "data"):
        (folder / name).mkdir()
    masked = checkpoints.small_bert(len(bert_tokenizer), max_position_embeddings=1500)
    checkpoints.save(folder / "masked", masked, bert_tokenizer)
    tokenizer = causal.gpt2_tokenizer()
    checkpoints.save(folder / "causal", causal.small_gpt2(len(tokenizer), n_positions=1500), tokenizer)
    icl_rows.write(folder / "data")
    arguments = ["eval", "--model", str(folder / "masked"), "--model", str(folder / "causal"), "--tasks", "icl"]
    arguments += ["--data", str(folder / "data"), "--shots", "1", "--repetitions", "2", "--samples", "--quiet"]
    result = CliRunner().invoke(cli.app, [*arguments, "--output", str(folder / "out")])
    assert result.exit_code == 0, result.output
    with gzip.open(folder / "out" / "samples.jsonl.gz", "rt") as stream:
        samples = [json.loads(line) for line in stream]
    return json.loads((folder / "out" / "report.json").read_text()), samples, folder


Report = tuple[dict[str, Any], list[dict[str, Any]], Path]


def test_every_task_has_its_metrics_and_repetitions(report: Report) -> None:
    """First the metric that the paper's tables print; ReCoRD, StoryCloze and translation once."""
    found = {(result["model"], result["task"]): result for result in report[0]["results"]}
    assert set(found) == {(model, task) for model in ("masked", "causal") for task in icl_rows.ROWS}
    once = {"record", "storycloze", *icl_rows.TRANSLATIONS}
    for (_, task), result in found.items():
        assert list(result["metrics"]) == METRICS.get(task, ["acc"]), task
        assert len(result["seeds"]) == (1 if task in once else 2), task
        assert result["examples"] == len(icl_rows.ROWS[task][0]), task
        numbers = next(iter(result["metrics"].values()))
        if task in CHANCE:
            assert numbers["chance"] == pytest.approx(CHANCE[task]), task
        if task in icl_rows.GENERATION or task == "multirc":
            assert numbers["chance"] is None, task
        assert 0 <= numbers["mean"] <= (100 if "bleu" in result["metrics"] else 1), task
        has_error = numbers["standard_error"] is not None
        assert has_error == (task not in icl_rows.TRANSLATIONS and task != "multirc" and result["examples"] > 1), task


def test_chance_of_wsc(tmp_path: Path) -> None:
    """Of n noun phrases a blind choice finds the right one with 1/n, and with 1 - 1/n does not find a wrong one."""
    from mlmfast.icl import judging

    right, wrong = (dict(row) for row in icl_rows.ROWS["wsc"][0][:2])
    right["candidates"] = [*right["candidates"], "the harbour", "the rain"]
    assert (right["label"], wrong["label"]) == (1, 0) and len(wrong["candidates"]) == 2
    (tmp_path / "wsc.jsonl").write_text(json.dumps(right) + "\n" + json.dumps(wrong) + "\n")
    task = judging.loaded("wsc", {"test": tmp_path / "wsc.jsonl"}, 0, 42, "\n")
    docs = list(task.test_docs())
    assert [len(task.doc_to_choice(doc)) for doc in docs] == [4, 2]
    assert judging._chance(task, "acc", docs) == pytest.approx((1 / 4 + 1 / 2) / 2)
    (tmp_path / "wsc.jsonl").write_text(json.dumps(right | {"label": 0}) + "\n")
    (doc,) = judging.loaded("wsc", {"test": tmp_path / "wsc.jsonl"}, 0, 42, "\n").test_docs()
    assert judging._chance(task, "acc", [doc]) == pytest.approx(3 / 4)


def test_choices_are_the_tasks_own(report: Report) -> None:
    """With the correction by the unconditional score where a task has it: the accuracy follows from the choices."""
    for result in report[0]["results"]:
        task = result["task"]
        if task in icl_rows.GENERATION or "acc" not in result["metrics"] or task == "wsc":
            continue
        mine = [s for s in report[1] if (s["model"], s["task"]) == (result["model"], task)]
        for repetition, value in enumerate(result["metrics"]["acc"]["repetitions"]):
            right = [s["choice"] == s["target"] for s in mine if s["repetition"] == repetition]
            assert value == pytest.approx(sum(right) / len(right)), task
        doubled = task in ("arc_easy", "arc_challenge", "openbookqa")
        assert all(len(s["responses"]) == (1 + doubled) * len(s["candidates"]) for s in mine), task


def test_a_causal_model_generates_by_its_own_beams(report: Report) -> None:
    """transformers' ``generate`` on the same prompts, up to the first of the stop strings."""
    model, tokenizer = causal.small_gpt2(len(causal.gpt2_tokenizer()), n_positions=1500), causal.gpt2_tokenizer()
    samples = [s for s in report[1] if (s["model"], s["task"], s["repetition"]) == ("causal", "nq", 0)]
    assert samples
    for sample in samples:
        ((prompt, settings),) = sample["arguments"]
        assert settings["num_beams"] == 4 and settings["max_gen_toks"] == 16 and "\n" in settings["until"]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 16, "min_new_tokens": 2, "pad_token_id": 0}
        with torch.inference_mode():
            text = tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :])
        for stop in [*settings["until"], causal.END]:
            text = text.split(stop)[0]
        assert text.startswith(sample["responses"][0]) and sample["responses"][0] in (text, text.strip())
