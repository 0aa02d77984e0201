"""vocab_topk: the most probable tokens of each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import (
    Backend,
    assert_as_good_as_torch,
    check_registration,
    moved,
    on_every_backend,
    on_every_backend_in_float32,
    on_every_cpu_path,
    randn,
    serving,
)
from torch import Tensor

from mlmfast.cpu import vocab_tiles
from mlmfast.ops.vocab_topk import vocab_topk
from mlmfast.reference import vocab_rows as reference_module

SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 17, 3),
    (5, 33, 257, 10),
    (64, 16, 130, 1),
    (2, 15, 15, 4),
    (2, 16, 64, 5),
    (2, 17, 65, 2),
    (3, 768, 1000, 10),
    (3, 8, 1031, 100),
    (3, 8, 40, 0),
    (4, 8, 64, 64),
    (0, 8, 64, 5),
]


def rows_of(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = (hidden @ vocabulary.T + (0 if bias is None else bias)) / temperature
    return logits - torch.logsumexp(logits, dim=1, keepdim=True)


def plain(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int, temperature: float = 1.0) -> Tensor:
    return rows_of(hidden, vocabulary, bias, temperature).sort(dim=1, descending=True).values[:, :k]


def arguments(rows: int, width: int, vocabulary: int, k: int, bias: bool = True) -> list[Any]:
    weight = 2 * randn(vocabulary, width, seed=2) / width**0.5
    return [randn(rows, width, seed=1), weight, randn(vocabulary, seed=3) if bias else None, k]


@on_every_backend
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vocab_topk(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, int], temperature: float) -> None:
    given = [*arguments(*shape, bias=shape[0] != 5), temperature]

    def logprobs(*a: Any) -> Tensor:
        return vocab_topk(*a)[0]

    def at_the_ids(*a: Any) -> Tensor:
        """The truth's log-probabilities at the op's ids: what a wrong id would change."""
        with serving(backend):
            ids = vocab_topk(*moved(given, backend, dtype))[1]
        return rows_of(*a[:3], a[4]).gather(1, ids)

    assert_as_good_as_torch(backend, dtype, logprobs, plain, given)
    assert_as_good_as_torch(backend, dtype, logprobs, at_the_ids, given)


@on_every_backend
def test_what_comes_back(backend: Backend, dtype: torch.dtype) -> None:
    with serving(backend):
        logprobs, ids = vocab_topk(*moved(arguments(6, 8, 40, 7), backend, dtype))
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ids.dtype == torch.int64 and logprobs.shape == ids.shape == (6, 7)
    assert bool((logprobs[:, 1:] <= logprobs[:, :-1]).all())
    assert all(len(set(row)) == 7 for row in ids.tolist())  # no token twice, ties or not


@on_every_backend_in_float32
def test_ties_are_different_tokens(backend: Backend) -> None:
    hidden, vocabulary = torch.ones(3, 2), torch.ones(30, 2)
    with serving(backend):
        logprobs, ids = vocab_topk(*moved([hidden, vocabulary, None, 30], backend, torch.float32))
    assert all(sorted(row) == list(range(30)) for row in ids.tolist())
    torch.testing.assert_close(logprobs.cpu(), torch.full((3, 30), 1 / 30).log())


@on_every_cpu_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 100])
@pytest.mark.parametrize("k", [1, 5, 64, 130, 211])
def test_tiles(backend: Backend, dtype: torch.dtype, tokens: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of any number of tokens, fewer and more than k; among equals the lowest ids, as a stable sort has them."""
    monkeypatch.setattr(vocab_tiles, "TOKENS", tokens)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-2, 3, (9, 4), generator=generator).double()
    vocabulary = torch.randint(-2, 3, (211, 4), generator=generator).double()
    with serving(backend):
        logprobs, ids = vocab_topk(*moved([hidden, vocabulary, None, k, 0.5], backend, dtype))
    values, order = rows_of(hidden, vocabulary, None, 0.5).sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :k])
    torch.testing.assert_close(logprobs.double(), values[:, :k], rtol=1e-6, atol=1e-6)


@on_every_cpu_path
def test_a_broken_model_is_not_a_number(backend: Backend) -> None:
    """NaN stays NaN, and ids stay ids."""
    hidden, vocabulary, bias, k = moved(arguments(3, 8, 200, 7), backend, torch.float32)
    hidden[1, 2] = torch.nan
    bias[[3, 90]] = -torch.inf
    with serving(backend):
        logprobs, ids = vocab_topk(hidden, vocabulary, bias, k)
        everything = vocab_topk(hidden, vocabulary, bias, 200)[1]
    assert logprobs.isnan().all(1).tolist() == [False, True, False] and not logprobs[::2].isnan().any()
    assert all(len(set(row)) == 7 for row in ids.tolist())
    assert all(sorted(row) == list(range(200)) for row in everything.tolist())


@on_every_cpu_path
def test_more_than_there_are(backend: Backend) -> None:
    with serving(backend), pytest.raises(ValueError, match=r"k must be in \[0, 40\]"):
        vocab_topk(*moved(arguments(3, 8, 40, 41), backend, torch.float32))


@on_every_backend_in_float32
def test_registration(backend: Backend) -> None:
    check_registration(backend, vocab_topk, [*arguments(3, 8, 20, 5), 0.7])
    check_registration(backend, vocab_topk, arguments(3, 8, 20, 1, bias=False))


def test_the_reference_works_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(10, 8, 50, 7)
    with serving(Backend("reference", "cpu")):
        whole = vocab_topk(*given)
        for logits in (1, 100, 170, 499):
            monkeypatch.setattr(reference_module, "LOGITS", logits)
            for a, b in zip(vocab_topk(*given), whole):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
