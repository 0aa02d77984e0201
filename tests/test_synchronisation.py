"""The pass never waits for an accelerator: shown without one on tensors that have no values, and on CUDA by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from batches import NAMES, POOL
from specs import mapped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near

import mlmfast
from mlmfast import encoder, execution, staging
from mlmfast.execution import Values, head_states
from mlmfast.model import MaskedLM
from mlmfast.packing import PackedBatch, pack

META = torch.device("meta")


class NoHost(TorchDispatchMode):
    """Refuses an operation on a tensor of the host: on an accelerator it would be copied, and the copy waited for."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device != META:
                raise AssertionError(f"{op} touches the host")
        return out


@contextmanager
def no_waiting() -> Iterator[None]:
    """Not in inference mode, where composite operations would be seen whole, whatever they copy inside."""
    with torch.no_grad(), NoHost():
        yield


@pytest.fixture(scope="module")
def models(
    lms: dict[str, MaskedLM], roberta_model: PreTrainedModel, roberta_tokenizer: PreTrainedTokenizerBase
) -> dict[str, MaskedLM]:
    return {**lms, "roberta": mlmfast.load(roberta_model, roberta_tokenizer)}


def valueless(lm: MaskedLM, metric: str) -> tuple[Any, PackedBatch]:
    """A spec and a batch whose tensors have shapes but no values: whoever asks for one, or for a size that depends on
    one, fails."""
    batch = pack(lm.plan(POOL, metric=metric, stride=2), 400)[-1]
    assert batch.copies > 1 and len(batch.scored_rows) > 1
    return mapped(lm.spec(), lambda tensor: tensor.to(META)), batch.to(META)


@pytest.mark.parametrize("name", [*NAMES, "roberta"])
@pytest.mark.parametrize("metric", ["original", "unmasked", "strided"])
def test_the_pass_asks_the_device_for_nothing(models: dict[str, MaskedLM], name: str, metric: str) -> None:
    spec, batch = valueless(models[name], metric)
    with no_waiting():
        states = head_states(spec, batch, 4)
    assert states.shape == (len(batch.scored_rows), spec.head.vocabulary.shape[1])


def test_all_of_it_has_all_of_it(models: dict[str, MaskedLM]) -> None:
    spec = models["deberta, all of it"].spec()
    assert spec.mask_decoder is not None and spec.layers[0].convolution is not None and spec.buckets is not None
    assert models["roberta"].spec().embedding.padding_id is not None


def size_unsaid(batch: PackedBatch, values: Tensor) -> Tensor:
    return torch.repeat_interleave(values, batch.cu_seqlens.diff().long())


def number_copied(batch: PackedBatch, values: Tensor) -> Tensor:
    return true_by_row(batch, values) + torch.tensor(0)


def value_asked(batch: PackedBatch, values: Tensor) -> Tensor:
    return true_by_row(batch, values) + int(values[0])


def fetched(batch: PackedBatch, values: Tensor) -> Tensor:
    return true_by_row(batch, values.cpu())


def rows_chosen(batch: PackedBatch, values: Tensor) -> Tensor:
    rows = true_by_row(batch, values)
    return rows[rows >= 0]


def built_on_the_host(batch: PackedBatch, values: Tensor) -> Tensor:
    return true_by_row(batch, values) + torch.arange(batch.tokens).to(values.device)


true_by_row = encoder.by_row
PLANTED = [size_unsaid, number_copied, value_asked, fetched, rows_chosen, built_on_the_host]


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", ["roberta", "deberta, all of it"])
def test_a_planted_wait_fails_the_same_check(
    models: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, name: str, planted: Any
) -> None:
    spec, batch = valueless(models[name], "original")
    monkeypatch.setattr(encoder, "by_row", planted)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), no_waiting():
        head_states(spec, batch, 4)


