"""Every peer that is installed computes what the others compute, and a wrong one gets no speed."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from typer.testing import CliRunner

from mlmfast.bench import app, peers
from mlmfast.bench.peers.exported import Way, fastest
from mlmfast.bench.peers.scored import plain_logprobs
from mlmfast.bench.peers.subject import batch_shapes, padded_batches
from mlmfast.bench.pll import Bench
from mlmfast.bench.shapes import SHAPES
from mlmfast.bench.work import Peak
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan, TokenSequence, make_plan

SHAPE_NAMES = ["toy-deberta", "toy-roberta"]
FURTHER = ["toy-modernbert", "toy-esm"]


def installed(name: str, shape: str = "toy-deberta") -> None:
    """Skips where a peer's packages are not there, or it does not know the shape's family."""
    if name == "disentangled-flash" and shape != "toy-deberta":
        pytest.skip("disentangled-flash computes DeBERTa-v2 and v3")
    if "cpu" not in peers.PEERS[name].devices:
        pytest.skip(f"{name} computes on {' and '.join(peers.PEERS[name].devices)}")
    for package in peers.PEERS[name].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{name} needs {package}: pip install "mlmfast[peers]"')


def labels(*names: str) -> list[Any]:
    """Peers as parameters; compiling takes a quarter of a minute a shape."""
    return [pytest.param(name, marks=pytest.mark.slow if "compile" in name else ()) for name in names]


def mixed(shape: str) -> list[TokenSequence]:
    """Texts of mixed lengths, 14 copies; of the last only the first words are scored."""
    made = SHAPES[shape]
    return [*made.texts(20, 4), *made.texts(7, 5, seed=1), *made.texts(3, 1, seed=2), *made.texts(33, 4, seed=3)]


@pytest.mark.parametrize("shape", SHAPE_NAMES + FURTHER)
@pytest.mark.parametrize("name", labels(*peers.PEERS))
def test_peers_agree_in_float32(shape: str, name: str) -> None:
    installed(name, shape)
    bench = Bench(shape, against=[name])
    for texts in (bench.texts(12, 10), mixed(shape), bench.texts(5, 1)):  # a new shape, longer, shorter, one copy
        verdict = bench.agreement(texts)
        assert verdict.holds, verdict
        assert verdict.max_abs_diff < 1e-4
    assert bench.peers[name].way()


@pytest.mark.parametrize("shape", SHAPE_NAMES)
@pytest.mark.parametrize("name", labels(*(name for name, peer in peers.PEERS.items() if "bfloat16" in peer.dtypes)))
def test_peers_agree_in_bfloat16(shape: str, name: str) -> None:
    installed(name, shape)
    bench = Bench(shape, dtype="bfloat16", against=[name])
    assert bench.agreement(mixed(shape)).holds


@pytest.mark.parametrize("name", labels("onnxruntime", "openvino", "minicons"))
def test_float32_peers_of_a_bfloat16_model(name: str) -> None:
    installed(name)
    bench = Bench("toy-deberta", dtype="bfloat16", against=[f"{name}:float32"])
    texts = mixed("toy-deberta")
    assert bench.agreement(texts).holds
    truth = bench.truth(texts)
    assert truth is not None
    np.testing.assert_allclose(bench.theirs(texts), truth.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 3, 1 << 30])
def test_exported_models_in_any_batches(name: str, batch: int) -> None:
    installed(name)
    bench = Bench("toy-deberta", against=[name], peer_batch=batch)
    assert bench.agreement(mixed("toy-deberta")).holds


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_every_way_through_a_runtime_is_right(name: str) -> None:
    installed(name)
    bench = Bench("toy-roberta", against=[name])
    texts = bench.texts(12, 40)
    peer: Any = bench.peers[name]
    plan = bench.plan(texts)
    ways = peer._ways(plan)
    assert {way.graph for way in ways} == set(peer.graphs)
    assert {way.batch for way in ways} == {40, 32, 8}
    expected = bench.ours(texts)
    for way in ways:
        np.testing.assert_allclose(peer._compute(way, plan), expected, atol=1e-4)


def test_threads_stay_as_they_are() -> None:
    installed("openvino")
    before = torch.get_num_threads()
    bench = Bench("toy-roberta", against=["openvino"])
    bench.theirs(bench.texts(9, 7))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["minicons", "onnxruntime", "openvino"])
def test_a_wrong_peer_gets_no_speed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(name)
    monkeypatch.setattr("mlmfast.bench.pll.Peak", lambda dtype, products, device: Peak(dtype, ((32, 32, 32),)))
    kind = peers.PEERS[name]
    honest = kind.logprobs

    def wrong(self: Any, plan: MaskPlan) -> np.ndarray:
        found = honest(self, plan).copy()
        found[0] -= 0.01
        return found

    monkeypatch.setattr(kind, "logprobs", wrong)
    arguments = ["pll", "--shapes", "toy-roberta", "--lengths", "9", "--copies", "7", "--pairs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--against", f"hf,{name}", "--json"])
    assert result.exit_code == 1, result.output
    right, bad = (json.loads(line) for line in result.stdout.splitlines())
    assert right["ratio"] > 0  # the others are timed all the same
    assert [bad[key] for key in ("seconds", "peer_seconds", "ratio", "ratio_quartiles")] == [None] * 4


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="choose from hf, hf-scored, hf-compile"):
        peers.named(["gpt"], "float32")
    with pytest.raises(RequestError, match="onnxruntime computes in float32 here.*onnxruntime:float32"):
        peers.named(["hf", "onnxruntime"], "bfloat16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install openvino"):
        peers.named(["openvino"], "float32")


def test_disentangled_flash_serves_deberta_alone() -> None:
    """Refused before its package is looked for, so this runs where that is not installed."""
    model = SHAPES["toy-roberta"].model()
    with pytest.raises(RequestError, match="DeBERTa-v2 and v3, not roberta"):
        peers.DisentangledFlash(peers.Subject(model, SHAPES["toy-roberta"].tokenizer()))


@pytest.mark.parametrize("length", [64, 150])
def test_disentangled_flash_beyond_the_trained_length(length: int) -> None:
    installed("disentangled-flash")
    bench = Bench("toy-deberta", against=["disentangled-flash"])
    assert bench.agreement(bench.texts(length, 6)).holds


def flashdeberta(attention: type, monkeypatch: pytest.MonkeyPatch, shape: str = "toy-deberta") -> Any:
    """The peer over a package that holds this attention."""
    pytest.importorskip("triton")
    package = SimpleNamespace(FlashDisentangledSelfAttention=attention)
    monkeypatch.setitem(sys.modules, "flashdeberta.model", package)
    return peers.FlashDeBERTa(peers.Subject(SHAPES[shape].model(), SHAPES[shape].tokenizer(), batch=3))


def test_flashdeberta_puts_its_attention_into_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's place is taken by an attention that counts, and is Hugging Face's otherwise."""
    knobs = pytest.importorskip("triton.knobs")
    asked: list[str | None] = []

    class Counting(DisentangledSelfAttention):
        def forward(self, *given: Any, **named: Any) -> Any:
            asked.append(knobs.language.fp32_default)
            return super().forward(*given, **named)

    peer = flashdeberta(Counting, monkeypatch)
    bench = Bench("toy-deberta")
    plan = bench.plan(bench.texts(9, 7))
    np.testing.assert_allclose(peer.logprobs(plan), bench.ours(bench.texts(9, 7)), atol=1e-4)
    assert asked == ["ieee"] * 2 * 3  # two layers, batches of 3, 2 and 2
    assert knobs.language.fp32_default is None
    layers = peer._subject.model.deberta.encoder.layer
    assert {type(layer.attention.self) for layer in layers} == {DisentangledSelfAttention}
    assert all(a is b for a, b in zip(peer._model.parameters(), peer._subject.model.parameters()))


