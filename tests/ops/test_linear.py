"""linear: a matrix product with its epilogue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

from mlmfast.cpu import products
from mlmfast.ops.linear import linear

ACTIVATIONS = ["none", "gelu", "gelu_tanh", "relu", "tanh", "geglu"]
SHAPES = [(1, 1, 2), (3, 5, 4), (7, 33, 62), (17, 64, 128), (65, 31, 6), (0, 8, 4)]  # rows, in, out


def gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    z = x @ weight.T + (0 if bias is None else bias)
    if activation == "gelu":
        return gelu(z)
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if activation == "relu":
        return z.clamp(min=0)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "geglu":
        half = z.shape[1] // 2
        return gelu(z[:, :half]) * z[:, half:]
    return z


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """The same by torch's own functions, which round once a function and not once a sign of the formula."""
    z = F.linear(x, weight, bias)
    if activation == "geglu":
        first, second = z.chunk(2, dim=1)
        return F.gelu(first) * second
    functions: dict[str, Any] = {
        "none": lambda z: z,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "relu": F.relu,
        "tanh": torch.tanh,
    }
    return functions[activation](z)


def arguments(rows: int, inner: int, outer: int, bias: bool = True, activation: str = "none") -> list[Any]:
    weight = randn(outer, inner, seed=2) / inner**0.5
    return [randn(rows, inner, seed=1), weight, 2 * randn(outer, seed=3) if bias else None, activation]


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int], activation: str) -> None:
    for bias in (True, False):
        given = arguments(*shape, bias, activation)
        assert_as_good_as_torch(backend, dtype, linear, plain, given, torch_linear)


@on_every_backend
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "tanh", "geglu"])
def test_activations_far_from_zero(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    given = arguments(3, 8, 16, True, activation)
    given[0] = given[0] * 20
    assert_as_good_as_torch(backend, dtype, linear, plain, given, torch_linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("least", [0.0, math.inf], ids=["packed", "plain"])
def test_each_choice_of_the_cpu_backend(
    least: float, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chooses by measuring; here by being told."""
    chosen = products.choice(dtype, True)
    if chosen.packed_gflops is None:
        pytest.skip(chosen.reason)
    monkeypatch.setattr(products, "choice", lambda dtype, fused: products.Choice(least, "told so"))
    cpu = Backend("cpu", "cpu")
    for shape in SHAPES:
        for bias in (True, False):
            given = arguments(*shape, bias, activation)
            assert_as_good_as_torch(cpu, dtype, linear, plain, given, torch_linear)
            if shape[0] * shape[2] > 100:  # of a few numbers, the largest error is luck
                given[0] = given[0] * 20
                assert_as_good_as_torch(cpu, dtype, linear, plain, given, torch_linear)


@on_every_backend_in_float32
def test_a_changed_weight_is_noticed(backend: Backend) -> None:
    """A backend may keep a packed copy of a weight, and must not serve it after the weight has changed."""
    x, weight, bias, _ = moved(arguments(4, 16, 8), backend, torch.float32)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    with serving(backend):
        linear(x, weight, bias)
        weight.mul_(2)
        torch.testing.assert_close(linear(x, weight, bias), plain(x, weight, bias), rtol=1e-5, atol=1e-5)
        for seed in range(5):  # new storage, perhaps at the address of the old one
            weight.data = moved(randn(8, 16, seed=10 + seed), backend, torch.float32)
            torch.testing.assert_close(linear(x, weight, bias), plain(x, weight, bias), rtol=1e-5, atol=1e-5)
        bias.add_(1)
        torch.testing.assert_close(linear(x, weight, bias), plain(x, weight, bias), rtol=1e-5, atol=1e-5)


@on_every_backend_in_float32
def test_views_as_inputs(backend: Backend) -> None:
    x, weight, bias, _ = moved(arguments(6, 16, 8), backend, torch.float32)
    wide = torch.cat([x, x], dim=1)[:, 5:21]
    tall = weight.T.contiguous().T
    assert not wide.is_contiguous() and not tall.is_contiguous()
    with serving(backend):
        got = linear(wide, tall, bias, "gelu")
    torch.testing.assert_close(got, plain(wide, tall, bias, "gelu"), rtol=1e-5, atol=1e-5)


@on_every_backend_in_float32
def test_an_unknown_activation_is_refused(backend: Backend) -> None:
    with serving(backend), pytest.raises(ValueError, match="swish"):
        linear(*moved(arguments(1, 2, 2, True, "swish"), backend, torch.float32))


@on_every_backend_in_float32
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registration(backend: Backend, activation: str) -> None:
    for bias in (True, False):
        check_registration(backend, linear, arguments(3, 8, 4, bias, activation))
