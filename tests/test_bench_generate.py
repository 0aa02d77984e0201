"""``mlmfast bench generate`` on toy shapes: what is checked before a speed is shown, what is refused and printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mlmfast.bench import app
from mlmfast.bench.agreement import FLOAT32_BOUND, Truth, draft_agreement, greedy_agreement
from mlmfast.bench.generate import Bench, Row
from mlmfast.bench.peers.generating import CausalGPT2, HuggingFaceLoop
from mlmfast.bench.shapes import SHAPES
from mlmfast.bench.work import Peak, weight_bytes
from mlmfast.cache import step_batch

PRODUCT = ((32, 32, 32),)
QUICK = ["--new-tokens", "8", "--peer-tokens", "4", "--pairs", "2", "--threads", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and copies of the real size take a second each time."""
    monkeypatch.setattr("mlmfast.bench.generate.Peak", lambda dtype, products, device: Peak(dtype, PRODUCT, device))
    monkeypatch.setattr("mlmfast.bench.generate.CPU_COPY_BYTES", 1 << 16)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", *arguments])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_a_side(tmp_path: Path, dtype: str) -> None:
    output = tmp_path / "generate.json"
    arguments = ["--shapes", "toy-deberta", "--prompts", "9,20", "--dtype", dtype, *QUICK]
    arguments += ["--sides", "window,drafted", "--against", "hf,hf:float32,gpt2", "--recompute", "2", "--refresh", "4"]
    result = invoke(*arguments, "--json", "--output", str(output))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    sides = ["exact", "window", "drafted", "hf-loop", "hf-loop", "gpt2"]
    assert [(row["prompt"], row["side"]) for row in rows] == [(n, side) for n in (9, 20) for side in sides]
    for row in rows:
        assert list(row) == list(Row.__dataclass_fields__)
        assert row["tokens_second"] == pytest.approx(1 / row["seconds_token"])
        low, high = row["seconds_token_quartiles"]
        assert 0 < low <= row["seconds_token"] <= high
        assert row["approximate"] == (row["side"] == "window")
        assert row["steps"] == (4 if row["side"] == "hf-loop" else 8)
        assert (row["peak_share"] is None) == (row["side"] != "exact")
        assert (row["bandwidth_share"] is None) == (row["side"] != "window")
        assert (row["window_ratio"] is None) == (row["side"] == "window")
        assert (row["max_abs_diff"] is None) == (row["side"] == "gpt2")
        assert (row["ratio"] is None) == (row["side"] == "exact")
    exact, window, drafted, loop, wide, causal = rows[:6]
    for row in (window, drafted, loop, wide, causal):
        assert row["ratio"] == pytest.approx(row["seconds_token"] / exact["seconds_token"])
    assert causal["window_ratio"] == pytest.approx(causal["seconds_token"] / window["seconds_token"])
    assert (loop["dtype"], wide["dtype"]) == (dtype, "float32")
    if dtype == "float32":
        assert (drafted["same_tokens"], loop["same_tokens"]) == (1, 1)
        assert drafted["max_abs_diff"] < FLOAT32_BOUND
    written = json.loads(output.read_text())
    assert written["rows"] == rows
    assert written["header"]["settings"]["refresh"] == 4
    assert len(written["details"][0]["seconds_token"]["all"]) == 2


def test_the_loop_generates_exacts_tokens() -> None:
    """Its steps as a whole loop: that it is timed after given prefixes changes nothing."""
    bench = Bench("toy-roberta", longest=11, new_tokens=10, against=("hf",))
    case = bench.case(11)
    loop = bench.peers["hf"]
    assert isinstance(loop, HuggingFaceLoop)
    ids = list(case.ids)
    for _ in range(10):
        ids += loop.choose([ids])
    assert ids[11:] == case.exact.token_ids.tolist()
    assert len(bench.tokenizer(case.text)["input_ids"]) == 11 + 2
    assert case.places.tolist() == list(range(10))
    assert Bench("toy-roberta", longest=11, new_tokens=10, peer_tokens=3, against=()).case(11).places.tolist() == [
        1,
        5,
        8,
    ]


@pytest.mark.usefixtures("quick")
def test_no_speed_for_a_peer_with_another_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HuggingFaceLoop.__init__

    def wrong(self: HuggingFaceLoop, subject: Any, **sizes: int) -> None:
        honest(self, subject, **sizes)
        self.model = subject.twin()
        layer = self.model.base_model.encoder.layer[1].intermediate.dense
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        with torch.no_grad():
            layer.weight[3, 5] += 0.1  # a single one

    monkeypatch.setattr(HuggingFaceLoop, "__init__", wrong)
    arguments = ["--shapes", "toy-roberta", "--prompts", "9", *QUICK]
    result = invoke(*arguments, "--json")
    assert result.exit_code == 1
    exact, window, loop, causal = (json.loads(line) for line in result.stdout.splitlines())
    assert [loop[name] for name in ("seconds_token", "tokens_second", "ratio", "window_ratio")] == [None] * 4
    assert None not in (exact["seconds_token"], window["ratio"], causal["ratio"])
    table = invoke(*arguments)
    assert "disagrees (either" in table.stdout
    assert "approximate" in table.stdout


