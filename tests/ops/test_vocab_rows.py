"""vocab_rows: whole distributions."""

from __future__ import annotations

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
from mlmfast.ops.vocab_rows import vocab_rows

SHAPES = [(1, 1, 1), (1, 5, 17), (5, 33, 257), (2, 15, 16), (64, 16, 130), (3, 768, 1000), (3, 8, 1031), (0, 8, 64)]


def plain(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    logits = (hidden @ vocabulary.T + (0 if bias is None else bias)) / temperature
    return logits - torch.logsumexp(logits, dim=1, keepdim=True)


def arguments(rows: int, width: int, vocabulary: int, bias: bool = True, sharpness: float = 2.0) -> list[Tensor | None]:
    weight = sharpness * randn(vocabulary, width, seed=2) / width**0.5
    return [randn(rows, width, seed=1), weight, randn(vocabulary, seed=3) if bias else None]


@on_every_backend
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vocab_rows(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int], temperature: float) -> None:
    given = [*arguments(*shape, bias=shape[0] != 5), temperature]
    assert_as_good_as_torch(backend, dtype, vocab_rows, plain, given)


@on_every_backend
def test_rows_are_distributions(backend: Backend, dtype: torch.dtype) -> None:
    with serving(backend):
        rows = vocab_rows(*moved(arguments(7, 16, 300), backend, dtype))
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(rows.double().exp().sum(1).cpu(), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-5)


@on_every_backend_in_float32
def test_one_sided_distributions(backend: Backend) -> None:
    given = arguments(6, 8, 50, sharpness=3000.0)
    assert_as_good_as_torch(backend, torch.float32, vocab_rows, plain, given)


@on_every_cpu_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_tiles(backend: Backend, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_tiles, "TOKENS", tokens)
    assert_as_good_as_torch(backend, dtype, vocab_rows, plain, [*arguments(5, 8, 131), 0.7])


@on_every_backend_in_float32
def test_the_inputs_are_left_alone(backend: Backend) -> None:
    given = moved(arguments(4, 8, 20), backend, torch.float32)
    before = [t.clone() for t in given]
    with serving(backend):
        vocab_rows(*given, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(given, before))


@on_every_backend_in_float32
def test_registration(backend: Backend) -> None:
    check_registration(backend, vocab_rows, [*arguments(3, 8, 20), 0.7])
    check_registration(backend, vocab_rows, arguments(3, 8, 20, bias=False))
