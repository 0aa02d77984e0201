"""Matrix products on the CPU: torch's own, or oneDNN's with packed weights, whichever is faster here.

Packed weights and fused epilogues go through two private torch ops (``torch.ops.mkldnn._reorder_linear_weight`` and
``_linear_pointwise``), which torch.compile uses for the same purpose. Where they are absent, fail, or compute something
else, products are plain. Which of the two is faster depends on the processor, the dtype and the library that torch was
built with, so it is measured, once a process and number of threads; packed copies take memory, so they must be worth
it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mlmfast.cpu.packed_weights import PackedWeights, pack

# activation -> oneDNN's name and algorithm, and the same in place
ACTIVATIONS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "none": ("none", "", lambda y: y),
    "gelu": ("gelu", "none", torch.ops.aten.gelu_),
    "gelu_tanh": ("gelu", "tanh", lambda y: torch.ops.aten.gelu_(y, approximate="tanh")),
    "relu": ("relu", "", torch.relu_),
    "tanh": ("tanh", "", torch.tanh_),
}

PACKED_DTYPES = (torch.float32, torch.bfloat16)
PRIVATE_OPS = ("_reorder_linear_weight", "_linear_pointwise")

# Packed weights are used if they are this much faster.
WORTH = 1.05
# The product that is measured: between a projection and a feed-forward of a base model, few rows so that it is short.
ROWS, INNER, OUTER = 512, 768, 1536
# Fewer rows take about as long as so many, for reading the weight takes the time then; and packed weights are read
# faster, by a factor of two to four at up to 16 rows (AMD Zen 4), though a few rows' multiply-adds would not tell.
LEAST_ROWS = 64
SECONDS = 0.04  # of measuring, for each choice; three pairs at least

_packed_weights = PackedWeights()
_given: dict[tuple[torch.dtype, bool], Choice] = {}


@dataclass(frozen=True)
class Choice:
    """How products of one kind are computed here.

    Attributes:
        least: multiply-adds from which packed weights are faster; infinite where products are plain. Calling oneDNN
            takes about ten microseconds longer than calling MKL, which small products do not win back.
        reason: why, for a reader.
        plain_gflops, packed_gflops: the measured rates; None where there was nothing to compare.
    """

    least: float
    reason: str
    plain_gflops: float | None = None
    packed_gflops: float | None = None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(x @ weight.T + bias)`` on the CPU, without gradients.

    The one entry for products of this backend. A weight may be a slice of rows of a larger one, as the vocabulary ops
    take it tile by tile; each distinct slice is packed for itself, so callers should cut at the same places every time.

    Args:
        x: ``[T, n]``.
        weight: ``[m, n]``.
        bias: ``[m]`` or None.
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        ``[T, m]`` in the dtype of ``x``, never a view of an argument.

    Raises:
        ValueError: an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r} is not known")
    work = max(len(x), LEAST_ROWS) * weight.numel()
    if work >= choice(x.dtype, activation != "none").least and _packs(x, weight, bias):
        packed = _packed_weights.get(weight)
        if packed is not None:
            return _packed(x, packed, bias, activation)
    return _plain(x, weight, bias, activation)


def choice(dtype: torch.dtype, fused: bool) -> Choice:
    """How products are computed with torch's present number of threads; measured at the first call.

    Args:
        dtype: of all operands.
        fused: with an activation after the product, or without.
    """
    if (dtype, fused) in _given:
        return _given[dtype, fused]
    if dtype not in PACKED_DTYPES:
        return Choice(math.inf, "plain: only float32 and bfloat16 weights are packed")
    if not torch.backends.mkldnn.enabled:
        return Choice(math.inf, "plain: oneDNN is switched off (torch.backends.mkldnn.enabled)")
    return _measured(dtype, fused, torch.get_num_threads())


def chosen(dtype: torch.dtype) -> list[float | None]:
    """What :func:`choosing` takes to choose the same elsewhere: last digits differ between the two kinds of product."""
    return [None if math.isinf(one.least) else one.least for one in (choice(dtype, False), choice(dtype, True))]


@contextmanager
def choosing(dtype: torch.dtype, least: Sequence[float | None]) -> Iterator[None]:
    """Within the block products are as an earlier process chose, whatever would be measured now.

    Args:
        dtype: of all operands.
        least: of :func:`chosen`.
    """
    before = dict(_given)
    for fused, one in zip((False, True), least):
        _given[dtype, fused] = Choice(math.inf if one is None else one, "as an earlier process chose")
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)


def forget() -> None:
    """Drops every packed copy: for weights that were written in a way that no version counter sees."""
    _packed_weights.clear()


def _packs(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these operands are what oneDNN's packed product takes; plain torch takes, or refuses, all others."""
    return (
        weight.dtype == x.dtype
        and weight.is_contiguous()
        and weight.numel() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    )


def _packed(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    name, algorithm, _ = ACTIVATIONS[activation]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation][2](F.linear(x, weight, bias))


@cache
def _measured(dtype: torch.dtype, fused: bool, threads: int) -> Choice:
    """Times a typical product both ways, turn by turn. ``threads`` is what torch is set to: part of the key."""
    absent = [name for name in PRIVATE_OPS if not hasattr(torch.ops.mkldnn, name)]
    if absent or not torch.backends.mkldnn.is_available():
        return Choice(
            math.inf, f"plain: this torch has no oneDNN op {absent[0]}" if absent else "plain: this torch has no oneDNN"
        )
    activation = "gelu" if fused else "none"
    generator = torch.Generator().manual_seed(0)  # the caller's random state is not ours to advance
    with torch.inference_mode():
        x = torch.rand(ROWS, INNER, generator=generator).sub_(0.5).to(dtype)
        weight = torch.rand(OUTER, INNER, generator=generator).sub_(0.5).to(dtype)
        bias = torch.zeros(OUTER, dtype=dtype)
        try:
            packed = pack(weight)
            found, expected = _packed(x, packed, bias, activation), _plain(x, weight, bias, activation)
        except RuntimeError as error:
            return Choice(math.inf, f"plain: oneDNN refuses packed weights ({str(error).splitlines()[0]})")
        off = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
        if not off < (1e-5 if dtype == torch.float32 else 2e-2):
            return Choice(math.inf, f"plain: oneDNN's packed product is off by {off:.1g} of the largest number")
        plain, fast = _seconds(x, weight, packed, bias, activation, SECONDS)
        small = weight[:16, :16].contiguous()
        plain_call, fast_call = _seconds(x[:1, :16], small, pack(small), bias[:16], activation, SECONDS / 20)
    work = ROWS * INNER * OUTER
    times = plain / fast
    if times >= WORTH:
        least, reason = max(0.0, (fast_call - plain_call) / (plain - fast) * work), f"packed: {times:.2f} times as fast"
    else:
        least, reason = math.inf, f"plain: packed weights are {times:.2f} times as fast, worth it from {WORTH:.2f}"
    return Choice(least, reason, 2e-9 * work / plain, 2e-9 * work / fast)


def _seconds(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor, activation: str, budget: float
) -> tuple[float, float]:
    """The fastest plain and the fastest packed run within a budget of seconds, taking turns; three of each at least."""
    plain: list[float] = []
    fast: list[float] = []
    begin = time.perf_counter()
    while len(plain) < 3 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        _plain(x, weight, bias, activation)
        middle = time.perf_counter()
        _packed(x, packed, bias, activation)
        plain.append(middle - start)
        fast.append(time.perf_counter() - middle)
    return min(plain), min(fast)