def test_staged_tensors_come_out_as_they_went_in() -> None:
    tensors = [
        torch.arange(7),
        torch.arange(5, dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        torch.arange(6.0).view(2, 3),
        torch.tensor([1]),
    ]
    buffer = staging.staged(tensors, torch.device("cpu"))
    for got, want in zip(staging.laid_over(buffer.clone(), tensors), tensors):
        assert got.dtype == want.dtype and torch.equal(got, want)
        assert got.storage_offset() * got.itemsize % 16 == 0
    for got, want in zip(staging.transferred(tensors, torch.device("cpu")), tensors):
        assert got is want


def test_a_batch_is_laid_over_other_tensors(lms: dict[str, MaskedLM]) -> None:
    lm = lms["bert"]
    one, other = (pack(lm.plan([text]), 1000)[0] for text in ("The cat follow.", "The dogs follow."))
    buffer = staging.staged(other.encoded(), torch.device("cpu"))
    found = one.over(staging.laid_over(buffer, one.encoded()))
    for got, want in zip(found.encoded(), other.encoded()):
        assert torch.equal(got, want)
    assert found.targets is one.targets


def test_results_wait_until_they_are_many() -> None:
    values, orders = Values(10, patience=16), [np.array([3, 1]), np.array([0, 9]), np.array([8, 2, 4, 5, 6, 7])]
    for i, order in enumerate(orders):
        values.add(order, {"a": torch.tensor(order) * 2.0, "b": torch.tensor(order)[:, None] + torch.arange(2)})
        assert len(values._waiting) == 0, f"48 bytes wait, reading {i}"
    arrays = values.arrays()
    assert arrays["a"].tolist() == [2.0 * i for i in range(10)]
    assert arrays["b"].tolist() == [[i, i + 1] for i in range(10)]

    late = Values(10, patience=1 << 20)
    for order in orders:
        late.add(order, {"a": torch.tensor(order) * 2.0})
    assert len(late._waiting) == 3
    assert late.arrays()["a"].tolist() == arrays["a"].tolist()


@pytest.mark.parametrize("patient", [False, True])
def test_batches_are_launched_before_the_first_result_is_fetched(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """On an accelerator; on a CPU results are taken at once, and memory stays as small as before."""
    lm, events = lms["deberta"], []
    plan = lm.plan(POOL)
    wanted = lm.logprobs(plan)
    true_encode, true_fetch = execution.encode, Values._fetch

    def encode(*args: Any) -> Tensor:
        events.append("launch")
        return true_encode(*args)

    def fetch(self: Values) -> None:
        events.append("fetch")
        true_fetch(self)

    monkeypatch.setattr(execution, "encode", encode)
    monkeypatch.setattr(Values, "_fetch", fetch)
    monkeypatch.setattr(execution, "READ_ROWS", 1)
    monkeypatch.setattr(execution, "PATIENCE", {"cpu": 1 << 24 if patient else 0})
    monkeypatch.setattr(lm, "_batch_tokens", 200)
    assert_near(lm.logprobs(plan), wanted, 1e-5)
    batches = len(pack(plan, 200))
    assert batches > 3
    if patient:
        assert events == ["launch"] * batches + ["fetch"]
    else:
        assert events == ["launch", "fetch"] * batches + ["fetch"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*NAMES, "roberta"])
def test_torch_sees_no_wait_on_cuda(models: dict[str, MaskedLM], name: str) -> None:
    lm, device = models[name], torch.device("cuda")
    spec = mapped(lm.spec(), lambda tensor: tensor.detach().to(device))
    batches = pack(lm.plan(POOL), 400)
    with torch.inference_mode():
        wanted = [head_states(spec, batch.to(device), lm.tokenizer.mask_token_id) for batch in batches]  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [head_states(spec, batch.to(device), lm.tokenizer.mask_token_id) for batch in batches]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for got, want in zip(found, wanted):
            assert_near(got.cpu().numpy(), want.cpu().numpy(), 1e-5)
