"""add_layer_norm: residual, bias and LayerNorm in one pass."""

from __future__ import annotations

from typing import Any

import norms
import pytest
import torch
from norms import SHAPES, arguments
from op_cases import (
    Backend,
    assert_as_good_as_torch,
    check_registration,
    moved,
    on_every_backend,
    on_every_backend_in_float32,
    on_every_cpu_path,
    serving,
)
from torch import Tensor

from mlmfast import backends
from mlmfast.ops.add_layer_norm import add_layer_norm


def plain(*given: Any) -> Tensor:
    return norms.plain(*given)[1]


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


@on_every_backend
def test_rows_wherever_they_begin(backend: Backend, dtype: torch.dtype) -> None:
    """Slices of a wider product and transposed views: each the same as its contiguous copy."""
    x, residual, bias, weight, norm_bias, eps = moved(arguments(9, 20), backend, dtype)
    wide = torch.cat([residual, x, residual], dim=1)
    with serving(backend):
        whole = add_layer_norm(x, residual, bias, weight, norm_bias, eps)
        assert torch.equal(add_layer_norm(wide[:, 20:40], wide[:, 40:], bias, weight, norm_bias, eps), whole)
        assert torch.equal(add_layer_norm(x.T.contiguous().T, residual, bias, weight, norm_bias, eps), whole)
        every_other = torch.stack([weight, norm_bias], dim=1)
        assert torch.equal(add_layer_norm(x, residual, bias, every_other[:, 0], every_other[:, 1], eps), whole)


@on_every_backend_in_float32
def test_weights_of_another_dtype(backend: Backend) -> None:
    x, residual, bias, weight, norm_bias, eps = moved(arguments(3, 20), backend, torch.float32)
    x, residual = x.to(backend.narrow), residual.to(backend.narrow)
    truth = plain(x.double(), residual.double(), bias.double(), weight.double(), norm_bias.double(), eps)
    with backends.forced(backend.name):
        got = add_layer_norm(x, residual, bias, weight, norm_bias, eps)
    assert got.dtype == backend.narrow
    torch.testing.assert_close(got.double(), truth, rtol=2**-8, atol=1e-5)


@on_every_cpu_path
def test_threads_change_nothing(backend: Backend) -> None:
    given = moved(arguments(333, 100), backend, torch.float32)
    threads = torch.get_num_threads()
    try:
        with serving(backend):
            alone = add_layer_norm(*given)
            torch.set_num_threads(3)
            assert torch.equal(add_layer_norm(*given), alone)
    finally:
        torch.set_num_threads(threads)


@on_every_cpu_path
def test_arguments_that_do_not_fit(backend: Backend) -> None:
    x, residual, bias, weight, norm_bias, eps = moved(arguments(3, 20), backend, torch.float32)
    with serving(backend):
        with pytest.raises(RuntimeError, match="residual must have as many rows"):
            add_layer_norm(x, residual[:2], bias, weight, norm_bias, eps)
        with pytest.raises(RuntimeError, match="residual must be rows of width 20"):
            add_layer_norm(x, residual[:, :9], bias, weight, norm_bias, eps)
        for place, name in ((2, "bias"), (3, "norm_weight"), (4, "norm_bias")):
            short = [x, residual, bias, weight, norm_bias, eps]
            short[place] = short[place][:19]
            with pytest.raises(RuntimeError, match=f"{name} must be one contiguous row of 20"):
                add_layer_norm(*short)


@on_every_backend_in_float32
def test_registration(backend: Backend) -> None:
    for given in ("residual bias norm_bias", ""):
        check_registration(backend, add_layer_norm, arguments(3, 8, given))