def test_flashdeberta_refuses_what_it_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = flashdeberta(DisentangledSelfAttention, monkeypatch)
    bench = Bench("toy-deberta")
    with pytest.raises(RequestError, match="one length only, not of 3 to 33 tokens"):
        peer.logprobs(bench.plan(mixed("toy-deberta")))
    for shape in ("toy-roberta", "toy-deberta-v1"):
        with pytest.raises(RequestError, match="computes DeBERTa-v2 and v3, not"):
            flashdeberta(DisentangledSelfAttention, monkeypatch, shape)
    with pytest.raises(RequestError, match="flashdeberta computes on cuda here, not on cpu"):
        peers.named(["flashdeberta"], "float32")


@pytest.mark.parametrize("length", [9, 64, 150])
def test_flashdeberta_computes_what_hugging_face_does(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (*peers.FlashDeBERTa.packages, "triton"):
        pytest.importorskip(package)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # Triton's interpreter, see conftest.py
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    shape = SHAPES["toy-deberta"]
    model = replace(shape, settings=shape.settings | {"num_attention_heads": 2}).model(device=device)  # 16 wide
    subject = peers.Subject(model, shape.tokenizer())
    plan = make_plan(shape.texts(length, 3), subject.tokenizer.mask_token_id)
    expected = peers.HuggingFaceScored(subject).logprobs(plan)
    np.testing.assert_allclose(peers.FlashDeBERTa(subject).logprobs(plan), expected, atol=1e-5)


def test_minicons_knows_one_mask_a_copy() -> None:
    installed("minicons")
    bench = Bench("toy-roberta", against=["minicons"])
    texts = bench.texts(9, 7)
    peer = bench.peers["minicons"]
    with pytest.raises(RequestError, match="'original'"):
        peer.logprobs(make_plan(texts, bench.tokenizer.mask_token_id, "window"))
    gaps = np.zeros(9, bool)
    gaps[[2, 5]] = True
    with pytest.raises(RequestError, match="gaps"):
        peer.logprobs(bench.plan([TokenSequence(texts[0].token_ids, texts[0].special, gaps)]))


def test_a_peer_does_not_change_the_model() -> None:
    """Its attention is its own; its weights are ours."""
    bench = Bench("toy-roberta")
    twin = peers.Subject(bench.model, bench.tokenizer).twin()
    twin.set_attn_implementation("sdpa")
    assert bench.model.config._attn_implementation == "eager"
    assert all(a is b for a, b in zip(bench.model.parameters(), twin.parameters()))


def test_padded_batches_hold_a_plan() -> None:
    bench = Bench("toy-deberta")
    plan = bench.plan(mixed("toy-deberta"))
    for most in (1, 4, 5, 100):
        batches = list(padded_batches(plan, 0, most))
        sizes = [len(batch.input_ids) for batch in batches]
        assert sum(sizes) == plan.copies
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
        assert {tuple(batch.input_ids.shape) for batch in batches} == batch_shapes(plan, most)
        assert sorted(np.concatenate([batch.order for batch in batches])) == list(range(len(plan.targets)))
        for batch in batches:
            scored = batch.input_ids.flatten()[batch.rows]
            assert (scored == plan.mask_token_id).all()
            assert (batch.input_ids == plan.mask_token_id).sum() == len(batch.rows)
            assert ((batch.input_ids == 0) == (batch.attention_mask == 0)).all()
            assert batch.targets.tolist() == plan.targets[batch.order].tolist()


def test_the_fastest_way_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    took = {Way("a", 8): 3.0, Way("a", 32): 2.0, Way("b", 8): 2.5}
    runs: list[Way] = []

    def run(way: Way) -> None:
        runs.append(way)
        clock[0] += took[way]

    assert fastest({way: partial(run, way) for way in took}) == Way("a", 32)
    assert [runs.count(way) for way in took] == [2, 3, 3]


def test_plain_logprobs_read_both_heads_of_deberta() -> None:
    bench = Bench("toy-deberta")
    plan = bench.plan(mixed("toy-deberta"))
    np.testing.assert_allclose(plain_logprobs(bench.model, plan, 0), bench.lm.logprobs(plan), atol=1e-4)
    shape = SHAPES["toy-deberta"]
    other = type(shape)(
        **(vars(shape) | {"settings": shape.settings | {"legacy": False, "tie_word_embeddings": False}})
    )
    model = other.model()
    peer = peers.HuggingFaceEager(peers.Subject(model, bench.tokenizer))
    np.testing.assert_allclose(plain_logprobs(model, plan, 0), peer.logprobs(plan), atol=1e-4)
