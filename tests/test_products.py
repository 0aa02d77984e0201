"""The cpu backend's products: packed or plain, the same numbers, and never those of a weight that has changed."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import TEXTS, small_bert
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import mlmfast
from mlmfast.cpu import products
from mlmfast.cpu.products import Choice, product

DTYPES = [torch.float32, torch.bfloat16]
Choose = Callable[[float], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """``choose(0)`` packs every weight, ``choose(math.inf)`` none."""

    def to(least: float) -> None:
        monkeypatch.setattr(products, "choice", lambda dtype, fused: Choice(least, "told so"))

    return to


@pytest.fixture
def packed(choose: Choose) -> None:
    """Every weight packed, where that can be done at all."""
    for dtype in DTYPES:
        chosen = products.choice(dtype, True)
        if chosen.packed_gflops is None:
            pytest.skip(f"{dtype}: {chosen.reason}")
    products.forget()
    choose(0)


@pytest.fixture
def unmeasured() -> Iterator[None]:
    products._measured.cache_clear()
    yield
    products._measured.cache_clear()


def operands(dtype: torch.dtype, rows: int = 5, inner: int = 33, outer: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, inner), (outer, inner), (outer,)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def assert_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Right, in a dtype's own precision."""
    expected = F.linear(x.double(), weight.detach().double(), None if bias is None else bias.double())
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(product(x, weight, bias).double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_changes_are_seen(dtype: torch.dtype) -> None:
    x, values, bias = operands(dtype)
    weight = nn.Parameter(values)
    for _ in range(2):
        assert_product(x, weight, bias)
    assert len(products._packed_weights) == 1
    with torch.no_grad():
        weight.mul_(-2)
    assert_product(x, weight, bias)
    with torch.inference_mode():
        assert_product(x, weight, bias)
        weight.add_(1)
        assert_product(x, weight, bias)
    nn.Module.load_state_dict(holder := nn.Linear(33, 24).to(dtype), {"weight": values, "bias": bias})
    assert_product(x, holder.weight, bias)
    for seed in range(5):  # new storage, perhaps at the old one's address
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert_product(x, weight, bias)
    bias.add_(3)
    assert_product(x, weight, bias)


@pytest.mark.usefixtures("packed")
def test_a_new_weight_at_a_freed_ones_address() -> None:
    """Same address, shape and version; only the storage is another one."""
    x, values, _ = operands(torch.float32)
    addresses = []
    for i in range(20):
        weight = values + i
        addresses.append(weight.data_ptr())
        assert_product(x, weight)
        del weight
    assert len(set(addresses)) < len(addresses), "no address was used twice, so nothing was tested"


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_a_weight(dtype: torch.dtype) -> None:
    x, values, bias = operands(dtype)
    weight = nn.Parameter(values)
    cuts = [slice(0, 10), slice(10, 20), slice(20, 24), slice(0, 24)]
    for change in (0, 1):
        for cut in cuts:
            assert_product(x, weight[cut], bias[cut])
        assert len(products._packed_weights) == len(cuts)
        with torch.no_grad():
            weight[12:14].add_(1 + change)
    for cut in cuts:
        assert_product(x, weight[cut], bias[cut])


@pytest.mark.usefixtures("packed")
def test_a_freed_weight_frees_its_packed_copy() -> None:
    x, values, _ = operands(torch.float32)
    kept = nn.Parameter(values)
    freed = [nn.Parameter(values.clone()) for _ in range(3)]
    for weight in (kept, *freed):
        product(x, weight)
    copies = [weakref.ref(packed.weight) for packed in products._packed_weights._kept.values()]
    assert len(copies) == 4
    del freed, weight
    gc.collect()
    product(x, kept[:3])  # copies of freed weights go when the next one is made
    assert [copy() is None for copy in copies] == [False, True, True, True]
    assert len(products._packed_weights) == 2
    products.forget()
    assert copies[0]() is None


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_views(dtype: torch.dtype) -> None:
    x, weight, bias = operands(dtype)
    wide = torch.cat([x, x], dim=1)[:, 7:40]
    assert not wide.is_contiguous()
    assert_product(wide, weight, bias)
    assert_product(x.T.contiguous().T, weight, bias)
    assert len(products._packed_weights) == 1


@pytest.mark.usefixtures("packed")
def test_what_is_not_packed_is_plain() -> None:
    x, weight, bias = operands(torch.float32)
    with torch.inference_mode():
        inference = weight.clone()
        assert_product(x, inference, bias)
        inference.mul_(2)  # no counter sees this
        assert_product(x, inference, bias)
    assert_product(x, weight.T.contiguous().T, bias)
    assert_product(x, weight, torch.stack([bias, bias], 1)[:, 0])
    assert product(x, weight[:0], bias[:0]).shape == (5, 0)
    assert len(products._packed_weights) == 0
    for wrong in (weight.bfloat16(), weight[:, 1:]):
        with pytest.raises(RuntimeError):
            product(x, wrong)


@pytest.mark.usefixtures("packed")
def test_a_weight_that_onednn_refuses_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr("mlmfast.cpu.packed_weights.pack", refuse)
    assert_product(*operands(torch.float32))


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True])  # a fused step leaves the version counters as they were
def test_an_optimiser_step_between_two_scores(
    dtype: torch.dtype, fused: bool, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = small_bert(len(bert_tokenizer)).to(dtype)
    lm = mlmfast.load(model, bert_tokenizer)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    before = totals(lm)
    for _ in range(2):
        model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
        optimiser.step()
        after = totals(lm)
        assert (after != before).all()
        products.forget()
        assert (totals(lm) == after).all()
        before = after


@pytest.mark.usefixtures("packed")
def test_refresh_forgets_packed_copies(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_bert(len(bert_tokenizer))
    lm = mlmfast.load(model, bert_tokenizer)
    lm.score(TEXTS)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # hidden from the version counter
    lm.refresh()
    assert (totals(lm) == totals(mlmfast.load(copy.deepcopy(model), bert_tokenizer))).all()


def totals(lm: mlmfast.MaskedLM) -> np.ndarray:
    return np.array([score.total for score in lm.score(TEXTS)])


@pytest.mark.usefixtures("packed")
def test_another_number_of_threads() -> None:
    x, weight, bias = operands(torch.float32, 200, 64, 96)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            assert_product(x, weight, bias)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("unmeasured")
def test_a_choice_is_measured_once_for_each_number_of_threads() -> None:
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            chosen = products.choice(torch.float32, False)
            assert products.choice(torch.float32, False) is chosen
    finally:
        torch.set_num_threads(threads)
    assert products._measured.cache_info().misses == 2
    assert (torch.random.get_rng_state() == state).all()
    if chosen.packed_gflops is not None:
        assert chosen.plain_gflops > 0 and chosen.packed_gflops > 0
        worth = chosen.packed_gflops >= products.WORTH * chosen.plain_gflops
        assert math.isfinite(chosen.least) == worth and chosen.least >= 0


def test_small_products_are_not_packed(packed: None, choose: Choose) -> None:
    x, weight, bias = operands(torch.float32, rows=products.LEAST_ROWS)
    choose(x.shape[0] * weight.numel() + 1)
    for rows in (1, len(x)):  # few rows count as so many
        assert_product(x[:rows], weight, bias)
    assert len(products._packed_weights) == 0
    assert_product(torch.cat([x, x]), weight, bias)
    assert len(products._packed_weights) == 1


def test_few_rows_are_packed_where_somewhat_more_would_be(packed: None, choose: Choose) -> None:
    x, weight, bias = operands(torch.float32, rows=1)
    choose(products.LEAST_ROWS * weight.numel())
    assert_product(x, weight, bias)
    assert len(products._packed_weights) == 1


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_private_ops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PRIVATE_OPS", ("_an_op_that_torch_dropped",))
    chosen = products.choice(dtype, True)
    assert chosen.least == math.inf and "_an_op_that_torch_dropped" in chosen.reason
    assert_product(*operands(dtype))


@pytest.mark.usefixtures("unmeasured")
def test_private_ops_that_fail_or_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    products_own = products._packed

    def fail(*operands: object) -> Tensor:
        raise RuntimeError("no such primitive\nat line 1")

    monkeypatch.setattr(products, "_packed", fail)
    assert products.choice(torch.float32, False).reason.endswith("(no such primitive)")
    products._measured.cache_clear()
    monkeypatch.setattr(products, "_packed", lambda *operands: products_own(*operands) * 1.001)
    assert products.choice(torch.float32, False).least == math.inf


@pytest.mark.filterwarnings("ignore:TF32")  # the context sets every flag of torch.backends.mkldnn
def test_onednn_switched_off() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert products.choice(torch.float32, False).least == math.inf
        assert_product(*operands(torch.float32))