@pytest.mark.usefixtures("quick")
def test_no_speed_at_all_where_exact_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Bench.generate

    def wrong(self: Bench, side: str, text: str, **other: Any) -> Any:
        found = honest(self, side, text, **other)
        found.logprobs[:] += 0.01
        return found

    monkeypatch.setattr(Bench, "generate", wrong)
    result = invoke("--shapes", "toy-roberta", "--prompts", "9", "--against", "gpt2", *QUICK, "--json")
    assert result.exit_code == 1
    assert {json.loads(line)["seconds_token"] for line in result.stdout.splitlines()} == {None}


def generation(ids: list[int], logprobs: list[float]) -> Any:
    return SimpleNamespace(token_ids=np.array(ids), logprobs=np.array(logprobs, np.float32))


def test_agreement_of_choices() -> None:
    best = np.array([-1.0, -1.0], np.float32)
    assert greedy_agreement(best, best - np.float32([0, 1e-4])).holds
    assert not greedy_agreement(best, best - np.float32([0, 3e-4])).holds
    plain = generation([4, 5, 6], [-1, -2, -3])
    assert draft_agreement(plain, plain, "float32").holds
    # After a tie the two go on from different tokens, and nothing can be said of them.
    assert draft_agreement(generation([4, 7, 8], [-1, -2.00001, -9]), plain, "float32").holds
    assert not draft_agreement(generation([4, 7, 8], [-1, -2.1, -3]), plain, "float32").holds
    assert not draft_agreement(generation([4, 5, 8], [-1, -2, -3.1]), plain, "float32").holds
    truth = Truth(np.zeros(3, np.float32), np.full(3, 0.01, np.float32))
    assert draft_agreement(generation([4, 7, 8], [-1, -2.04, -9]), plain, "bfloat16", truth).holds
    assert not draft_agreement(generation([4, 7, 8], [-1, -2.05, -9]), plain, "bfloat16", truth).holds


def test_gpt2_is_of_equal_size() -> None:
    bench = Bench("toy-deberta", longest=9, new_tokens=80, against=("gpt2",))
    peer = bench.peers["gpt2"]
    assert isinstance(peer, CausalGPT2)
    ours = bench.model.config
    theirs = peer.model.config
    assert (theirs.n_layer, theirs.n_embd, theirs.n_head) == (2, ours.hidden_size, ours.num_attention_heads)
    assert (theirs.n_inner, theirs.vocab_size) == (ours.intermediate_size, ours.vocab_size)
    assert len(peer.generate(list(range(9)), 80)) == 80  # beyond the masked model's own positions


def test_bytes_of_weights() -> None:
    bench = Bench("toy-roberta", longest=9, against=())
    layers = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert weight_bytes(bench.lm.spec()) == 4 * (layers + 32 * 32 + 300 * 32)
    assert SHAPES["toy-roberta"].settings["vocab_size"] == 300


def test_operations_of_all_steps() -> None:
    """The mean over the steps grows with the prompt, and a step's is that of its copy."""
    short, long = (Bench("toy-roberta", longest=20, new_tokens=n, against=()) for n in (1, 3))
    one, three = short.flops(short.case(9)), long.flops(long.case(9))
    assert one < three < short.flops(short.case(12))


def test_impossible_requests_are_refused() -> None:
    toy = ["--shapes", "toy-roberta", "--prompts", "9"]
    for arguments in (
        ["--shapes", "gpt"],
        ["--shapes", "toy-roberta", "--prompts", "x"],
        ["--shapes", "toy-roberta", "--prompts", "0"],
        ["--shapes", "toy-roberta", "--prompts", "60", "--new-tokens", "8"],
        [*toy, "--dtype", "int8"],
        [*toy, "--against", "nobody"],
        [*toy, "--against", "hf:float16"],
        [*toy, "--sides", "hf"],
        [*toy, "--refresh", "sometimes"],
        [*toy, "--device", "moon"],
    ):
        assert invoke(*arguments).exit_code == 2, arguments


@pytest.mark.usefixtures("quick")
def test_a_window_that_is_wrong_over_all_tokens_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*given: Any, **options: Any) -> Any:
        batch = step_batch(*given, **options)
        return replace(batch, positions=(batch.positions - 1).clamp(min=0))

    monkeypatch.setattr("mlmfast.decoding.step_batch", shifted)
    arguments = ["--shapes", "toy-deberta", "--prompts", "12", *QUICK, "--sides", "window", "--against", "hf", "--json"]
    result = invoke(*arguments)
    assert result.exit_code == 1
    exact, window, loop = (json.loads(line) for line in result.stdout.splitlines())
    assert window["seconds_token"] is None and None not in (exact["seconds_token"], loop["seconds_token"])
