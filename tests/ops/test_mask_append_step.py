"""``mask_append_step``: with every row it is the exact pass; with some, it sees the others' cached rows and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import BACKENDS, Backend, serving
from specs import mapped
from test_synchronisation import META, no_waiting
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import mlmfast
from mlmfast.architectures.spec import EncoderSpec
from mlmfast.cache import Cache, Line, StepBatch, row_bytes, step_batch
from mlmfast.encoder import position_ids as device_position_ids
from mlmfast.execution import head_states
from mlmfast.model import MaskedLM
from mlmfast.ops.mask_append_step import mask_append_step
from mlmfast.packing import PackedBatch

MASK = 4
NAMES = ["bert", "roberta", "deberta", "deberta, all of it"]
EACH = [pytest.param(b, id=str(b)) for b in BACKENDS if b.instructions is None]


@pytest.fixture(scope="module")
def models(
    lms: dict[str, MaskedLM], roberta_model: PreTrainedModel, roberta_tokenizer: PreTrainedTokenizerBase
) -> dict[str, MaskedLM]:
    return {**lms, "roberta": mlmfast.load(roberta_model, roberta_tokenizer)}


def spec_of(models: dict[str, MaskedLM], name: str, backend: Backend, dtype: torch.dtype) -> EncoderSpec:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(backend.device, dtype if tensor.is_floating_point() else tensor.dtype)

    return mapped(models[name].spec(), moved)


def line(slot: int, length: int, start: int, masks: int = 3, scored: int = 1, seed: int = 0) -> Line:
    """Random tokens, some of them padding (RoBERTa counts without it), and masks before the last one."""
    ids = np.random.default_rng(100 * length + seed).integers(0, 60, length)
    ids[3::7] = 1
    masked = range(length - 1 - masks, length - 1)
    ids[list(masked)] = MASK
    return Line(slot, ids, start, masked, masked[:scored])


def whole(lines: Sequence[Line]) -> PackedBatch:
    """The same sequences as whole copies."""
    starts = np.cumsum([0, *(len(one.token_ids) for one in lines)])
    scored = [np.array(one.scored) + at for one, at in zip(lines, starts)]
    rows = torch.from_numpy(np.concatenate(scored))
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        token_ids=torch.from_numpy(np.concatenate([one.token_ids for one in lines])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        masked_rows=torch.from_numpy(np.concatenate([np.array(one.masked) + at for one, at in zip(lines, starts)])),
        scored_rows=rows,
        cu_scored=torch.tensor(np.cumsum([0, *map(len, scored)]), dtype=torch.int32),
        scored_positions=torch.from_numpy(np.concatenate([np.array(one.scored) for one in lines])),
        max_seqlen=max(len(one.token_ids) for one in lines),
        max_scored=max(map(len, scored)),
        targets=empty,
        target_rows=empty,
        order=empty,
    )


def step(spec: EncoderSpec, cache: Cache, lines: Sequence[Line], **options: Any) -> Tensor:
    device = spec.embedding.words.device
    batch = step_batch(spec.embedding, lines, cache, **options).to(device)
    with torch.inference_mode():
        return mask_append_step(spec, batch, MASK, cache)


def exact(spec: EncoderSpec, lines: Sequence[Line]) -> Tensor:
    with torch.inference_mode():
        return head_states(spec, whole(lines).to(spec.embedding.words.device), MASK)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", EACH)
def test_every_row_is_the_exact_pass(models: dict[str, MaskedLM], name: str, backend: Backend) -> None:
    spec = spec_of(models, name, backend, torch.float32)
    lines = [line(1, 9, 0), line(2, 31, 0, scored=3), line(5, 17, 0, masks=1)]
    with serving(backend):
        found = step(spec, Cache(spec, 7, 33), lines)
        torch.testing.assert_close(found, exact(spec, lines), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", EACH)
def test_unchanged_tokens_need_no_earlier_row(models: dict[str, MaskedLM], name: str, backend: Backend) -> None:
    """The cached rows are those of the same sequence, so it does not matter how few are computed anew."""
    spec = spec_of(models, name, backend, torch.float32)
    lengths = {0: 23, 2: 8, 3: 40} if backend.name != "interpreter" else {0: 13, 2: 8}
    lines = [line(slot, length, 0) for slot, length in lengths.items()]
    with serving(backend):
        cache = Cache(spec, 5, 41)
        right = step(spec, cache, lines)
        for window in (0, 1, 3):
            again = [line(one.slot, len(one.token_ids), one.masked[0] - window) for one in lines]
            for some in (again, again[:1], again[1:]):
                mine = [lines.index(one) for one in lines if one.slot in {other.slot for other in some}]
                torch.testing.assert_close(step(spec, cache, some), right[mine], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(step(spec, cache, again, granularity=16), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", [b for b in EACH if b.values[0].name != "interpreter"])
def test_steps_are_as_good_as_the_reference_in_each_dtype(
    models: dict[str, MaskedLM], name: str, backend: Backend
) -> None:
    """A generation's steps with a token more each, against the reference in float64; rows freeze on the way."""

    def steps(spec: EncoderSpec) -> Tensor:
        cache = Cache(spec, 2, 48)
        found = [step(spec, cache, [line(0, 12, 0), line(1, 20, 0)])]
        for more in range(1, 9):
            found.append(step(spec, cache, [line(slot, n + more, n + more - 6) for slot, n in ((0, 12), (1, 20))]))
        return torch.cat(found)

    reference = Backend("reference", backend.device)
    for dtype in backend.dtypes:
        rounded = spec_of(models, name, backend, dtype)
        wide = mapped(rounded, lambda t: t.double() if t.is_floating_point() else t)
        with serving(reference):
            truth, own = steps(wide), steps(rounded)
        with serving(backend):
            found = steps(rounded)
        slack = 1e-6 if dtype in (torch.float32, torch.float64) else 1e-3
        assert bool(torch.isfinite(found).all())
        assert (found.double() - truth).abs().max() <= 2 * (own.double() - truth).abs().max() + slack


