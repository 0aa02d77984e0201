"""Whole evaluations with the model ``mlmfast``: ``simple_evaluate`` and the command line, on tasks made here."""

from __future__ import annotations

import importlib
import json
import os
import random
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

pytest.importorskip("lm_eval", reason='pip install "mlmfast[lm_eval]"')

from harness_family import Family
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager

from mlmfast.integrations.lm_eval import MLMFastLM

ROOT = Path(__file__).resolve().parents[2]
HELD = 160  # tokens that the model here holds
PAIRS, JUDGED = 11, 5


@pytest.fixture(scope="module")
def family(bert_tokenizer: PreTrainedTokenizerBase) -> Family:
    return Family(checkpoints.small_bert(len(bert_tokenizer), max_position_embeddings=HELD), bert_tokenizer)


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("model"), family.model, family.tokenizer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of every kind, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(7)
    sentences = checkpoints.sentences(PAIRS + 3 * JUDGED, seed=5)
    pairs = []
    for sentence in sentences[:PAIRS]:
        words = sentence.split()
        rng.shuffle(words)
        pairs.append({"good": sentence, "bad": " ".join(words)})
    judged = [
        {"premise": a, "hypothesis": b, "label": rng.choice(["True", "False"]), "text": f"{a} {b} {c}"}
        for a, b, c in zip(*(sentences[PAIRS + i :: 3][:JUDGED] for i in range(3)))
    ]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def task(name: str, rows: str, metric: str, **settings: Any) -> None:
        data = {"data_files": {"test": str(folder / f"{rows}.jsonl")}, "cache_dir": str(folder / "cache")}
        listed = [{"metric": metric, "higher_is_better": True} | settings.pop("aggregated", {"aggregation": "mean"})]
        written = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        written |= {"metric_list": listed, **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(written), encoding="utf-8")  # JSON is YAML, too

    task(
        "own_pairs",
        "pairs",
        "acc",
        output_type="multiple_choice",
        doc_to_text="",
        doc_to_target=0,
        doc_to_choice="{{[good, bad]}}",
    )
    task(
        "own_judged",
        "judged",
        "acc",
        output_type="multiple_choice",
        doc_to_text="{{premise}}\nquestion: {{hypothesis}} True or False?\nanswer:",
        doc_to_target="label",
        doc_to_choice=["True", "False"],
    )
    task(
        "own_texts",
        "judged",
        "word_perplexity",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        aggregated={"aggregation": "weighted_perplexity"},
    )
    task(
        "own_words",
        "judged",
        "exact_match",
        output_type="generate_until",
        doc_to_text="{{premise}}",
        doc_to_target="hypothesis",
        generation_kwargs={"until": ["."], "max_gen_toks": 5},
    )
    return folder


TASKS = ["own_pairs", "own_judged", "own_texts", "own_words"]


