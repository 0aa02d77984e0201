"""Recorded passes: the values are the plain pass's, and whatever a recording holds fast is noticed when it changes.

Without CUDA a stand-in records: its replay runs the same pass on the same buffer and on the storages that the weights
had when it was recorded, as a graph does.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from batches import NAMES, POOL
from checkpoints import small_bert, small_deberta
from specs import mapped
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from truth import assert_near

import mlmfast
from mlmfast import backends, execution, graphs
from mlmfast.architectures.spec import EncoderSpec
from mlmfast.execution import head_states, read_logprobs, run
from mlmfast.graphs import Graphs, signature
from mlmfast.model import MaskedLM
from mlmfast.packing import PackedBatch, pack

CPU = torch.device("cpu")
SIMULATED = "SIMULATED_GPU" in os.environ


def simulated() -> AbstractContextManager[object]:
    """What makes the simulated GPU, where there is one, that of another thread, too."""
    if not SIMULATED:
        return nullcontext()
    from simulated_tensors import MODE

    return MODE


class StandIn:
    """Records and replays on the CPU, and counts what is computed how."""

    def __init__(self) -> None:
        self.plain = self.recorded = self.replayed = 0
        self.fails: Exception | None = None
        self._recording = False
        self._frozen: EncoderSpec | None = None
        self.graphs = Graphs(self.compute, lambda device: self.record)

    def compute(self, spec: EncoderSpec, batch: PackedBatch, mask_token_id: int) -> Tensor:
        if self._recording:
            self._frozen = mapped(spec, Tensor.detach)  # the storage as it is, wherever the parameter goes
        elif self._frozen is None:
            self.plain += 1
        return head_states(self._frozen or spec, batch, mask_token_id)

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.fails is not None:
            raise self.fails
        self._recording = True
        output = compute()
        self._recording, frozen, self._frozen = False, self._frozen, None
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            self._frozen = frozen
            output.copy_(compute())
            self._frozen = None
            return output

        return replay


def logprobs(lm: MaskedLM, texts: list[str], metric: str, rows: int, stand_in: StandIn | None) -> np.ndarray:
    """A request, with graphs or without."""
    with lm._computing():
        spec, plan = lm.spec(), lm.plan(texts, metric=metric)
        held = None if stand_in is None else stand_in.graphs
        return run(spec, plan, read_logprobs(), device=CPU, batch_tokens=rows, graphs=held)["logprobs"]


def assert_same(
    lm: MaskedLM, stand_in: StandIn, texts: list[str] = POOL, metric: str = "original", rows: int = 60
) -> None:
    """A request with graphs finds what one without them does."""
    assert_near(logprobs(lm, texts, metric, rows, stand_in), logprobs(lm, texts, metric, rows, None), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_replays_find_what_plain_passes_find(lms: dict[str, MaskedLM], name: str) -> None:
    lm, stand_in = lms[name], StandIn()
    for turn in range(4):
        for metric in ("original", "window"):
            for rows in (60, 500):
                assert_same(lm, stand_in, POOL[turn:] + POOL[:turn], metric, rows)
    assert stand_in.recorded > 10 and stand_in.replayed > 3 * stand_in.recorded


def test_a_shape_is_recorded_when_it_comes_for_the_third_time(lms: dict[str, MaskedLM]) -> None:
    lm, stand_in, counts = lms["bert"], StandIn(), []
    for _ in range(5):
        logprobs(lm, POOL[:1], "original", 5000, stand_in)
        counts.append((stand_in.plain, stand_in.recorded, stand_in.replayed))
    assert counts == [(1, 0, 0), (2, 0, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3)]


def test_results_outlive_the_next_replay(lms: dict[str, MaskedLM]) -> None:
    lm, stand_in = lms["bert"], StandIn()
    one, other = (pack(lm.plan([text]), 1000)[0] for text in ("The cat follow.", "The dogs follow."))
    assert one.shape() == other.shape()
    with lm._computing():
        states = stand_in.graphs.over(lm.spec(), lm.tokenizer.mask_token_id, CPU)
        for _ in range(3):
            first, second = states(one), states(other)
        assert stand_in.replayed >= 4
        for found, batch in ((first, one), (second, other)):
            wanted = head_states(lm.spec(), batch, lm.tokenizer.mask_token_id)
            assert_near(found.numpy(), wanted.numpy(), 1e-5)
        assert not torch.allclose(first, second)


def test_when_many_shapes_are_recorded_all_go_for_the_next(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never one alone: with it would go the workspace of the others' stream."""
    monkeypatch.setattr(graphs, "MOST_RECORDINGS", 2)
    lm, stand_in = lms["bert"], StandIn()
    first, second, third = [["A"], ["The cat follow."], ["The dogs follow the cat."]]
    for text in (first, second, first):
        for _ in range(3):
            assert_same(lm, stand_in, text)
    assert (stand_in.recorded, len(stand_in.graphs._recordings)) == (2, 2)
    recorder = stand_in.graphs._recorder
    for _ in range(3):
        assert_same(lm, stand_in, third)
    assert (stand_in.recorded, len(stand_in.graphs._recordings)) == (3, 1)
    assert stand_in.graphs._recorder is not recorder
    plain = stand_in.plain
    assert_same(lm, stand_in, second)  # dropped, so it starts over
    assert stand_in.plain == plain + 1 and stand_in.recorded == 3


