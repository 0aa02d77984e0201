"""add_layer_norm: residual, bias and LayerNorm in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import (
    Backend,
    assert_as_good_as_torch,
    check_registration,
    on_every_backend,
    on_every_backend_in_float32,
    randn,
)
from torch import Tensor

from mlmfast.ops.add_layer_norm import add_layer_norm

SHAPES = [(1, 1), (1, 7), (5, 32), (3, 63), (2, 257), (64, 65), (0, 16)]


def plain(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, weight: Tensor, norm_bias: Tensor | None, eps: float
) -> Tensor:
    rows = x + (0 if bias is None else bias) + (0 if residual is None else residual)
    centred = rows - rows.mean(1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(1, keepdim=True) + eps)
    return scaled * weight + (0 if norm_bias is None else norm_bias)


def arguments(rows: int, width: int, given: str = "residual bias norm_bias", eps: float = 1e-5) -> list[Any]:
    return [
        randn(rows, width, seed=1),
        3 * randn(rows, width, seed=2) if "residual" in given else None,
        2 * randn(width, seed=3) if " bias" in f" {given}".replace("norm_bias", "") else None,
        1 + 0.5 * randn(width, seed=4),
        randn(width, seed=5) if "norm_bias" in given else None,
        eps,
    ]


@on_every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layer_norm(backend: Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_as_good_as_torch(backend, dtype, add_layer_norm, plain, arguments(*shape))


@on_every_backend
@pytest.mark.parametrize("given", ["", "residual", "bias", "norm_bias", "residual norm_bias", "residual bias"])
def test_what_may_be_left_out(backend: Backend, dtype: torch.dtype, given: str) -> None:
    values = arguments(5, 33, given)
    assert [v is not None for v in (values[1], values[2], values[4])] == [
        name in given.split() for name in ("residual", "bias", "norm_bias")
    ]
    assert_as_good_as_torch(backend, dtype, add_layer_norm, plain, values)


@on_every_backend_in_float32
@pytest.mark.parametrize("eps", [1e-12, 1e-7, 0.5])
def test_epsilon(backend: Backend, eps: float) -> None:
    values = arguments(4, 16, eps=eps)
    values[0], values[1], values[2] = values[0] * 1e-3, values[1] * 1e-3, None
    assert_as_good_as_torch(backend, torch.float32, add_layer_norm, plain, values)


@on_every_backend_in_float32
def test_rows_far_from_zero(backend: Backend) -> None:
    """The variance is that of centred rows: the mean of squares less the square of the mean would cancel."""
    values = arguments(4, 64)
    values[0] = values[0] + 300
    assert_as_good_as_torch(backend, torch.float32, add_layer_norm, plain, values)


@on_every_backend_in_float32
def test_registration(backend: Backend) -> None:
    for given in ("residual bias norm_bias", ""):
        check_registration(backend, add_layer_norm, arguments(3, 8, given))