def evaluated(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    return found


def numbers(found: dict[str, Any], name: str) -> dict[str, float]:
    """A task's results but for the errors of its means, which a run may leave out."""
    results = found["results"][name].items()
    return {key: value for key, value in results if isinstance(value, float) and "stderr" not in key}


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Every answer, task by task in the order of the documents."""
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }


def test_simple_evaluate_by_name(family: Family, folder: Path, tasks: Path) -> None:
    arguments = f"pretrained={folder},metric=window,window=2,max_gen_toks=7"
    found = evaluated("mlmfast", tasks, model_args=arguments, batch_size="auto:10", device="cpu")

    def total(context: str, continuation: str) -> float:
        return float(family.truth(context, continuation, "window", window=2).logprobs.sum())

    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    right = [total("", row["good"]) > total("", row["bad"]) for row in rows("pairs")]
    assert 0 < sum(right) < PAIRS
    assert found["results"]["own_pairs"]["acc,none"] == sum(right) / PAIRS
    judged = []
    for row in rows("judged"):
        context = f"{row['premise']}\nquestion: {row['hypothesis']} True or False?\nanswer:"
        best = max((" True", " False"), key=lambda option, context=context: total(context, option))
        judged.append(best.strip() == row["label"])
    assert found["results"]["own_judged"]["acc,none"] == sum(judged) / JUDGED
    logprobs = [family.truth("", row["text"], "window", window=2).logprobs.sum() for row in rows("judged")]
    words = sum(len(row["text"].split()) for row in rows("judged"))
    assert found["results"]["own_texts"]["word_perplexity,none"] == pytest.approx(
        np.exp(-sum(logprobs) / words), rel=1e-3
    )
    texts = [family.generated(row["premise"], 5).split(".")[0] for row in rows("judged")]
    assert [resps[0][0] for resps in answers(found)["own_words"]] == texts
    assert found["config"]["model_num_parameters"] == family.model.num_parameters()
    assert found["config"]["mlmfast_family"] == "bert"
    assert found["max_length"] == HELD


class Never(MLMFastLM):
    """A model that must not be asked."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise AssertionError(f"asked for {len(requests)} answers that the cache has")

    loglikelihood_rolling = generate_until = loglikelihood


def environment(tmp_path: Path, **variables: object) -> dict[str, str]:
    """No network, nothing written outside, one thread."""
    own = {"HF_HUB_OFFLINE": 1, "HF_HOME": tmp_path / "hf", "OMP_NUM_THREADS": 1}
    return {**os.environ, **{name: str(value) for name, value in (own | variables).items()}}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mlmfast.lm_eval", *map(str, arguments)]


def test_command_line_limit_and_cache(folder: Path, tasks: Path, tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache" / "answers"
    arguments = ["--model", "mlmfast", "--model_args", f"pretrained={folder},reduction=mean", "--device", "cpu"]
    arguments += ["--tasks", ",".join(TASKS), "--include_path", tasks, "--limit", 3, "--batch_size", "auto:10"]
    arguments += ["--use_cache", cache, "--output_path", output, "--log_samples", "--trust_remote_code"]
    done = subprocess.run(
        command("run", *arguments), cwd=tmp_path, capture_output=True, text=True, check=False, env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "|own_pairs" in done.stdout
    (file,) = output.rglob("results_*.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    direct = evaluated("mlmfast", tasks, model_args={"pretrained": str(folder), "reduction": "mean"}, limit=3)
    again = evaluated(Never(str(folder), reduction="mean"), tasks, limit=3, use_cache=str(cache))
    for name in TASKS:
        assert numbers(direct, name)
        assert numbers(written, name) == pytest.approx(numbers(direct, name), rel=1e-5)
        assert numbers(again, name) == pytest.approx(numbers(direct, name), rel=1e-5)
        assert len(answers(again)[name]) == 3
    stored = {name: [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
              for name in TASKS for found in output.rglob(f"samples_{name}_*.jsonl")}  # fmt: skip
    values = [float(resp[0][0]) for sample in stored["own_pairs"] for resp in sample["resps"]]
    assert values == pytest.approx([resp[0][0] for sample in answers(again)["own_pairs"] for resp in sample], rel=1e-5)
    with pytest.raises(AssertionError, match="that the cache has"):  # a different request is not in it
        evaluated(Never(str(folder), reduction="mean"), tasks, limit=4, use_cache=str(cache))


SHARE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
import mlmfast.integrations.lm_eval

folder, model, names, output = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
arguments = {"pretrained": model}
found = simple_evaluate(
    "mlmfast", model_args=arguments, device="cpu", tasks=names.split(","), task_manager=manager, bootstrap_iters=0
)
if found is not None:
    with open(output, "x") as file:
        json.dump({key: found[key] for key in ("results", "samples")}, file, default=str)
"""


def test_two_processes(folder: Path, tasks: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    output = tmp_path / "found.json"
    line = [sys.executable, "-c", SHARE, str(tasks), str(folder), ",".join(TASKS), str(output)]
    running = [
        subprocess.Popen(line, cwd=tmp_path, env=environment(tmp_path, **shared, RANK=rank, LOCAL_RANK=rank))
        for rank in range(2)
    ]
    assert [one.wait(timeout=300) for one in running] == [0, 0]
    found = json.loads(output.read_text(encoding="utf-8"))  # the first process wrote it, and no other
    alone = evaluated("mlmfast", tasks, model_args={"pretrained": str(folder)})
    for name in TASKS:
        assert numbers(found, name) == pytest.approx(numbers(alone, name), rel=1e-5)
        assert [one["doc_id"] for one in found["samples"][name]] != [one["doc_id"] for one in alone["samples"][name]]
    both = [sum((resp[0][0] for resp in sample), 0.0) for one in (found, alone) for sample in answers(one)["own_pairs"]]
    assert len(both) == 2 * PAIRS
    assert both[:PAIRS] == pytest.approx(both[PAIRS:], rel=1e-5)


GATHER = """
import sys
import torch
from mlmfast.integrations.lm_eval import MLMFastLM

lm = MLMFastLM(sys.argv[1], device="cpu")
assert lm.world_size == 2
assert lm.all_gather(torch.tensor(lm.rank + 5)).tolist() == [5, 6]
assert lm.all_gather(torch.tensor([lm.rank, 7])).tolist() == [0, 7, 1, 7]
assert lm.gather_object({"rank": lm.rank}) == ([{"rank": 0}, {"rank": 1}] if lm.rank == 0 else None)
lm.barrier()
"""


def test_gathering(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    line = [sys.executable, "-c", GATHER, str(folder)]
    running = [
        subprocess.Popen(line, cwd=tmp_path, env=environment(tmp_path, **shared, RANK=rank, LOCAL_RANK=rank))
        for rank in range(2)
    ]
    assert [one.wait(timeout=300) for one in running] == [0, 0]


def test_the_name_is_known_and_so_are_the_others() -> None:
    assert get_model("mlmfast") is MLMFastLM
    assert "hf" in model_registry
    declared = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").split('[project.entry-points."lm_eval.models"]\n')[1]
    )
    name, value = declared.splitlines()[0].split(" = ")
    assert metadata.EntryPoint(name, value.strip('"'), "lm_eval.models").load() is MLMFastLM and name == "mlmfast"


@pytest.mark.parametrize("module", ["mlmfast.integrations.lm_eval", "mlmfast.lm_eval"])
def test_without_lm_eval_the_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mlmfast.integrations.lm_eval")
    with pytest.raises(ImportError, match=r'pip install "mlmfast\[lm_eval\]"'):
        getattr(importlib.import_module(module), "main", lambda: None)()


def test_the_command_line_is_lm_evals_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("mlmfast.lm_eval").main()
    assert "--include_path" in capsys.readouterr().out
