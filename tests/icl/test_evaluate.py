"""``mlmfast eval``: its numbers against plain loops, what it refuses, and what it writes."""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal
import checkpoints
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

import mlmfast
from mlmfast import cli
from mlmfast.errors import CheckpointError, RequestError

pytest.importorskip("lm_eval", reason='pip install "mlmfast[eval]"')

import evaluation
from evaluation import Inputs
from lm_eval.api.instance import Instance

from mlmfast.icl import checkpoints as icl_checkpoints
from mlmfast.icl import commands, evaluate, models
from mlmfast.icl.evaluate import Plan
from mlmfast.identity import digest

LITERAL = "\\n "


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: PreTrainedTokenizerBase) -> Inputs:
    return evaluation.make(tmp_path_factory.mktemp("inputs"), bert_tokenizer)


def plan(inputs: Inputs, *models: Path, tasks: tuple[str, ...] = ("rte",), **options: Any) -> Plan:
    rte = {"test": inputs.rte, "train": inputs.train}
    data = {name: one for name, one in {"rte": rte, "blimp": {"test": inputs.blimp}}.items() if name in tasks}
    return Plan(models=[str(model) for model in models], tasks=tasks, data=data, **options)


@pytest.fixture(scope="module")
def ran(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """RTE of both models without and with two shots, and BLiMP."""
    asked = plan(inputs, inputs.masked, inputs.causal, tasks=("rte", "blimp"), shots=(0, 2), repetitions=3)
    samples: list[dict[str, Any]] = []
    folder = tmp_path_factory.mktemp("report")
    return evaluate.run(asked, folder, samples=samples), samples, folder


Ran = tuple[dict[str, Any], list[dict[str, Any]], Path]


def of(samples: list[dict[str, Any]], model: str, task: str, shots: int) -> list[dict[str, Any]]:
    return [s for s in samples if (s["model"], s["task"], s["shots"]) == (model, task, shots)]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["eval", *arguments])


def solved(row: dict[str, Any], line: str) -> str:
    return f"{row['premise']}{line}question: {row['hypothesis']} True or False?{line}answer: {row['label']}"


# ---- numbers


@pytest.mark.parametrize("shots", [0, 2])
def test_a_masked_models_scores_are_those_of_rank(inputs: Inputs, ran: Ran, shots: int) -> None:
    """The paper's prompt, written here once more; all but the premise's first two words is scored."""
    lm = mlmfast.load(inputs.masked)
    samples = of(ran[1], "masked", "rte", shots)
    assert [sample["example"] for sample in samples] == list(range(evaluation.TESTED)) * (3 if shots else 1)
    texts = {solved(row, LITERAL) for row in inputs.shots}
    for sample in samples:
        row = inputs.tested[sample["example"]]
        prompt, (true, false) = sample["arguments"][0][0], [one[1] for one in sample["arguments"]]
        *before, start = prompt.split(LITERAL * 2)
        assert len(before) == shots == len(set(before)) and set(before) <= texts
        assert start == " ".join(row["premise"].split()[:2])
        asked = solved(row | {"label": ""}, LITERAL)
        assert (start + true, start + false) == (asked + "True", asked + "False")
        ranking = lm.rank(prompt, [true, false], metric="window", window=3)
        np.testing.assert_allclose(sample["responses"], ranking.values, rtol=1e-5)
        assert sample["candidates"][sample["choice"]] == ranking.best.split()[-1]
        assert sample["candidates"][sample["target"]] == row["label"]


@pytest.mark.parametrize("shots", [0, 2])
def test_a_causal_models_scores_are_those_of_a_plain_loop(inputs: Inputs, ran: Ran, shots: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs.causal).eval()
    tokenizer = AutoTokenizer.from_pretrained(inputs.causal)
    samples = of(ran[1], "causal", "rte", shots)
    assert len(samples) == evaluation.TESTED * (3 if shots else 1)
    for sample in samples:
        row = inputs.tested[sample["example"]]
        assert sum(map(len, sample["arguments"][0])) > len(solved(row, "\n")) - 2
        assert "".join(sample["arguments"][0]).endswith(solved(row | {"label": "True"}, "\n"))
        for (prompt, answer), response in zip(sample["arguments"], sample["responses"]):
            assert response == pytest.approx(loop(model, tokenizer, prompt, answer), rel=1e-5)


