"""What an interrupted evaluation continues from: the file of answers, and whole runs that are killed and repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

import mlmfast
from mlmfast import cli
from mlmfast.errors import RequestError

pytest.importorskip("lm_eval", reason='pip install "mlmfast[eval]"')

import evaluation
from evaluation import Inputs
from lm_eval.api.instance import Instance

from mlmfast.icl import answers as module
from mlmfast.icl import models
from mlmfast.icl.answers import Answering, Answers, groups, key_of

# Groups of six requests. Every group that a model has answered is a line of a log; where there are as many as KILL
# says, the process dies before the next, without a last word.
DRIVER = """
import json, os, signal
from mlmfast.cli import main
from mlmfast.icl import answers
from mlmfast.integrations.lm_eval import MLMFastLM
from lm_eval.models.huggingface import HFLM
answers.REQUESTS = 6
log, seen = open(os.environ["LOG"], "a"), []
for model in (MLMFastLM, HFLM):
    def counted(self, requests, disable_tqdm=False, own=model.loglikelihood, kind=model.__name__):
        if len(seen) == int(os.environ["KILL"]):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(kind)
        found = own(self, requests, disable_tqdm=disable_tqdm)
        print(json.dumps([kind, [request.args for request in requests]]), file=log, flush=True)
        return found
    model.loglikelihood = counted
main()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: PreTrainedTokenizerBase) -> Inputs:
    return evaluation.make(tmp_path_factory.mktemp("inputs"), bert_tokenizer)


def command(inputs: Inputs, output: Path) -> list[str]:
    models = ["--model", str(inputs.masked), "--model", str(inputs.causal)]
    asked = ["--tasks", "rte,blimp", "--shots", "0,1", "--repetitions", "2", "--samples", "--quiet"]
    # The backend cpu measures in each process which products are faster, and last digits go with its choice.
    asked += ["--backend", "reference"]
    return ["eval", *models, *asked, *inputs.data, "--output", str(output)]


