"""pre_norm: the sum of a residual stream and its LayerNorm, which is add_layer_norm's."""

from __future__ import annotations

import pytest
import torch
from norms import SHAPES, arguments, plain
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

from mlmfast.ops.add_layer_norm import add_layer_norm
from mlmfast.ops.pre_norm import pre_norm


@on_every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pre_norm(backend: Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_as_good_as_torch(backend, dtype, pre_norm, plain, arguments(*shape))


@on_every_backend
@pytest.mark.parametrize("given", ["residual", "residual bias", "residual norm_bias"])
def test_what_may_be_left_out(backend: Backend, dtype: torch.dtype, given: str) -> None:
    assert_as_good_as_torch(backend, dtype, pre_norm, plain, arguments(5, 33, given))


@on_every_backend
@pytest.mark.parametrize("given", ["residual", "residual bias norm_bias"])
def test_the_norm_is_of_the_unrounded_sum(backend: Backend, dtype: torch.dtype, given: str) -> None:
    """Bit for bit what add_layer_norm returns; the sum is rounded once, to the nearest number."""
    values = moved(arguments(33, 257, given), backend, dtype)
    x, residual, bias = values[:3]
    with serving(backend):
        total, normed = pre_norm(*values)
        assert torch.equal(normed, add_layer_norm(*values))
    assert total.dtype == normed.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    right = x.to(wide) + (0 if bias is None else bias.to(wide)) + residual.to(wide)
    assert torch.equal(total, right.to(dtype))
    if dtype.itemsize == 2:  # and what a norm of the rounded sum would be is something else
        assert not torch.equal(add_layer_norm(total, None, None, *values[3:]), normed)


@on_every_backend
def test_rows_wherever_they_begin(backend: Backend, dtype: torch.dtype) -> None:
    """Slices of a wider product and transposed views: each the same as its contiguous copy."""
    x, residual, bias, weight, norm_bias, eps = moved(arguments(9, 20), backend, dtype)
    wide = torch.cat([residual, x, residual], dim=1)
    every_other = torch.stack([weight, norm_bias, bias], dim=1).unbind(1)
    with serving(backend):
        whole = pre_norm(x, residual, bias, weight, norm_bias, eps)
        for found in (
            pre_norm(wide[:, 20:40], wide[:, 40:], bias, weight, norm_bias, eps),
            pre_norm(x.T.contiguous().T, residual.T.contiguous().T, bias, weight, norm_bias, eps),
            pre_norm(x, residual, every_other[2], *every_other[:2], eps),
        ):
            assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])


@on_every_backend_in_float32
def test_weights_of_another_dtype(backend: Backend) -> None:
    x, residual, *rest = moved(arguments(3, 20), backend, torch.float32)
    x, residual = x.to(backend.narrow), residual.to(backend.narrow)
    truth = plain(x.double(), residual.double(), *(r if isinstance(r, float) else r.double() for r in rest))
    with serving(backend):
        found = pre_norm(x, residual, *rest)
    for got, right in zip(found, truth):
        assert got.dtype == backend.narrow
        torch.testing.assert_close(got.double(), right, rtol=2**-8, atol=1e-5)


@on_every_backend
def test_what_is_given_stays_as_it_is(backend: Backend, dtype: torch.dtype) -> None:
    """The sum is no view of the stream that it follows."""
    values = moved(arguments(5, 33, "residual"), backend, dtype)
    before = [v.clone() for v in values[:2]]
    with serving(backend):
        total, _ = pre_norm(*values)
        total.zero_()
    assert all(torch.equal(v, b) for v, b in zip(values, before))


@on_every_cpu_path
def test_threads_change_nothing(backend: Backend) -> None:
    given = moved(arguments(333, 100), backend, torch.float32)
    threads = torch.get_num_threads()
    try:
        with serving(backend):
            alone = pre_norm(*given)
            torch.set_num_threads(3)
            assert all(torch.equal(a, b) for a, b in zip(pre_norm(*given), alone))
    finally:
        torch.set_num_threads(threads)


@on_every_cpu_path
def test_arguments_that_do_not_fit(backend: Backend) -> None:
    x, residual, *rest = moved(arguments(3, 20), backend, torch.float32)
    with serving(backend):
        with pytest.raises(RuntimeError, match="pre_norm: residual must have as many rows"):
            pre_norm(x, residual[:2], *rest)
        with pytest.raises(RuntimeError, match="pre_norm: residual must be rows of width 20"):
            pre_norm(x, residual[:, :9], *rest)


@on_every_backend_in_float32
def test_registration(backend: Backend) -> None:
    for given in ("residual bias norm_bias", "residual"):
        check_registration(backend, pre_norm, arguments(3, 8, given))