def test_shapes_that_come_too_seldom_are_never_recorded(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "REMEMBERED", 2)
    lm, stand_in = lms["bert"], StandIn()
    for _ in range(6):
        for text in ("A", "The cat follow.", "The dogs follow the cat."):
            logprobs(lm, [text], "original", 5000, stand_in)
    assert stand_in.recorded == 0 and len(stand_in.graphs._seen) == 2


def test_large_batches_are_not_recorded(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch) -> None:
    lm, stand_in = lms["bert"], StandIn()
    batch = pack(lm.plan(POOL[:1]), 5000)[0]
    monkeypatch.setattr(graphs, "MOST_ROWS", batch.tokens - 1)
    for _ in range(5):
        logprobs(lm, POOL[:1], "original", 5000, stand_in)
    assert (stand_in.plain, stand_in.recorded) == (5, 0)
    monkeypatch.setattr(graphs, "MOST_ROWS", batch.tokens)
    for _ in range(5):
        logprobs(lm, POOL[:1], "original", 5000, stand_in)
    assert stand_in.recorded == 1


def doubled_precision(model: Any) -> None:
    model.double()


def new_parameter(model: Any) -> None:
    dense = model.base_model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 0.5)


def other_storage(model: Any) -> None:
    dense = model.base_model.encoder.layer[0].intermediate.dense
    dense.weight.data = dense.weight.data * 0.5


def other_bias(model: Any) -> None:
    model.base_model.embeddings.LayerNorm.bias = nn.Parameter(model.base_model.embeddings.LayerNorm.bias.detach() + 1)


def other_epsilon(model: Any) -> None:
    model.base_model.embeddings.LayerNorm.eps = 0.5


def in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


CHANGES = [new_parameter, other_storage, other_bias, in_place]


