"""A text's score does not depend on its company, and a planted leak fails the same check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from batches import NAMES, POOL, budgets, metrics, spans, texts, within
from checkpoints import TEXTS, long_text, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth import assert_near

import mlmfast
from mlmfast import encoder, execution
from mlmfast.architectures import spec
from mlmfast.masking import METRICS, MaskPlan
from mlmfast.model import MaskedLM
from mlmfast.packing import PackedBatch, pack


def scored(
    lm: MaskedLM, texts: Sequence[str], metric: str, spans: Sequence[Any] | None, budget: int, stride: int = 3
) -> list[np.ndarray]:
    """Log-probabilities of each text under a token budget."""
    before, lm.batch_tokens = lm.batch_tokens, budget
    try:
        return [s.logprobs for s in lm.score(texts, metric=metric, spans=spans, stride=stride, progress=False)]
    finally:
        lm.batch_tokens = before


def assert_independent(
    lm: MaskedLM, texts: Sequence[str], metric: str, spans: Sequence[Any] | None, budget: int
) -> None:
    """Each text scores in this company as it does alone, a copy at a time."""
    together = scored(lm, texts, metric, spans, budget)
    assert len(together) == len(texts)
    for i, text in enumerate(texts):
        span = None if spans is None else [spans[i]]
        alone = scored(lm, [text], metric, span, budget=1)[0]
        assert_near(together[i], alone, 1e-5, f"{metric} of {text!r} among {len(texts)}, {budget} tokens a batch")


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), texts=texts, metric=metrics, budget=budgets)
@settings(max_examples=30)
def test_a_score_does_not_depend_on_its_company(
    lms: dict[str, MaskedLM], name: str, data: st.DataObject, texts: list[str], metric: str, budget: int
) -> None:
    chosen = data.draw(st.lists(spans, min_size=len(texts), max_size=len(texts)), label="spans")
    chosen = [within(span, text) for span, text in zip(chosen, texts)]
    assert_independent(lms[name], texts, metric, chosen, budget)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), texts=st.lists(st.sampled_from(POOL + sentences(60, seed=8)), min_size=1, max_size=40))
@settings(max_examples=60)
def test_a_score_does_not_depend_on_its_company_in_larger_batches(
    lms: dict[str, MaskedLM], name: str, data: st.DataObject, texts: list[str]
) -> None:
    assert_independent(lms[name], texts, data.draw(metrics), None, data.draw(st.integers(1, 20_000)))


@pytest.mark.parametrize("name", NAMES)
def test_results_come_in_input_order_and_duplicates_agree(lms: dict[str, MaskedLM], name: str) -> None:
    lm = lms[name]
    batch = [*POOL, *POOL[::-1], POOL[0]]
    for budget in (1, 64, 10_000):
        lm.batch_tokens = budget
        scores = lm.score(batch)
        assert [score.text for score in scores] == batch
        for text, score in zip(batch, scores):
            assert score.token_ids.tolist() == lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert np.array_equal(score.logprobs, scores[batch.index(text)].logprobs)  # one copy serves them all
    lm.batch_tokens = 8192


def reaching_into_the_next(op: Callable[..., Tensor], bounds: int) -> Callable[..., Tensor]:
    """An attention op whose every sequence also sees the first key of the next.

    ``bounds`` counts the arguments between the values and ``cu_seqlens_q``.
    """

    def leaky(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        before, (cu_q, cu_k, max_q, max_k, q_positions, *after) = rest[:bounds], rest[bounds:]
        if q_positions is None:
            q_positions = encoder_positions(cu_q)
        out = torch.empty_like(q)
        for s in range(len(cu_q) - 1):
            rows = slice(int(cu_q[s]), int(cu_q[s + 1]))
            keys = slice(int(cu_k[s]), min(int(cu_k[s + 1]) + 1, len(k)))
            cu_own = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
            cu_keys = torch.tensor([0, keys.stop - keys.start], dtype=torch.int32)
            out[rows] = op(
                q[rows], k[keys], v[keys], *before, cu_own, cu_keys, max_q, max_k + 1, q_positions[rows], *after
            )
        return out

    return leaky


def encoder_positions(cu_seqlens: Tensor) -> Tensor:
    return torch.cat([torch.arange(int(n)) for n in cu_seqlens.diff()])


def plant_a_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(encoder, "attention", reaching_into_the_next(encoder.attention, 0))
    patch.setattr(encoder, "disentangled_attention", reaching_into_the_next(encoder.disentangled_attention, 3))


def plant_a_fusion(patch: pytest.MonkeyPatch) -> None:
    """Two neighbouring copies of a batch become one sequence for the attention, with their positions kept."""

    def fused(plan: MaskPlan, budget: int) -> list[PackedBatch]:
        return [fuse(batch) for batch in pack(plan, budget)]

    def fuse(batch: PackedBatch) -> PackedBatch:
        if batch.copies < 2:
            return batch
        fields = dict(vars(batch))
        fields["cu_seqlens"] = torch.cat([batch.cu_seqlens[:1], batch.cu_seqlens[2:]])
        fields["cu_scored"] = torch.cat([batch.cu_scored[:1], batch.cu_scored[2:]])
        fields["scored_positions"] = batch.scored_positions + torch.where(
            (batch.scored_rows >= batch.cu_seqlens[1]) & (batch.scored_rows < batch.cu_seqlens[2]),
            batch.cu_seqlens[1],
            0,
        )
        fields["max_seqlen"] = int(fields["cu_seqlens"].diff().max())
        fields["max_scored"] = int(fields["cu_scored"].diff().max())
        return PackedBatch(**fields)

    patch.setattr(execution, "pack", fused)


def plant_a_convolution(patch: pytest.MonkeyPatch) -> None:
    """The convolution forgets where copies end: every row believes to stand in the middle of a long one."""

    def one_long_copy(batch: PackedBatch) -> PackedBatch:
        fields = dict(vars(batch))
        fields["cu_seqlens"] = torch.tensor([0, batch.tokens], dtype=torch.int32)
        return PackedBatch(**fields)

    def leaky(convolution: Any, batch: PackedBatch, *rest: Any) -> Tensor:
        return true_convolution(convolution, one_long_copy(batch), *rest)

    true_convolution = encoder.apply_convolution
    patch.setattr(encoder, "apply_convolution", leaky)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("bert", plant_a_key),
        ("deberta", plant_a_key),
        ("deberta, all of it", plant_a_key),
        ("bert", plant_a_fusion),
        ("deberta", plant_a_fusion),
        ("deberta, all of it", plant_a_convolution),
    ],
)
@pytest.mark.parametrize("metric", ["original", "unmasked", "strided"])
def test_a_planted_leak_fails_the_same_check(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, name: str, plant: Any, metric: str
) -> None:
    lm, batch = lms[name], [POOL[6], POOL[0], POOL[8], POOL[2]]
    assert_independent(lm, batch, metric, None, 5000)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError, match="off by"):
            assert_independent(lm, batch, metric, None, 5000)
    assert_independent(lm, batch, metric, None, 5000)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most", [20, 33, 100])
@pytest.mark.parametrize("failure", ["accelerator", "allocator"])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, name: str, most: int, failure: str
) -> None:
    lm, sizes = lms[name], []
    wanted = scored(lm, POOL, "window", None, 3000)
    true_encode = execution.encode

    def small_memory(spec: Any, batch: PackedBatch, mask_token_id: int) -> Tensor:
        sizes.append(batch.tokens)
        if batch.tokens > most and batch.copies > 1:
            if failure == "accelerator":
                raise torch.OutOfMemoryError("out of memory")
            torch.empty(1 << 50)  # 4 PiB: the CPU's allocator raises a plain RuntimeError
        return true_encode(spec, batch, mask_token_id)

    monkeypatch.setattr(execution, "encode", small_memory)
    for got, want in zip(scored(lm, POOL, "window", None, 3000), wanted):
        assert_near(got, want, 1e-5)
    assert max(sizes) > most


def test_a_single_copy_that_does_not_fit_is_an_error(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(execution, "encode", no_memory)
    with pytest.raises((torch.OutOfMemoryError, mlmfast.MLMFastError), match="memory"):
        lms["bert"].score(POOL)


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_batches_are_read_together(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    lm, sizes = lms["deberta"], []
    wanted = scored(lm, POOL, "original", None, 3000)
    true_op = spec.vocab_logprob

    def watched(hidden: Tensor, *rest: Any) -> Any:
        sizes.append(len(hidden))
        return true_op(hidden, *rest)

    monkeypatch.setattr(spec, "vocab_logprob", watched)
    monkeypatch.setattr(execution, "READ_ROWS", rows)
    for got, want in zip(scored(lm, POOL, "original", None, 60), wanted):
        assert_near(got, want, 1e-5)
    assert len(sizes) > 1 if rows < 1000 else len(sizes) == 1
    assert min(sizes[:-1], default=rows) >= rows  # only the last reading may be of fewer


@pytest.mark.parametrize("budget", [60, 3000])  # several batches, and all in one
@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, MemoryError])
def test_a_reading_that_does_not_fit_is_halved(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, budget: int, failure: type[Exception]
) -> None:
    lm, sizes = lms["deberta"], []
    wanted = scored(lm, POOL, "original", None, 3000)
    true_op = spec.vocab_logprob

    def small_memory(hidden: Tensor, *rest: Any) -> Any:
        sizes.append(len(hidden))
        if len(hidden) > 20:
            raise failure("out of memory")
        return true_op(hidden, *rest)

    monkeypatch.setattr(spec, "vocab_logprob", small_memory)
    for got, want in zip(scored(lm, POOL, "original", None, budget), wanted):
        assert_near(got, want, 1e-5)
    assert max(sizes) > 20


def test_copies_of_a_text_share_their_first_layer(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = lms["bert"], []
    wanted = scored(lm, POOL, "original", None, 3000)
    true_op = encoder.masked_embedding

    def watched(ids: Tensor, *rest: Any) -> Tensor:
        rows.append(len(ids))
        return true_op(ids, *rest)

    monkeypatch.setattr(encoder, "masked_embedding", watched)
    scored(lm, POOL, "original", None, 3000)
    shared = rows.copy()
    rows.clear()
    monkeypatch.setattr(encoder, "SHARED", 0)
    for got, want in zip(scored(lm, POOL, "original", None, 3000), wanted):
        assert_near(got, want, 1e-5)
    assert sum(shared) < sum(rows) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_nobodys_business(lms: dict[str, MaskedLM], dtype: torch.dtype) -> None:
    lm = lms["deberta"]
    wanted = lm.score(POOL[:3], ranks=True, entropies=True)
    torch.set_default_dtype(dtype)
    try:
        found = lm.score(POOL[:3], ranks=True, entropies=True)
        best = lm.distributions(POOL[:1], top_k=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for got, want in zip(found, wanted):
        assert_near(got.logprobs, want.logprobs, 1e-6)
        assert (got.ranks == want.ranks).all()
    assert best


def test_texts_planned_in_several_windows(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lms["deberta"]
    wanted = scored(lm, POOL, "original", None, 3000)
    for rows in (1, 700, 2000):
        monkeypatch.setattr(execution, "WINDOW_TOKENS", rows)
        for got, want in zip(scored(lm, POOL, "original", None, 3000), wanted):
            assert_near(got, want, 1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_long_text_is_computed_in_parts(
    lms: dict[str, MaskedLM], metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["deberta"]
    texts = [long_text(lm.tokenizer, 40), TEXTS[0], long_text(lm.tokenizer, 25, seed=1)]
    whole = lm.score(texts, metric=metric, ranks=True)
    monkeypatch.setattr(execution, "WINDOW_TOKENS", 100)
    parts = lm.score(texts, metric=metric, ranks=True)
    for one, other in zip(whole, parts):
        assert one.tokens == other.tokens and one.offsets == other.offsets
        assert_near(other.logprobs, one.logprobs, 1e-5)
        assert (one.ranks == other.ranks).all()
