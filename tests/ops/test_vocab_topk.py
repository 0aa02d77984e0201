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
    randn,
    serving,
)
from torch import Tensor

from mlmfast.ops.vocab_topk import vocab_topk
from mlmfast.reference import vocab_rows as reference_module

SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 17, 3),
    (5, 33, 257, 10),
    (64, 16, 130, 1),
    (3, 8, 1031, 100),
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