def changing(kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> MaskedLM:
    make = {"bert": small_bert, "deberta": small_deberta}[kind]
    return mlmfast.load(make(len(tokenizers[kind])), tokenizers[kind])


@pytest.fixture
def tokenizers(
    bert_tokenizer: PreTrainedTokenizerBase, deberta_tokenizer: PreTrainedTokenizerBase
) -> dict[str, PreTrainedTokenizerBase]:
    return {"bert": bert_tokenizer, "deberta": deberta_tokenizer}


@pytest.mark.parametrize("kind", ["bert", "deberta"])
@pytest.mark.parametrize("change", [*CHANGES, doubled_precision, other_epsilon])
def test_a_changed_model_is_never_replayed_as_it_was(
    tokenizers: dict[str, PreTrainedTokenizerBase], kind: str, change: Callable[[Any], None]
) -> None:
    lm, stand_in = changing(kind, tokenizers), StandIn()
    for _ in range(4):
        assert_same(lm, stand_in)
    assert stand_in.replayed
    before = logprobs(lm, POOL, "original", 60, None)
    change(lm.model)
    assert not np.allclose(before, logprobs(lm, POOL, "original", 60, None), atol=1e-3) or change is doubled_precision
    for _ in range(4):
        assert_same(lm, stand_in)


@pytest.mark.parametrize("change", [new_parameter, other_storage, other_bias])
def test_planted_recordings_that_overlook_the_weights_fail_the_same_check(
    tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    monkeypatch.setattr(graphs, "signature", lambda spec: None)
    lm, stand_in = changing("bert", tokenizers), StandIn()
    for _ in range(4):
        assert_same(lm, stand_in)
    change(lm.model)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(lm, stand_in)


def test_weights_changed_in_place_go_on_with_the_same_recordings(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    lm, stand_in = changing("bert", tokenizers), StandIn()
    for _ in range(4):
        assert_same(lm, stand_in)
    plain, recorded = stand_in.plain, stand_in.recorded
    in_place(lm.model)
    assert_same(lm, stand_in)
    assert (stand_in.plain, stand_in.recorded) == (plain, recorded)


def leaves(part: Any, place: str = "") -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """Everything in a spec that is no container: its place, the spec with it changed, and itself."""
    if isinstance(part, (list, tuple)):
        for i, one in enumerate(part):
            for name, changed, leaf in leaves(one, f"{place}[{i}]"):
                yield name, lambda new, i=i, c=changed, p=part: [*p[:i], c(new), *p[i + 1 :]], leaf
    elif is_dataclass(part):
        for field in fields(part):
            for name, changed, leaf in leaves(getattr(part, field.name), f"{place}.{field.name}"):
                yield name, lambda new, f=field.name, c=changed, p=part: replace(p, **{f: c(new)}), leaf
    else:
        yield place, lambda new: new, part


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_holds_every_tensor_and_number(lms: dict[str, MaskedLM], name: str) -> None:
    spec = lms[name].spec()
    own, seen = signature(spec), 0
    assert own == signature(lms[name].spec())
    for place, changed, leaf in leaves(spec):
        others: list[Any] = ["another"]
        if isinstance(leaf, Tensor):
            held = leaf.detach()
            assert signature(changed(held)) == own
            strided = torch.as_strided(held, held.shape, [0] * held.ndim)
            others = [held.clone(), held[:-1], held.view(torch.uint8), strided]
        for other in others:
            assert signature(changed(other)) != own, f"{place} is overlooked"
            seen += 1
    assert seen > 100


def test_the_shape_holds_every_size(lms: dict[str, MaskedLM]) -> None:
    batch = pack(lms["bert"].plan(POOL[:1]), 5000)[0]
    encoded = batch.encoded()
    for i, tensor in enumerate(encoded):
        other = batch.over([*encoded[:i], tensor[:-1], *encoded[i + 1 :]])
        assert other.shape() != batch.shape()
    assert replace(batch, max_seqlen=batch.max_seqlen + 1).shape() != batch.shape()
    assert replace(batch, max_scored=batch.max_scored + 1).shape() != batch.shape()
    assert batch.over([tensor.clone() for tensor in encoded]).shape() == batch.shape()


def test_another_precision_or_mask_is_another_recording(lms: dict[str, MaskedLM]) -> None:
    lm, stand_in = lms["bert"], StandIn()
    batch, spec = pack(lm.plan(POOL[:1]), 5000)[0], lm.spec()
    mask = lm.tokenizer.mask_token_id
    before = torch.backends.cuda.matmul.fp32_precision

    def states(mask_token_id: int) -> Tensor:
        with lm._computing():
            for _ in range(4):
                found = stand_in.graphs.over(spec, mask_token_id, CPU)(batch)
        return found

    states(mask)
    assert stand_in.recorded == 1
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        states(mask)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert stand_in.recorded == 2
    found = states(mask + 1)
    assert stand_in.recorded == 3
    assert_near(found.numpy(), head_states(spec, batch, mask + 1).detach().numpy(), 1e-5)


def test_a_pass_that_cannot_be_recorded_runs_plainly_and_warns_once(lms: dict[str, MaskedLM]) -> None:
    lm, stand_in = lms["deberta"], StandIn()
    attempts = []

    def refuse(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        attempts.append(compute)
        raise RuntimeError("operation not permitted when stream is capturing")

    stand_in.record = refuse  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_same(lm, stand_in)
        tried = len(attempts)
        for _ in range(3):
            assert_same(lm, stand_in)
    assert [warning.category for warning in caught] == [UserWarning]
    assert "not permitted" in str(caught[0].message) and "cuda_graphs=False" in str(caught[0].message)
    assert 1 < tried == len(attempts) <= len({batch.shape() for batch in pack(lm.plan(POOL), 60)})


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_recordings_hold_is_given_up_before_a_batch_is_halved(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lm, stand_in, sizes = lms[name], StandIn(), []
    true_encode = execution.encode

    for _ in range(4):
        assert_same(lm, stand_in, POOL[:2], "original", 60)
    assert stand_in.graphs._recordings

    def full_while_recordings_live(spec: Any, batch: PackedBatch, mask_token_id: int) -> Tensor:
        sizes.append(batch.tokens)
        if stand_in.graphs._recordings:
            raise torch.OutOfMemoryError("out of memory")
        return true_encode(spec, batch, mask_token_id)

    wanted = logprobs(lm, POOL[2:], "window", 3000, None)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "encode", full_while_recordings_live)
        assert_near(logprobs(lm, POOL[2:], "window", 3000, stand_in), wanted, 1e-5)
    packed = [batch.tokens for batch in pack(lm.plan(POOL[2:], metric="window"), 3000)]
    assert sizes == [packed[0], *packed]  # once more, and whole


@pytest.mark.parametrize("most", [20, 100])
def test_batches_that_do_not_fit_are_halved_with_graphs_and_late_results(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    lm, stand_in = lms["deberta"], StandIn()
    wanted = logprobs(lm, POOL, "window", 3000, None)
    true_encode = execution.encode

    def small_memory(spec: Any, batch: PackedBatch, mask_token_id: int) -> Tensor:
        if batch.tokens > most and batch.copies > 1:
            raise torch.OutOfMemoryError("out of memory")
        return true_encode(spec, batch, mask_token_id)

    monkeypatch.setattr(execution, "encode", small_memory)
    monkeypatch.setattr(execution, "PATIENCE", {})
    for _ in range(4):
        assert_near(logprobs(lm, POOL, "window", 3000, stand_in), wanted, 1e-5)


def test_refresh_and_switching_off(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_bert(len(bert_tokenizer))
    lm = mlmfast.load(model, bert_tokenizer)
    assert lm._graphs is not None and lm._means(lm.spec())["graphs"] is None  # a CPU has none
    stand_in = StandIn()
    lm._graphs = stand_in.graphs
    for _ in range(4):
        assert_same(lm, stand_in)
    assert stand_in.graphs._recordings
    lm.refresh()
    assert not stand_in.graphs._recordings
    assert mlmfast.load(model, bert_tokenizer, cuda_graphs=False)._graphs is None


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_only_passes_that_ask_for_nothing_are_recorded(
    bert_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    lm = mlmfast.load(small_bert(len(bert_tokenizer)), bert_tokenizer, batch_tokens=100)
    spec = lm.spec()
    services = [backends.Service("attention", backend, ""), backends.Service("linear", "triton", "")]
    monkeypatch.setattr(MaskedLM, "device", torch.device("cuda"))
    monkeypatch.setattr(backends, "report", lambda device, dtype: services)
    assert lm._means(spec)["graphs"] is (lm._graphs if backend == "triton" else None)


@contextmanager
def on_cuda(lm: MaskedLM) -> Iterator[None]:
    lm.model.to("cuda")
    try:
        yield
    finally:
        lm.model.to("cpu")


def recordings(count: int) -> Iterator[tuple[graphs.CudaRecorder, Callable[[], Tensor], Tensor]]:
    """So many recorders with a recording each, of twice a tensor."""
    for place in range(count):
        given = torch.full((3,), float(place), device="cuda")
        recorder = graphs.CudaRecorder(given.device)
        yield recorder, recorder(partial(torch.mul, given, 2)), given


@pytest.mark.gpu
def test_recorders_that_live_have_streams_of_their_own() -> None:
    """torch hands out the same 32 in turn."""
    kept = list(recordings(5))
    for _ in range(3):
        list(recordings(9))  # that live no longer
    gc.collect()
    kept += recordings(5)
    assert len({recorder._stream.cuda_stream for recorder, _, _ in kept}) == 10
    free = [graphs.CudaRecorder(torch.device("cuda"))._stream.cuda_stream for _ in range(3)]
    assert len(set(free)) == 1  # each of them lived for a moment
    for _, replay, given in kept:
        given += 1
        assert replay().tolist() == (2 * given).tolist()


@pytest.mark.gpu
def test_after_a_recording_that_fails_nothing_is_recorded_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.CudaRecorder, "_spoilt", None)
    x = torch.ones(3, device="cuda")
    turns = []

    def full() -> Tensor:
        turns.append(x)
        found = x + 1
        if len(turns) == 2:  # the first one warms up
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    recorder = graphs.CudaRecorder(x.device)
    before = recorder(lambda: x * 5)
    with pytest.raises(torch.OutOfMemoryError):
        recorder(full)
    assert recorder(lambda: x + 1)().tolist() == [2, 2, 2]  # that one ended in order
    assert before().tolist() == [5, 5, 5]
    if SIMULATED:  # on a GPU this would spoil the tests that follow
        with pytest.raises(RuntimeError, match="capturing"):
            graphs.CudaRecorder(x.device)(lambda: x + x.sum().item())
        with pytest.raises(RuntimeError, match="earlier recording of this process has failed: .*capturing"):
            graphs.CudaRecorder(x.device)(lambda: x + 1)


@pytest.mark.gpu
def test_one_recording_at_a_time() -> None:
    """Of models in two threads: the beginning of a recording waits for the device, which another would not survive."""
    under_way, most = 0, []
    x = torch.ones(3, device="cuda")

    def run() -> Tensor:
        nonlocal under_way
        under_way += 1
        most.append(under_way)
        time.sleep(0.02)
        under_way -= 1
        return x + 1

    def record() -> None:
        with simulated():
            graphs.CudaRecorder(x.device)(run)

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 6 and max(most) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_cuda_graphs_find_what_plain_passes_find(tokenizers: dict[str, PreTrainedTokenizerBase], kind: str) -> None:
    lm = changing(kind, tokenizers)
    with on_cuda(lm), warnings.catch_warnings():
        warnings.simplefilter("error")
        for change in (lambda model: None, *CHANGES):
            change(lm.model)
            for turn in range(5):
                texts = POOL[turn:] + POOL[:turn]
                lm.batch_tokens = 60
                found = [score.logprobs for score in lm.score(texts)]
                assert lm._graphs is not None
                held, lm._graphs = lm._graphs, None
                wanted = [score.logprobs for score in lm.score(texts)]
                lm._graphs = held
                for got, want in zip(found, wanted):
                    assert_near(got, want, 1e-5)
            assert lm._graphs._recordings
