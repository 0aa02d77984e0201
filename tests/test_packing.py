"""Plans and packed batches against brute force: each distinct copy and each target once, nothing computed in vain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from batches import NAMES, POOL, budgets, metrics, spans, texts, within
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from truth import reference_loop

from mlmfast import encoder, execution
from mlmfast.model import MaskedLM
from mlmfast.packing import PackedBatch, pack, unique_copies


def no_model(ids: list[int]) -> Tensor:
    """Logits that nobody reads."""
    return torch.zeros(len(ids), 1)


def brute_force(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    metric: str,
    spans: Sequence[tuple[int, int] | None],
    **options: int,
) -> list[tuple[tuple[int, ...], int, int]]:
    """(masked ids, position, target) of every target in the plan's order, by the truth's own loop."""
    found = []
    for text, span in zip(texts, spans):
        truth = reference_loop(no_model, tokenizer, text, metric, span=span, **options)
        found += list(zip(truth.copies, truth.positions, truth.token_ids))
    return found


def unpacked(batch: PackedBatch, mask_token_id: int) -> list[tuple[int, tuple[tuple[int, ...], int, int]]]:
    """The same for a packed batch, with each target's place in the plan."""
    ids = batch.token_ids.clone()
    ids[batch.masked_rows] = mask_token_id
    bounds = batch.cu_seqlens.tolist()
    found = []
    for target, place, order in zip(batch.targets.tolist(), batch.target_rows.tolist(), batch.order.tolist()):
        row = int(batch.scored_rows[place])
        copy = max(c for c in range(batch.copies) if bounds[c] <= row)
        found.append((order, (tuple(ids[bounds[copy] : bounds[copy + 1]].tolist()), row - bounds[copy], target)))
    return found


@pytest.mark.parametrize("name", ["bert", "deberta"])
@given(data=st.data(), texts=texts, metric=metrics, budget=budgets, stride=st.integers(1, 9), window=st.integers(1, 9))
@settings(max_examples=60)
@example(data=None, texts=["A"], metric="original", budget=1, stride=1, window=1)
@example(data=None, texts=["A", "A"], metric="unmasked", budget=3, stride=1, window=1)
def test_packed_batches_hold_each_distinct_copy_and_each_target_once(
    lms: dict[str, MaskedLM],
    name: str,
    data: st.DataObject | None,
    texts: list[str],
    metric: str,
    budget: int,
    stride: int,
    window: int,
) -> None:
    lm = lms[name]
    chosen: list[Any] = [None] * len(texts)
    if data is not None:
        chosen = data.draw(st.lists(spans, min_size=len(texts), max_size=len(texts)), label="spans")
        chosen = [within(span, text) for span, text in zip(chosen, texts)]
    plan = lm.plan(texts, metric=metric, window=window, stride=stride, spans=chosen)
    wanted = brute_force(lm.tokenizer, texts, metric, chosen, window=window, stride=stride)
    distinct = {copy for copy, _, _ in wanted}
    batches = pack(plan, budget)

    assert unique_copies(plan) == len(distinct)
    assert sum(batch.copies for batch in batches) == len(distinct)
    assert sum(batch.tokens for batch in batches) == sum(len(copy) for copy in distinct)  # no padding
    for batch in batches:
        lengths = batch.cu_seqlens.diff()
        assert batch.tokens <= budget or batch.copies == 1
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[0] == 0
        assert int(batch.cu_seqlens[-1]) == batch.tokens and bool((lengths > 0).all())
        assert batch.token_ids.dtype == batch.targets.dtype == torch.int64
        assert int(lengths.max()) == batch.max_seqlen
        assert len(set(batch.scored_rows.tolist())) == len(batch.scored_rows)
    found = sorted(entry for batch in batches for entry in unpacked(batch, lm.tokenizer.mask_token_id))
    assert [order for order, _ in found] == list(range(len(wanted)))
    assert [entry for _, entry in found] == wanted


@given(texts=texts, metric=metrics, stride=st.integers(1, 9))
@settings(max_examples=30)
def test_a_plan_counts_what_was_asked_for(lms: dict[str, MaskedLM], texts: list[str], metric: str, stride: int) -> None:
    lm = lms["bert"]
    plan = lm.plan(texts, metric=metric, stride=stride)
    lengths = [len(lm.tokenizer(text)["input_ids"]) for text in texts]
    each = [{"unmasked": 1, "strided": min(stride, n - 2)}.get(metric, n - 2) for n in lengths]
    assert plan.copies == sum(each)
    assert plan.tokens == sum(copies * n for copies, n in zip(each, lengths))


def test_minimal_pairs_share_the_copy_that_masks_the_difference(lms: dict[str, MaskedLM]) -> None:
    lm = lms["bert"]
    pair = ["The cat follow.", "The gardener follow."]
    assert [len(lm.tokenizer(text)["input_ids"]) for text in pair] == [6, 6]
    plan = lm.plan(pair)
    assert (plan.copies, unique_copies(plan)) == (8, 7)


def test_single_token_answers_share_one_copy(lms: dict[str, MaskedLM]) -> None:
    lm = lms["bert"]
    prompt, options = "The cat", [" the", " no", " a", " some"]
    assert all(len(lm.tokenizer(option, add_special_tokens=False)["input_ids"]) == 1 for option in options)
    spans = [(len(prompt), len(prompt + option)) for option in options]
    plan = lm.plan([prompt + option for option in options], spans=spans)
    assert (plan.copies, unique_copies(plan)) == (4, 1)
    batch = pack(plan, 1000)[0]
    assert (batch.copies, len(batch.scored_rows), len(batch.targets)) == (1, 1, 4)


def test_computed_rows_are_those_of_the_distinct_copies(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is planned is what is computed: the encoder sees each distinct copy once, in ranking too."""
    lm, seen = lms["bert"], []
    true_encode = execution.encode

    def watched(spec: Any, batch: PackedBatch, mask_token_id: int) -> Tensor:
        seen.append(batch.copies)
        return true_encode(spec, batch, mask_token_id)

    monkeypatch.setattr(execution, "encode", watched)
    lm.rank("The cat", [" the", " no", " a", " some"])
    assert sum(seen) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("metric", ["original", "unmasked", "strided"])
def test_only_scored_rows_pass_the_last_layer_and_the_head(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, name: str, metric: str
) -> None:
    lm = lms[name]
    rows: dict[int, list[int]] = {}
    true_linear = encoder.linear

    def watched(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        rows.setdefault(weight.data_ptr(), []).append(len(x))
        return true_linear(x, weight, *rest)

    monkeypatch.setattr(encoder, "linear", watched)
    texts, ends = POOL[:2], [(0, 3), (0, 3)]
    plan = lm.plan(texts, metric=metric, spans=ends)
    batches = pack(plan, 10_000)
    lm.score(texts, metric=metric, spans=ends)
    every, scored_rows = sum(b.tokens for b in batches), sum(len(b.scored_rows) for b in batches)
    assert scored_rows < every / 2
    spec = lm.spec()
    passes = 1 if spec.mask_decoder is None else 2
    last = spec.layers[-1]
    for product in (last.query, last.output, last.up, last.down):
        assert rows[product.weight.data_ptr()] == [scored_rows] * passes
    assert rows[spec.head.dense.weight.data_ptr()] == [scored_rows]
    for layer in spec.layers[:-1]:
        assert rows[layer.up.weight.data_ptr()] == [every]