@torch.inference_mode()
def loop(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """A token at a time, each after all before it; nothing before the text's first but its begin."""
    start = len(tokenizer(prompt)["input_ids"]) if prompt else 1
    ids = ([] if prompt else [tokenizer.bos_token_id]) + tokenizer(prompt + answer)["input_ids"]
    total = 0.0
    for place in range(start, len(ids)):
        total += float(model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(0)[ids[place]])
    return total


def test_accuracies_are_those_of_the_examples(inputs: Inputs, ran: Ran) -> None:
    """Means, deviations and standard errors by the standard library, of choices made here."""
    report, samples, _ = ran
    assert [(r["model"], r["task"], r["shots"]) for r in report["results"]] == [
        (model, task, shots) for model in ("masked", "causal") for task, shots in (("rte", 0), ("rte", 2), ("blimp", 0))
    ]
    for result in report["results"]:
        if result["task"] == "blimp":
            continue
        found = of(samples, result["model"], "rte", result["shots"])
        right: dict[int, list[float]] = {}
        for sample in found:
            best = int(np.argmax(sample["responses"]))
            label = inputs.tested[sample["example"]]["label"]
            right.setdefault(sample["repetition"], []).append(float(["True", "False"][best] == label))
        means = [statistics.mean(one) for one in right.values()]
        numbers = result["metrics"]["acc"]
        assert numbers["repetitions"] == pytest.approx(means)
        assert numbers["mean"] == pytest.approx(statistics.mean(means))
        errors = [statistics.stdev(one) / len(one) ** 0.5 for one in right.values()]
        assert numbers["standard_error"] == pytest.approx(statistics.mean(errors))
        assert numbers["chance"] == 0.5 and result["examples"] == evaluation.TESTED
        if result["shots"]:
            assert numbers["std"] == pytest.approx(statistics.stdev(means)) and result["seeds"] == [42, 43, 44]
        else:
            assert numbers["std"] is None and result["seeds"] == [42]


def test_every_repetition_draws_anew_and_both_models_see_the_same(ran: Ran) -> None:
    def prompts(model: str, line: str) -> list[str]:
        return [s["arguments"][0][0].replace(line, "|") for s in of(ran[1], model, "rte", 2)]

    masked, gpt = prompts("masked", LITERAL), prompts("causal", "\n")
    assert masked == gpt
    assert len(set(masked)) > 2 * evaluation.TESTED  # some two draws may be alike


def test_blimp(inputs: Inputs, ran: Ran) -> None:
    """Sentences alone: a mask at a time, and by a loop after the begin of a text."""
    lm = mlmfast.load(inputs.masked)
    gpt, tokenizer = AutoModelForCausalLM.from_pretrained(inputs.causal).eval(), causal.gpt2_tokenizer()
    truths = {
        "masked": lambda text: lm.score([text], metric="original")[0].total,
        "causal": lambda text: loop(gpt, tokenizer, "", text),
    }
    for model, truth in truths.items():
        right: dict[str, list[bool]] = {}
        for pair, sample in zip(inputs.pairs, of(ran[1], model, "blimp", 0)):
            good, bad = truth(pair["sentence_good"]), truth(pair["sentence_bad"])
            assert sample["responses"] == pytest.approx([good, bad], rel=1e-5)
            right.setdefault(pair["UID"], []).append(good > bad)
        (result,) = [r for r in ran[0]["results"] if (r["model"], r["task"]) == (model, "blimp")]
        accuracies = {name: statistics.mean(one) for name, one in right.items()}
        assert {name: part["accuracy"] for name, part in result["parts"].items()} == pytest.approx(accuracies)
        assert result["metrics"]["acc"]["mean"] == pytest.approx(statistics.mean(accuracies.values()))
        assert {part["pairs"] for part in result["parts"].values()} == {evaluation.PAIRS}
    assert [model["metrics"] for model in ran[0]["models"]] == [["window", "original"], []]


def test_weights_that_make_no_sense_are_refused(short: Callable[[int], Path]) -> None:
    """As of a masked model: NaN, and what the checkpoint has not and would be random."""
    folder = short(64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[2] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="holds NaN"):
        models.open_model(str(folder), models.Settings())
    config = model.config.to_dict() | {"n_layer": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="freshly initialised"):
        models.open_model(str(folder), models.Settings())


def test_tiny_has_line_breaks_and_its_trained_semantics() -> None:
    """Its texts had spaces where line breaks were, and the paper's DeBERTa was the fixed one."""
    opened = models.open_model("tiny", models.Settings())
    assert opened.separator == "\n" and opened.lm.lm.semantics == opened.identity["semantics"] == "trained"
    other = models.open_model("masked:tiny", models.Settings(semantics="upstream"), separator="literal")
    assert other.separator == LITERAL and other.lm.lm.semantics == other.identity["semantics"] == "upstream"
    assert opened.file != other.file and opened.identity["weights"] == other.identity["weights"]


def test_shots_that_a_task_does_not_have_are_said(inputs: Inputs, tmp_path: Path) -> None:
    asked = plan(inputs, inputs.masked, tasks=("rte", "blimp"), limit=1, shots=(0, 2), repetitions=1)
    report = evaluate.run(asked, tmp_path)
    assert report["notes"] == ["blimp: its protocol has 0 shots, whatever --shots says (0, 2)"]
    assert evaluate.run(plan(inputs, inputs.masked, limit=1), tmp_path)["notes"] == []


@pytest.mark.parametrize("own", [0, 20])
def test_masks_and_special_tokens_count_as_length(inputs: Inputs, own: int) -> None:
    """As long as the model holds, nothing is cut; a token more, and what is counted is what is cut."""
    opened = models.open_model(str(inputs.masked), models.Settings())
    assert opened.limit is not None
    room = opened.limit - 2 - own - (models.MASKS - 1)
    for words, over in ((room, False), (room + 1, True)):
        prompt = " ".join(["the"] * words)
        request = Instance("generate_until", {}, (prompt, {"max_gen_toks": own}), 0)
        assert (opened.lengths("generate_until", [request])[0] > opened.limit) == over
        settings = {"num_masks": models.MASKS, "max_new_tokens": own}
        assert (opened.lm._fitting([prompt], settings) != [prompt]) == over


def test_limit_and_metric(inputs: Inputs, tmp_path: Path) -> None:
    settings = models.Settings(metric="global_l2r")
    asked = plan(inputs, inputs.masked, tasks=("rte", "blimp"), limit=2, settings=settings)
    samples: list[dict[str, Any]] = []
    report = evaluate.run(asked, tmp_path, samples=samples)
    assert [result["examples"] for result in report["results"]] == [2, 2 * 3]
    assert report["models"][0]["metrics"] == ["global_l2r"]
    lm = mlmfast.load(inputs.masked)
    prompt, answer = samples[0]["arguments"][0]
    (score,) = lm.score_continuations([(prompt, answer)], metric="global_l2r")
    assert samples[0]["responses"][0] == pytest.approx(score.total, rel=1e-5)


@pytest.fixture
def short(tmp_path: Path) -> Callable[[int], Path]:
    """Makes causal models that hold so many tokens."""

    def make(held: int) -> Path:
        tokenizer = causal.gpt2_tokenizer()
        folder = tmp_path / f"held_{held}"
        folder.mkdir()
        return checkpoints.save(folder, causal.small_gpt2(len(tokenizer), n_positions=held), tokenizer)

    return make


def test_prompts_that_are_too_long_are_counted(inputs: Inputs, short: Callable[[int], Path], tmp_path: Path) -> None:
    """Six shots do not fit, none may; the last token is not read."""
    tokenizer = causal.gpt2_tokenizer()
    lengths = sorted(
        len(tokenizer(solved(row | {"label": label}, "\n"))["input_ids"])
        for row in inputs.tested
        for label in ("True", "False")
    )
    held = lengths[-3] - 1
    report = evaluate.run(plan(inputs, short(held), shots=(0, 6), repetitions=1), tmp_path / "out")
    none, six = (result["cut"] for result in report["results"])
    assert (none, six) == (sum(length - 1 > held for length in lengths), 2 * evaluation.TESTED)
    assert 0 < none < six


def test_a_model_that_cannot_hold_what_is_scored(inputs: Inputs, short: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="held_20 holds 20 tokens, fewer than the"):
        evaluate.run(plan(inputs, short(20)), tmp_path / "out")


# ---- which model is what


def test_kinds_and_line_breaks(inputs: Inputs, ran: Ran) -> None:
    described = {model["label"]: model for model in ran[0]["models"]}
    assert (described["masked"]["kind"], described["masked"]["separator"]) == ("masked", LITERAL)
    assert (described["causal"]["kind"], described["causal"]["separator"]) == ("causal", "\n")
    gpt = AutoModelForCausalLM.from_pretrained(inputs.causal)
    assert described["causal"]["parameters"] == sum(one.numel() for one in gpt.parameters())
    assert icl_checkpoints.kind_of("tiny") == "masked"
    opened = models.open_model(f"causal:{inputs.causal}", models.Settings(), separator="##")
    assert opened.separator == "##" and opened.identity["weights"] == described["causal"]["identity"]["weights"]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "causal"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "masked"),
        ({"model_type": "bert"}, "masked"),
        ({"model_type": "llama"}, "causal"),
        ({"model_type": "roberta", "architectures": ["RobertaModel"]}, "masked"),
    ],
)
def test_the_config_says_the_kind(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert icl_checkpoints.kind_of(str(tmp_path)) == kind


def test_weights_config_and_tokenizer_have_one_digest(inputs: Inputs) -> None:
    opened = models.open_model(str(inputs.causal), models.Settings())
    model, tokenizer = opened.lm.model, opened.lm.tokenizer
    first = digest(model, tokenizer, {})
    again = models.open_model(str(inputs.causal), models.Settings()).identity
    assert first == opened.identity["weights"] == again["weights"]
    found = {first, digest(model, tokenizer, {"extra": torch.ones(2)})}
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] += 1e-4
    found.add(digest(model, tokenizer, {}))
    model.config.attn_pdrop = 0.123
    found.add(digest(model, tokenizer, {}))
    tokenizer.add_tokens(["another"])
    found.add(digest(model, tokenizer, {}))
    assert len(found) == 5


