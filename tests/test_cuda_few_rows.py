"""The CUDA kernels for few rows without a GPU: whole kernels on the host, and who is given what.

As in ``test_cuda_kernels.py``, what is emulated are the few instructions of ``csrc/cuda/device.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_kernels import assert_near, compiled, pointer, widened
from op_cases import bounds, randn
from torch import Tensor

from mlmfast.reference.add_layer_norm import add_layer_norm as plain_add_layer_norm
from mlmfast.reference.linear import linear as plain_linear
from mlmfast.reference.masked_embedding import masked_embedding as plain_masked_embedding
from mlmfast.reference.pre_norm import pre_norm as plain_pre_norm
from mlmfast.reference.vocab_topk import vocab_topk as plain_vocab_topk

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh", "geglu")
DTYPES = [torch.bfloat16, torch.float16]
ROWS = [1, 7, 8, 9, 17, 31, 32]  # 8, 16 and 32 rows of x have code of their own


def structure(name: str, **fields: str) -> type[ctypes.Structure]:
    """A C++ struct of a kernel's header: its members in order, by kind: pointers, int64, int32, float."""
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
    members = [(member, kinds[kind]) for kind, names in fields.items() for member in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


LINEAR = structure("Linear", p="x weight bias out", l="x_row weight_row", i="rows width outputs activation")
ADD_LAYER_NORM = structure(
    "AddLayerNorm", p="x residual bias norm_weight norm_bias out sum", l="x_row residual_row", i="width", f="eps"
)
MASKED_EMBEDDING = structure(
    "MaskedEmbedding",
    p="token_ids masked_rows position_ids token_types words positions types norm_weight norm_bias scales "
    "cu_seqlens out",
    l="mask_token_id words_row positions_row types_row",
    i="masks copies width",
    f="eps",
)
VOCAB_TOPK = structure(
    "VocabTopk",
    p="hidden vocabulary bias values ids peaks totals logprobs best_ids",
    l="hidden_row vocabulary_row",
    i="rows tokens width k parts",
    f="inverse_temperature",
)


class Kernels:
    """The kernels, called as the ops are."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        outputs = len(weight) // 2 if activation == "geglu" else len(weight)
        out = torch.full((len(x), outputs), torch.nan, dtype=x.dtype)
        numbers = (x.stride(0), weight.stride(0), *x.shape, outputs, ACTIVATIONS.index(activation))
        a = LINEAR(*map(pointer, (x, weight, bias, out)), *numbers)
        self.library.linear(ctypes.byref(a), int(x.dtype == torch.float16))
        return out

    def add_layer_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        total: Tensor | None = None,
    ) -> Tensor:
        out = torch.full(x.shape, torch.nan, dtype=x.dtype)
        strides = (x.stride(0), 0 if residual is None else residual.stride(0))
        a = ADD_LAYER_NORM(*map(pointer, (x, residual, bias, weight, norm_bias, out, total)), *strides, x.shape[1], eps)
        self.library.add_layer_norm(ctypes.byref(a), len(x), int(x.dtype == torch.float16))
        return out

    def pre_norm(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        total = torch.full(x.shape, torch.nan, dtype=x.dtype)
        return total, self.add_layer_norm(x, *rest, total)

    def masked_embedding(
        self, token_ids: Tensor, masked_rows: Tensor, mask_token_id: int, words: Tensor, **more: Any
    ) -> Tensor:
        out = torch.full((len(token_ids), words.shape[1]), torch.nan, dtype=words.dtype)
        a = MASKED_EMBEDDING(
            token_ids=pointer(token_ids),
            masked_rows=pointer(masked_rows),
            words=pointer(words),
            out=pointer(out),
            mask_token_id=mask_token_id,
            words_row=words.stride(0),
            masks=len(masked_rows),
            width=words.shape[1],
            eps=more.get("eps", 1e-12),
        )
        for name in ("position_ids", "positions", "token_types", "types", "norm_weight", "norm_bias", "cu_seqlens"):
            setattr(a, name, pointer(more.get(name)))
        for name in ("positions", "types"):
            setattr(a, f"{name}_row", more[name].stride(0) if name in more else 0)
        scales = more["copy_scale"].float() if "copy_scale" in more else None
        a.scales, a.copies = pointer(scales), 0 if scales is None else len(scales)
        self.library.masked_embedding(ctypes.byref(a), len(token_ids), int(words.dtype == torch.float16))
        return out

    def vocab_topk(
        self,
        hidden: Tensor,
        vocabulary: Tensor,
        bias: Tensor | None,
        k: int,
        temperature: float = 1.0,
        parts: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        rows, parts = len(hidden), parts or self.library.parts_of(len(vocabulary))
        values = torch.full((rows, parts, k), torch.nan)
        ids = torch.full((rows, parts, k), -1, dtype=torch.int32)
        peaks, totals = torch.full((2, rows, parts), torch.nan)
        logprobs = torch.full((rows, k), torch.nan)
        best = torch.full((rows, k), -1)
        numbers = (hidden.stride(0), vocabulary.stride(0), rows, len(vocabulary), hidden.shape[1], k, parts)
        a = VOCAB_TOPK(
            *map(pointer, (hidden, vocabulary, bias, values, ids, peaks, totals, logprobs, best)),
            *numbers,
            1 / temperature,
        )
        self.library.vocab_topk(ctypes.byref(a), int(hidden.dtype == torch.float16))
        return logprobs, best


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(compiled("few_rows", tmp_path_factory.mktemp("emulated")))


def product(rows: int, width: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> list[Any]:
    """Rows of x and of weights lie in wider ones, as a slice of a fused product's do."""
    x, weight = randn(rows, width + 8, seed=1)[:, 8:], randn(outputs, width + 16, seed=2)[:, :width] / width**0.5
    given = [x.to(dtype), 2 * weight.to(dtype), randn(outputs, seed=3).to(dtype) if bias else None]
    assert all(t is None or t.data_ptr() % 16 == 0 for t in given)
    return given


# ---- linear


def check_linear(kernels: Kernels, given: list[Any], activation: str) -> Tensor:
    found = kernels.linear(*given, activation)
    assert_near(found, plain_linear(*widened(given), activation), plain_linear(*given, activation))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_rows(kernels: Kernels, rows: int, dtype: torch.dtype) -> None:
    check_linear(kernels, product(rows, 72, 40, dtype), "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_activations(kernels: Kernels, activation: str, dtype: torch.dtype) -> None:
    for rows in (3, 12, 20):
        check_linear(kernels, product(rows, 64, 36, dtype, bias=rows != 12), activation)


# One piece, its neighbours, a turn of the ring and its neighbours, more pieces than warps.
@pytest.mark.parametrize("width", [8, 24, 32, 40, 120, 128, 136, 512, 520, 1040, 2056])
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_linear_widths(kernels: Kernels, width: int, activation: str) -> None:
    check_linear(kernels, product(5, width, 18, torch.bfloat16), activation)


@pytest.mark.parametrize("outputs", [1, 2, 15, 16, 17, 33, 131 * 16, 132 * 16 + 1])
def test_linear_outputs(kernels: Kernels, outputs: int) -> None:
    """The last two have 16 warps a block, and 8."""
    check_linear(kernels, product(2, 40, outputs, torch.bfloat16), "none")


def test_a_row_alone_is_the_row_among_others(kernels: Kernels) -> None:
    x, weight, bias = product(32, 264, 40, torch.bfloat16)
    together = kernels.linear(x, weight, bias, "gelu")
    for rows in (1, 8, 9, 16, 17):
        assert torch.equal(kernels.linear(x[:rows], weight, bias, "gelu"), together[:rows])


def test_numbers_past_the_end_are_not_read(kernels: Kernels) -> None:
    """Of x and weights, between the end of a row and the next one's beginning, and past the last row."""
    wide = [torch.full((n, 64), torch.nan, dtype=torch.bfloat16) for n in (9, 40)]
    x, weight = wide[0][:5, :40], wide[1][:37, :40]
    x.copy_(randn(5, 40, seed=1)), weight.copy_(randn(37, 40, seed=2))
    check_linear(kernels, [x, weight, None], "none")


def test_not_a_number_stays_in_its_row(kernels: Kernels) -> None:
    x, weight, bias = product(9, 40, 24, torch.bfloat16)
    x[4, 7] = torch.nan
    for activation in ACTIVATIONS:
        found = kernels.linear(x, weight, bias, activation)
        assert found.isnan().all(1).tolist() == [row == 4 for row in range(9)]
        assert not found[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


# ---- add_layer_norm, pre_norm, masked_embedding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 255, 256, 257, 1024, 1531])
@pytest.mark.parametrize("given", ["all", "x alone", "residual", "bias"])
def test_add_layer_norm(kernels: Kernels, given: str, width: int, dtype: torch.dtype) -> None:
    x, residual = randn(3, 2, width, seed=1).to(dtype).unbind(1)  # rows lie in wider ones, at odd places
    vectors = [(1 + randn(width, seed=seed)).to(dtype) for seed in (2, 3, 4)]
    arguments = [
        x,
        residual if given in ("all", "residual") else None,
        vectors[0] if given in ("all", "bias") else None,
        vectors[1],
        None if given == "x alone" else vectors[2],
        1e-5,
    ]
    found = kernels.add_layer_norm(*arguments)
    assert_near(found, plain_add_layer_norm(*widened(arguments)), plain_add_layer_norm(*arguments))
    if arguments[1] is not None:
        total, normed = kernels.pre_norm(*arguments)
        assert torch.equal(normed, found)
        assert torch.equal(total, plain_pre_norm(*arguments)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["words", "positions", "types of all", "a type", "norm", "scale", "everything"])
def test_masked_embedding(kernels: Kernels, parts: str, dtype: torch.dtype) -> None:
    width, rows = 277, 9
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 30, (rows,), generator=generator)
    more: dict[str, Any] = {}
    everything = parts == "everything"
    if parts == "positions" or everything:
        more |= {"positions": randn(50, width + 3, seed=2)[:, 3:].to(dtype)}
        more |= {"position_ids": torch.randint(0, 50, (rows,), generator=generator)}
    if parts in ("types of all", "a type") or everything:
        more |= {"types": randn(2, width, seed=3).to(dtype)}
    if parts == "types of all" or everything:
        more |= {"token_types": torch.randint(0, 2, (rows,), generator=generator)}
    if parts == "norm" or everything:
        more |= {
            "norm_weight": randn(width, seed=4).to(dtype),
            "norm_bias": randn(width, seed=6).to(dtype),
            "eps": 1e-7,
        }
    if parts == "scale" or everything:
        more |= {"copy_scale": (1 + randn(4, seed=7)).to(dtype), "cu_seqlens": bounds([2, 0, 1, 6])}
    words = randn(30, width, seed=1).to(dtype)
    for masked in ([], [0], [8, 3], list(range(rows))):
        given = [tokens, torch.tensor(masked, dtype=torch.int64), 4, words]
        found = kernels.masked_embedding(*given, **more)
        right = plain_masked_embedding(*widened(given), **widened(more))
        assert_near(found, right, plain_masked_embedding(*given, **more))


# ---- vocab_topk


def check_topk(kernels: Kernels, given: list[Any], k: int, temperature: float = 1.0, parts: int | None = None) -> None:
    logprobs, ids = kernels.vocab_topk(*given, k, temperature, parts)
    hidden, vocabulary, bias = widened(given)
    rows = torch.log_softmax((hidden @ vocabulary.T + (0 if bias is None else bias)) / temperature, 1)
    own = plain_vocab_topk(*given, k, temperature)[0]
    assert_near(logprobs, rows.topk(k).values, own)
    assert_near(logprobs, rows.gather(1, ids), own)  # what a wrong id would change
    assert bool((logprobs[:, 1:] <= logprobs[:, :-1]).all())
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_vocab_topk_rows(kernels: Kernels, rows: int, dtype: torch.dtype) -> None:
    check_topk(kernels, product(rows, 40, 300, dtype, bias=rows != 8), 5)


@pytest.mark.parametrize("tokens", [1, 5, 127, 128, 129, 1031])
@pytest.mark.parametrize("k", [1, 5, 32])
def test_vocab_topk_sizes(kernels: Kernels, tokens: int, k: int) -> None:
    check_topk(kernels, product(3, 136, tokens, torch.bfloat16), min(k, tokens), temperature=0.4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_vocab_topk_with_several_tiles_a_part(kernels: Kernels, parts: int) -> None:
    check_topk(kernels, product(9, 40, 1031, torch.bfloat16), 32, 1.7, parts)


def test_parts_follow_from_the_vocabulary(kernels: Kernels) -> None:
    assert [kernels.library.parts_of(tokens) for tokens in (1, 128, 129, 128 * 256 + 1, 250002)] == [1, 1, 2, 256, 256]


def test_vocab_topk_of_an_odd_vocabulary(kernels: Kernels) -> None:
    check_topk(kernels, product(4, 64, 8191, torch.float16), 10)


@pytest.mark.parametrize("k", [1, 7, 32])
def test_among_equals_the_lowest_ids_come_first(kernels: Kernels, k: int) -> None:
    """Small whole numbers, so that products are exact and most tokens have an equal, in other tiles and parts too."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-2, 3, (4, 8), generator=generator).bfloat16()
    vocabulary = torch.randint(-2, 3, (500, 8), generator=generator).bfloat16()
    hidden[3] = 0  # all tokens are equal
    found = kernels.vocab_topk(hidden, vocabulary, None, k)
    for parts in (1, 3):
        assert torch.equal(kernels.vocab_topk(hidden, vocabulary, None, k, parts=parts)[1], found[1])
    rows = torch.log_softmax(hidden.double() @ vocabulary.double().T, 1)
    values, order = rows.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found[1], order[:, :k])
    torch.testing.assert_close(found[0].double(), values[:, :k], rtol=1e-6, atol=1e-6)
    for again, first in zip(kernels.vocab_topk(hidden, vocabulary, None, k), found):
        assert torch.equal(again, first)
    few = kernels.vocab_topk(hidden[:2], vocabulary, None, k)
    assert torch.equal(few[0], found[0][:2]) and torch.equal(few[1], found[1][:2])


def test_tokens_that_cannot_come_are_still_tokens(kernels: Kernels) -> None:
    hidden, vocabulary, bias = product(2, 16, 200, torch.bfloat16)
    bias[:] = -torch.inf
    bias[[7, 150, 3]] = 0
    logprobs, ids = kernels.vocab_topk(hidden, vocabulary, bias, 5)
    assert [set(row) for row in ids[:, :3].tolist()] == [{3, 7, 150}] * 2
    assert ids[:, 3:].tolist() == [[0, 1]] * 2  # of equals the lowest
    assert bool((logprobs[:, 3:] == -torch.inf).all()) and bool(torch.isfinite(logprobs[:, :3]).all())


def test_a_broken_model_is_not_a_number(kernels: Kernels) -> None:
    hidden, vocabulary, bias = product(3, 16, 300, torch.bfloat16)
    hidden[1, 2] = torch.nan
    logprobs, ids = kernels.vocab_topk(hidden, vocabulary, bias, 6)
    assert logprobs.isnan().all(1).tolist() == [False, True, False] and not logprobs[::2].isnan().any()
    assert all(len(set(row)) == 6 and min(row) >= 0 and max(row) < 300 for row in ids.tolist())


# ---- faults that the tests above must find


FAULTS: dict[str, tuple[tuple[str, str, str], Callable[[Kernels], Any]]] = {
    "rows g and g + 8 swapped": (
        ("skinny_product.h", "{low[0], high[0], low[1], high[1]}", "{high[0], low[0], high[1], low[1]}"),
        lambda kernels: check_linear(kernels, product(9, 72, 40, torch.bfloat16), "none"),
    ),
    "the warps' sums added up before they are there": (
        ("linear_kernel.h", "  sync_block();\n", ""),
        lambda kernels: check_linear(kernels, product(9, 72, 40, torch.bfloat16), "none"),
    ),
    "every sum in the first row": (
        ("add_layer_norm_kernel.h", "(a.sum)[first + d]", "(a.sum)[d]"),
        lambda kernels: test_add_layer_norm(kernels, "all", 257, torch.bfloat16),
    ),
    "of equals the last": (
        ("vocab_topk_kernel.h", "a.id < b.id", "a.id > b.id"),
        lambda kernels: test_among_equals_the_lowest_ids_come_first(kernels, 7),
    ),
    "sums relative to an older peak": (
        ("vocab_topk_kernel.h", "mine.partition.total * share(mine.partition.peak, peak)", "mine.partition.total"),
        lambda kernels: check_topk(kernels, product(3, 40, 1031, torch.bfloat16), 5, parts=2),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    planted, finds = FAULTS[fault]
    faulty = Kernels(compiled("few_rows", tmp_path, planted))
    with pytest.raises(AssertionError):
        finds(faulty)