@pytest.mark.parametrize("name", NAMES)
def test_what_no_line_holds_is_not_read(models: dict[str, MaskedLM], name: str) -> None:
    backend = BACKENDS[1]
    spec = spec_of(models, name, backend, torch.float32)
    lines = [line(1, 14, 0), line(3, 9, 0)]
    with serving(backend):
        clean, cache = step(spec, Cache(spec, 6, 20), lines), Cache(spec, 6, 20)
        for layer in cache.layers:
            for rows in (layer.keys, layer.values, layer.inputs):
                if rows is not None:
                    rows.fill_(torch.nan)
        assert torch.equal(step(spec, cache, lines), clean)
        shorter = [line(1, 11, 0), line(3, 9, 4)]  # rows 11 to 13 of the first slot are still there
        torch.testing.assert_close(step(spec, cache, shorter)[:1], exact(spec, shorter[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_shift_fails(models: dict[str, MaskedLM], name: str) -> None:
    """What the tests above compare does depend on every index of a step."""
    spec = spec_of(models, name, BACKENDS[1], torch.float32)
    cache = Cache(spec, 3, 30)
    right = step(spec, cache, [line(0, 20, 0), line(1, 25, 0)])
    batch = step_batch(spec.embedding, [line(0, 20, 13), line(1, 25, 17)], cache)
    planted: dict[str, Tensor] = {
        "cache_rows": batch.cache_rows - 1,
        "cu_keys": batch.cu_keys + torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.int32),
        "token_ids": batch.token_ids.roll(1),
    }
    if spec.embedding.positions is not None:
        planted["position_ids"] = batch.position_ids - 1
    if spec.buckets is not None:
        planted["positions"] = batch.positions - 1
    for name, tensor in planted.items():
        fields = {field: getattr(batch, field) for field in StepBatch.ENCODED} | {name: tensor}
        with torch.inference_mode():
            found = mask_append_step(spec, batch.over(list(fields.values())), MASK, copied(spec, cache))
        assert not torch.allclose(found, right, rtol=1e-4, atol=1e-4), name


def copied(spec: EncoderSpec, cache: Cache) -> Cache:
    other = Cache(spec, cache.slots, cache.capacity)
    for mine, theirs in zip(other.layers, cache.layers):
        mine.keys.copy_(theirs.keys)
        mine.values.copy_(theirs.values)
        if mine.inputs is not None and theirs.inputs is not None:
            mine.inputs.copy_(theirs.inputs)
    return other


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_copied(models: dict[str, MaskedLM], name: str) -> None:
    spec = spec_of(models, name, BACKENDS[1], torch.float32)
    cache = Cache(spec, 4, 30)
    right = step(spec, cache, [line(slot, 20, 0, seed=slot) for slot in range(3)])
    cache.copy([1, 0, 1], [0, 1, 3], 20)  # at once: slot 0 is both read and written
    again = [line(slot, 20, 14, seed=source) for slot, source in ((0, 1), (1, 0), (2, 2), (3, 1))]
    torch.testing.assert_close(step(spec, cache, again), right[[1, 0, 2, 1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_its_size_is_known(models: dict[str, MaskedLM], name: str) -> None:
    spec = models[name].spec()
    cache = Cache(spec, 3, 10)
    held = [rows for layer in cache.layers for rows in (layer.keys, layer.values, layer.inputs) if rows is not None]
    assert sum(rows.nbytes for rows in held) == 30 * row_bytes(spec)


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_counted_as_the_encoder_counts(models: dict[str, MaskedLM], name: str) -> None:
    spec = models[name].spec()
    lines = [line(0, 25, 0), line(1, 9, 0)]
    expected = device_position_ids(spec.embedding, whole(lines))
    assert torch.equal(step_batch(spec.embedding, lines, Cache(spec, 2, 25)).position_ids, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_asks_the_device_for_nothing(models: dict[str, MaskedLM], name: str) -> None:
    spec = mapped(models[name].spec(), lambda tensor: tensor.to(META))
    cache = Cache(spec, 3, 30)
    batch = step_batch(spec.embedding, [line(0, 20, 13), line(2, 25, 17)], cache).to(META)
    with no_waiting():
        states = mask_append_step(spec, batch, MASK, cache)
    assert states.shape == (2, spec.head.vocabulary.shape[1])