def run(inputs: Inputs, output: Path, log: Path, kill: int = -1) -> int:
    root = str(Path(mlmfast.__file__).parents[1])
    settings = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LOG": str(log), "KILL": str(kill)}
    arguments = [sys.executable, "-c", DRIVER, *command(inputs, output)]
    done = subprocess.run(arguments, env=os.environ | settings, capture_output=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


def without_run(folder: Path) -> dict[str, bytes]:
    """Every file of a report, byte for byte, but for what this run took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report = json.loads(found["report.json"])
    assert report.pop("run")["seconds"] > 0
    found["report.json"] = json.dumps(report).encode()
    lines = found["report.md"].splitlines()
    assert lines[-1].startswith(b"This run:")
    found["report.md"] = b"\n".join(lines[:-1])
    return found


@pytest.mark.slow  # four processes, each of which imports everything; the interrupt below is tested always
def test_a_killed_run_continues_where_it_stopped(inputs: Inputs, tmp_path: Path) -> None:
    """Killed in the first model and once more in the second: nothing that was answered is asked again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(inputs, whole, tmp_path / "whole.log") == 0
    expected = groups_in(tmp_path / "whole.log")
    assert [kind for kind, _ in expected].index("HFLM") == len(expected) // 2 == 11
    for kill in (3, 10):
        assert run(inputs, parts, tmp_path / "parts.log", kill) == -signal.SIGKILL
        assert not (parts / "report.json").exists()
    assert groups_in(tmp_path / "parts.log") == expected[:13]
    assert run(inputs, parts, tmp_path / "parts.log") == 0
    assert groups_in(tmp_path / "parts.log") == expected
    requests = [(kind, *pair) for kind, group in expected for pair in group]
    assert len(set(requests)) == len(requests)
    assert without_run(parts) == without_run(whole)


def groups_in(log: Path) -> list[tuple[str, list[list[str]]]]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def test_an_interrupt_says_what_is_kept(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlmfast.integrations.lm_eval import MLMFastLM

    own, calls = MLMFastLM.loglikelihood, []

    def interrupted(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(self, requests, disable_tqdm)

    monkeypatch.setattr(module, "REQUESTS", 5)
    monkeypatch.setattr(MLMFastLM, "loglikelihood", interrupted)
    result = CliRunner().invoke(cli.app, command(inputs, tmp_path / "out"))
    assert result.exit_code == 130
    assert f"kept in {tmp_path / 'out' / 'answers'}" in result.output and "interrupted" in result.output
    result = CliRunner().invoke(cli.app, command(inputs, tmp_path / "out"))
    assert result.exit_code == 0 and calls[:4] == [5, 5, 5, 2]  # the second, which was interrupted, once more
    before, asked_so_far = without_run(tmp_path / "out"), len(calls)
    assert CliRunner().invoke(cli.app, command(inputs, tmp_path / "out")).exit_code == 0
    assert len(calls) == asked_so_far and without_run(tmp_path / "out") == before
    assert json.loads((tmp_path / "out" / "report.json").read_text())["run"]["computed"] == 0


def test_other_weights_and_settings_have_files_of_their_own(inputs: Inputs, tmp_path: Path) -> None:
    """An answer of one configuration is no other's: weights, metric, window, dtype."""

    def named(name: Path, **settings: Any) -> str:
        return models.open_model(str(name), models.Settings(**settings)).file

    import checkpoints
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs.masked)
    (tmp_path / "masked").mkdir()  # the same name, other weights
    other = checkpoints.small_bert(len(tokenizer), max_position_embeddings=400, seed=1)
    checkpoints.save(tmp_path / "masked", other, tokenizer)
    files = [
        named(inputs.masked),
        named(tmp_path / "masked"),
        named(inputs.masked, metric="original"),
        named(inputs.masked, window=2),
        named(inputs.masked, dtype="float64"),
        named(inputs.masked, backend="reference"),
        named(inputs.causal),
        named(inputs.causal, dtype="bfloat16"),
    ]
    assert len(set(files)) == len(files)
    shutil.copytree(inputs.masked, tmp_path / "elsewhere" / "masked")
    assert named(inputs.masked) == named(tmp_path / "elsewhere" / "masked") == files[0]
    assert named(inputs.masked, metric="original", window=2) == files[2]  # no window there


# ---- the file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "a.jsonl"
    value = [[-0.1 - 2**-50, True], False]
    with Answers(path, {"model": "m", "sizes": (1, 2)}) as answers:
        answers.add([{"a": value, "b": ["said", True]}])
        answers.add([{"c": 1}])
    with Answers(path, {"model": "m", "sizes": (1, 2)}) as answers:
        assert len(answers) == 3 and answers["a"] == value and "d" not in answers
    with pytest.raises(RequestError, match=r"sizes was \[1, 2\] and is now \[1, 3\]"):
        Answers(path, {"model": "m", "sizes": (1, 3)})


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_line_is_no_answer(tmp_path: Path, cut: int) -> None:
    """Of a group all is there or nothing, and what is written next begins a line."""
    path = tmp_path / "a.jsonl"
    with Answers(path, {}) as answers:
        answers.add([{"a": 1}])
        answers.add([{"b" * 20: 2, "c" * 20: 3}])
    path.write_bytes(path.read_bytes()[:-cut])
    with Answers(path, {}) as answers:
        assert len(answers) == 1 and answers["a"] == 1
        answers.add([{"d": 4}])
    with Answers(path, {}) as answers:
        assert len(answers) == 2 and answers["d"] == 4


def test_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with Answers(tmp_path / "a.jsonl", {}), pytest.raises(RequestError, match="in use by another run"):
        Answers(tmp_path / "a.jsonl", {})
    with Answers(tmp_path / "a.jsonl", {}):
        pass


class Counting:
    """A model whose answers are the lengths of what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool) -> list[tuple[float, bool]]:
        self.calls.append([request.args for request in requests])
        return [(float(len(context + answer)), answer == "b") for context, answer in self.calls[-1]]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        return [f"{context} {settings['max_gen_toks']}" for context, settings in (one.args for one in requests)]


def asked(*pairs: tuple[Any, ...], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def test_requests_are_asked_once(tmp_path: Path) -> None:
    """Answers come in the order of the requests, repeated ones too, as lm_eval's types."""
    model, longest = Counting(), []

    def lengths(kind: str, requests: Any) -> list[int]:
        return [len(request.args[0]) for request in requests]

    with Answers(tmp_path / "a.jsonl", {}) as answers:
        lm = Answering(model, answers, lengths, 3, longest.append)
        assert lm.loglikelihood(asked(("xx", "a"), ("y", "b"), ("xx", "a"))) == [
            (3.0, False),
            (2.0, True),
            (3.0, False),
        ]
        assert (lm.asked, lm.computed, lm.cut) == (3, 2, 0)
        assert lm.loglikelihood(asked(("zzzz", "b"), ("y", "b"))) == [(5.0, True), (2.0, True)]
        assert (lm.asked, lm.computed, lm.cut) == (5, 3, 1)
        generated = asked(("p", {"max_gen_toks": 2}), ("p", {"max_gen_toks": 3}), kind="generate_until")
        assert lm.generate_until(generated) == ["p 2", "p 3"]
    assert model.calls == [[("xx", "a"), ("y", "b")], [("zzzz", "b")]] and longest == [2, 4, 1]
    with Answers(tmp_path / "a.jsonl", {}) as answers:
        lm = Answering(Counting(), answers, lengths, 3)
        assert lm.loglikelihood(asked(("zzzz", "b"))) == [(5.0, True)] and (lm.computed, lm.cut) == (0, 1)


def test_groups_are_small_for_long_prompts() -> None:
    def sizes(length: int, number: int) -> list[int]:
        requests = [("", one) for one in asked(*[("x" * length, "")] * number)]
        return [len(group) for group in groups(requests, "loglikelihood")]

    assert sizes(1, 1025) == [512, 512, 1]
    assert sizes(module.CHARACTERS // 4, 9) == [4, 4, 1]
    assert sizes(1, 0) == []


class Drawing(Counting):
    def generate_until(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        return [f"{torch.rand(())}" for _ in requests]


def test_what_is_drawn_does_not_depend_on_what_else_is_asked(tmp_path: Path) -> None:
    """The first two of four, and then the rest, draw what all four do at once; nobody else's numbers change."""
    settings = {"do_sample": True}
    requests = asked(*[(prompt, settings) for prompt in "abcd"], kind="generate_until")

    def drawn(path: Path, *parts: list[Instance]) -> list[str]:
        with Answers(path, {}) as answers:
            lm = Answering(Drawing(), answers, lambda kind, requests: [1] * len(requests), None)
            return [lm.generate_until(part) for part in parts][-1]

    torch.manual_seed(1)
    following = torch.rand(())
    torch.manual_seed(1)
    whole = drawn(tmp_path / "a.jsonl", requests)
    assert torch.rand(()) == following and len(set(whole)) == 4
    assert drawn(tmp_path / "b.jsonl", requests[:2], requests) == whole


@pytest.mark.parametrize("damaged", [b"{\n", b"\0\0\0\n"])
def test_a_damaged_line_before_others_loses_none_of_them(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "a.jsonl"
    with Answers(path, {}) as answers:
        answers.add([{"a": 1}, {"b": 2}, {"c": 3}])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = damaged
    path.write_bytes(b"".join(lines))
    with pytest.raises(RequestError, match=r"a\.jsonl, line 3 is damaged, .* delete that line"):
        Answers(path, {})
    assert path.read_bytes() == b"".join(lines)
    del lines[2]
    path.write_bytes(b"".join(lines))
    with Answers(path, {}) as answers:
        assert "a" in answers and "b" not in answers and answers["c"] == 3


def test_keys_tell_requests_apart() -> None:
    keys = {key_of(kind, args) for kind, args in [("a", ("xy", "z")), ("a", ("x", "yz")), ("b", ("xy", "z"))]}
    assert len(keys) == 3
    assert key_of("g", ("x", {"a": 1, "b": 2})) == key_of("g", ("x", {"b": 2, "a": 1})) != key_of("g", ("x", {"a": 1}))
