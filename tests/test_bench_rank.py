"""Ranking's benchmark on toy shapes: what is asked of both sides, what is shared, and what gets no speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mlmfast.bench.peers import HuggingFaceScored
from mlmfast.bench.rank import QUESTIONS, Question, RankBench
from mlmfast.bench.shapes import SHAPES
from mlmfast.bench.work import Peak
from mlmfast.masking import MaskPlan
from mlmfast.packing import unique_copies

PRODUCT = ((32, 32, 32),)


@pytest.fixture(scope="module")
def bench() -> RankBench:
    return RankBench("toy-deberta", against=["hf", "hf-scored"], keep_going=True)


def test_the_plan_is_what_rank_computes(bench: RankBench) -> None:
    texts = bench.candidates(Question(9, 3, 4, 1), asked=1)
    ((prompt, options),) = texts.asked
    ours = bench.plan(texts)
    spans = [(len(prompt), None)] * 3
    theirs = bench.lm.plan([prompt + option for option in options], metric="window", spans=spans)
    for name in ("copy_sequences", "mask_offsets", "masked_positions", "score_offsets", "score_positions", "targets"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for a, b in zip(ours.sequences, theirs.sequences, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("question", "copies", "different"),
    [
        (Question(9, 4, 8, 2), 32, 4 * 8 - 2 * 3),  # two of a candidate's copies mask both places
        (Question(9, 2, 12, 1), 24, 24 - 3),  # three mask the one place
        (Question(20, 5, 1, 1), 5, 1),
        (Question(9, 3, 4, 4), 12, 12),
    ],
)
def test_candidates_share_copies_that_mask_what_differs(
    bench: RankBench, question: Question, copies: int, different: int
) -> None:
    plan = bench.plan(bench.candidates(question))
    assert (plan.copies, unique_copies(plan)) == (6 * copies, 6 * different)
    assert {len(sequence) for sequence in plan.sequences} == {question.length}


def test_peers_are_given_a_candidate_at_a_time(bench: RankBench, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HuggingFaceScored.logprobs
    given: list[int] = []

    def counting(self: Any, plan: MaskPlan) -> np.ndarray:
        given.append(len(plan.sequences))
        return honest(self, plan) + (0.01 if len(given) == 4 else 0)  # one log-probability in many

    monkeypatch.setattr(HuggingFaceScored, "logprobs", counting)
    peak = Peak(torch.float32, PRODUCT)
    peak.sample()
    texts = bench.candidates(Question(9, 3, 4, 1))
    eager, scored = bench.measure(texts, "a question", pairs=2, peak=peak)
    assert given == [1] * 3 * 6  # to judge it, and not timed
    assert eager.row.ratio is not None and eager.row.seconds is not None
    assert eager.row.ratio == pytest.approx((eager.row.peer_seconds or 0) / eager.row.seconds)
    assert (eager.row.case, eager.row.copies, eager.details["unique_copies"]) == ("a question", 72, 48)
    assert (scored.row.ratio, scored.details["agrees"]) == (None, False)


@pytest.mark.parametrize("shape", ["toy-deberta", "toy-roberta", "toy-modernbert", "toy-esm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_agree(shape: str, dtype: str) -> None:
    bench = RankBench(shape, dtype=dtype, against=["hf", "hf-scored"])
    for question in (Question(9, 3, 4, 1), Question(20, 4, 1, 1)):
        texts = bench.candidates(question)
        for label in bench.peers:
            verdict = bench.agreement(texts, label)
            assert verdict.holds, verdict


def test_every_question_is_of_different_candidates() -> None:
    for question in QUESTIONS:
        assert question.different >= 1
        for shape in ("deberta-v3-base", "esm2-t33-650m"):  # 33 tokens are all that ESM-2 has
            words = SHAPES[shape].settings["vocab_size"] - len(SHAPES[shape].special)
            assert question.candidates <= words