# ---- the command line


def test_the_command_writes_everything(inputs: Inputs, ran: Ran, tmp_path: Path) -> None:
    arguments = ["--model", str(inputs.masked), "--model", str(inputs.causal), "--tasks", "rte, blimp"]
    arguments += [*inputs.data, "--shots", "0,2", "--repetitions", "3", "--output", str(tmp_path / "out"), "--samples"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["results"] == json.loads(json.dumps(ran[0]["results"]))
    assert report["versions"]["mlmfast"] == mlmfast.__version__
    with gzip.open(tmp_path / "out" / "samples.jsonl.gz", "rt") as stream:
        assert [json.loads(line) for line in stream] == json.loads(json.dumps(ran[1]))
    for name in ("shots.png", "size.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    for name in ("shots.svg", "size.svg"):
        svg = (tmp_path / "out" / name).read_text()
        assert "masked" in svg and "GPT-3 1.3B (published)" in svg
    assert "attention_mask" not in result.output
    assert "rte, accuracy" in result.output and "DeBERTa 1.5B" in result.output
    assert "line breaks in prompts are '\\\\n '" in result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"shots.png", "shots.svg", "size.png", "size.svg"}
    assert names == {"answers", "report.json", "report.md", "samples.jsonl.gz"} | pictures


def test_tasks_may_have_their_prefix(inputs: Inputs) -> None:
    data = commands.data_of([f"icl_rte={inputs.rte}", f"icl_rte.train={inputs.train}"], ["icl_rte"])
    assert data == {"rte": {"test": inputs.rte, "train": inputs.train}}


def test_models_without_a_name_of_their_own() -> None:
    assert evaluate.labels_of([".", "causal:.", "a/b"]) == {".": ".", "causal:.": "causal:.", "a/b": "b"}


def test_data_by_folder(inputs: Inputs, tmp_path: Path) -> None:
    """TASK.jsonl and TASK.train.jsonl in one folder; other files there are nobody's."""
    for name, rows in (("rte", inputs.tested), ("rte.train", inputs.shots), ("blimp", inputs.pairs), ("boolq", [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke(
        *("--model", str(inputs.causal), "--tasks", "rte,blimp", "--data", str(tmp_path), "--shots", "2"),
        *("--limit", "1", "--repetitions", "2", "--output", str(tmp_path / "out"), "--quiet"),
    )
    assert result.exit_code == 0 and result.output == "", result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(r["task"], r["examples"]) for r in report["results"]] == [("rte", 1), ("blimp", 3)]
    assert not (tmp_path / "out" / "samples.jsonl.gz").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tasks", "rte,nonsense"], ["--tasks nonsense is not known", "boolq", "superglue", "blimp"]),
        (["--tasks", "rte,boolq"], ["boolq", "--data boolq=FILE"]),
        (["--tasks", "blimp"], ["--data rte=...", "the tasks asked for are blimp"]),
        (["--model", "no/such"], ["--model no/such", "no model is there"]),
        (["--shots", "few"], ["--shots few", "0,1,4"]),
        (["--shots", "0,40"], ["--data rte.train=FILE", "40 demonstrations"]),
        (["--repetitions", "0"], ["--repetitions", "from 1"]),
        (["--metric", "sideways"], ["sideways", "global_l2r"]),
        (["--data", "rte=missing.jsonl"], ["--data rte=missing.jsonl", "there is no missing.jsonl"]),
        (["--data", "missing"], ["--data missing", "TASK=FILE"]),
        (["--data", "rte.dev=README.md"], ["neither TASK nor TASK.train"]),
        (["--dtype", "float8"], ["float8", "float32"]),
        (["--separator", " "], ["--separator ' '", "part no lines"]),
    ],
)
def test_what_is_wrong_is_named(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], said: list[str]
) -> None:
    # The variable is read at import; without a network every look at the Hub would be tried for seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    given = {"--model": [str(inputs.causal)], "--tasks": ["rte"], "--data": [f"rte={inputs.rte}"], "--shots": ["2"]}
    given["--data"].append(f"rte.train={inputs.train}")
    given["--output"] = [str(tmp_path / "out")]
    option, value = change
    given[option] = [*given[option], value] if option == "--data" else [value]
    result = invoke(*(word for name, values in given.items() for one in values for word in (name, one)))
    assert result.exit_code == 2, result.output
    for word in said:
        assert word in result.output
    assert not (tmp_path / "out").exists()  # nothing is begun


def test_blimp_needs_its_file(inputs: Inputs, tmp_path: Path) -> None:
    result = invoke("--model", str(inputs.causal), "--tasks", "blimp", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2 and "--data blimp=FILE" in result.output
    broken = tmp_path / "pairs.jsonl"
    broken.write_text('{"UID": "a", "sentence_good": "The cat."}\n')
    result = invoke(
        *("--model", str(inputs.causal), "--tasks", "blimp", "--data", f"blimp={broken}", "--output", str(tmp_path))
    )
    assert result.exit_code == 2 and "row 1 has no sentence_bad" in result.output


@pytest.mark.parametrize("missing", ["lm_eval", "matplotlib"])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    result = invoke("--model", "tiny", "--tasks", "rte", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert f'needs {missing}: pip install "mlmfast[eval]"' in result.output
