"""What `mlmfast bench` takes for agreement, and that nothing else has a speed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from mlmfast.bench import app
from mlmfast.bench.agreement import Truth, agreement
from mlmfast.bench.peers import HuggingFaceEager
from mlmfast.bench.pll import Bench
from mlmfast.bench.work import Peak
from mlmfast.masking import MaskPlan


def test_no_speed_where_the_two_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HuggingFaceEager.logprobs

    def wrong(self: HuggingFaceEager, plan: MaskPlan) -> np.ndarray:
        found = honest(self, plan)
        if len(plan.sequences[0]) == 9:
            found[-1] += 0.01  # a single token
        return found

    monkeypatch.setattr(HuggingFaceEager, "logprobs", wrong)
    # Products of the real size take a second each time.
    monkeypatch.setattr("mlmfast.bench.pll.Peak", lambda dtype, products, device: Peak(dtype, ((32, 32, 32),), device))
    arguments = ["pll", "--shapes", "toy-roberta", "--lengths", "9,10", "--copies", "7", "--pairs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1
    bad, good = (json.loads(line) for line in result.stdout.splitlines())
    assert [bad[key] for key in ("seconds", "peer_seconds", "ratio", "peak_share")] == [None] * 4
    assert bad["max_abs_diff"] == pytest.approx(0.01, rel=0.05)
    assert good["ratio"] is not None
    table = CliRunner().invoke(app, arguments).stdout
    assert "disagree" in table
    assert table.count("x (") == 1, table  # the other row's ratio alone


def test_agreement_judges_each_dtype_by_its_bound() -> None:
    theirs = np.array([-0.5, -20.0], np.float32)
    assert agreement(theirs + np.float32([5e-5, 1e-3]), theirs).holds
    assert not agreement(theirs + np.float32([2e-4, 0]), theirs).holds  # likely tokens have the absolute bound
    assert not agreement(theirs * np.float32(np.nan), theirs).holds

    exact = np.full(100, -3.0, np.float32)

    def off(by: float, tokens: int = 100) -> np.ndarray:
        return exact + np.float32(by) * (np.arange(100) < tokens)

    truth, narrow = Truth(exact, narrow=off(0.01)), ("bfloat16", "bfloat16")
    assert agreement(off(0.02), off(-0.02), narrow, truth).holds  # twice plain torch's own error
    assert agreement(off(0.03), off(0.02), narrow, truth).side == "mlmfast"
    # A peer that is wrong is refused, and does not excuse mlmfast for being as wrong.
    assert agreement(off(0.02), off(0.03), narrow, truth).side == "the peer"
    for ours, theirs in ((0.02, 0.03), (0.03, 0.02), (0.03, 0.03), (0.02, np.nan)):
        assert not agreement(off(ours), off(theirs), narrow, truth).holds
    # One token alone may not be farther off either.
    assert agreement(off(0.02, 1), exact, narrow, truth).holds
    assert not agreement(off(0.03, 1), exact, narrow, truth).holds
    # A peer that rounds what it returns may be two spacings of bfloat16 off besides; mlmfast never.
    assert agreement(off(0.02), off(0.04), narrow, truth, rounds=True).holds
    assert not agreement(off(0.04), off(0.02), narrow, truth, rounds=True).holds
    # A float32 peer of a bfloat16 mlmfast has to be right to float32's bound.
    assert agreement(off(0.02), exact, ("bfloat16", "float32"), truth).holds
    assert not agreement(off(0.02), off(1e-3), ("bfloat16", "float32"), truth).holds


def test_weights_are_wide_enough_for_a_missing_term_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("toy-deberta")
    texts = bench.texts(12, 10)
    assert bench.agreement(texts).holds
    spec = bench.lm.spec()
    for table in ("pos_key", "pos_query"):
        layers = [type(layer)(**(vars(layer) | {table: None})) for layer in spec.layers]
        maimed = type(spec)(**(vars(spec) | {"layers": layers}))
        monkeypatch.setattr(bench.lm, "spec", lambda maimed=maimed: maimed)
        verdict = bench.agreement(texts)
        assert verdict.error > 5 * verdict.bound


def test_bfloat16_is_judged_against_float32() -> None:
    bench = Bench("toy-roberta", dtype="bfloat16")
    verdict = bench.agreement(bench.texts(12, 10))
    assert verdict.holds
    assert verdict.bound > 1e-3
