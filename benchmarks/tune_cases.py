"""What ``tune.py`` tunes: every kernel that has a rule for its launch, at the sizes of base models first.

A :class:`Case` is a dtype and a kernel's sizes, as ``kernels/launches.py`` tells launches apart; :func:`cases` yields
them in the order of what they are expected to bring to a pass of a base model (NOTES.md says why). Candidates are those
that could win: no tile beyond a sequence or far below it, stages only where a loop has a second turn, and as many warps
as leave a thread neither idle nor out of registers.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mlmfast.kernels import (
    attention,
    disentangled_attention,
    launches,
    linear,
    rotary,
    row_norm,
    vocab_rows,
    vocab_tiles,
)
from mlmfast.kernels.launches import Launch

# Half of a window as ModernBERT's layers have it.
WINDOW = 64


@dataclass(frozen=True)
class Scale:
    """How much a case computes; nothing of it but the widths and the lengths is in a case's name."""

    tokens: int = 16384
    scored: int = 1024
    vocabulary: int = 128100
    width: int = 768  # of all heads together
    most: int = 1 << 30  # of a length or a width, all of which are cut to that

    def cut(self, *sizes: int) -> list[int]:
        return [min(size, self.most) for size in sizes]


FULL = Scale()
# For Triton's interpreter, which takes milliseconds for every program.
TOY = Scale(tokens=64, scored=5, vocabulary=150, width=64, most=64)


@dataclass(frozen=True)
class Case:
    """Something to tune: a kernel's case, the op, plain torch's, what both are given, and what may be tried."""

    kernel: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    rule: Callable[..., Launch]
    op: Callable[..., Any]
    plain: Callable[..., Any]
    given: Callable[[torch.device], tuple[Any, ...]]  # made when it is needed: cases are large
    candidates: tuple[Launch, ...]

    @property
    def rounded(self) -> list[int]:
        return [triton.next_power_of_2(size) for size in self.sizes]

    @property
    def name(self) -> str:
        """As the configurations name it."""
        return launches.case(self.dtype, *self.rounded)

    @property
    def usual(self) -> Launch:
        return self.rule(self.dtype, *self.rounded)


def both(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An op in Triton and in plain torch."""
    ours, plain = (importlib.import_module(f"mlmfast.{place}.{op}") for place in ("kernels", "reference"))
    return getattr(ours, op), getattr(plain, op)


def warps_of(numbers: int, fewest: int, most: int) -> list[int]:
    """The warps whose threads hold from ``fewest`` to ``most`` of a program's numbers each."""
    return [warps for warps in (1, 2, 4, 8, 16) if fewest <= numbers / (32 * warps) <= most]


# ---- attention

# Name of a launch -> its rule. Queries and keys are rows of their own where there are few queries.
ATTENTIONS: dict[str, Callable[..., Launch]] = {
    "attention": attention.usual_launch,
    "local_attention": attention.usual_launch,
    "biased_attention": attention.usual_biased_launch,
    "disentangled_attention": attention.usual_banded_launch,
}


def attention_case(kernel: str, dtype: torch.dtype, width: int, queries: int, keys: int, scale: Scale) -> Case:
    """Sequences of ``keys`` tokens of which the last ``queries`` ask, or all."""
    width, queries, keys = scale.cut(width, queries, keys)
    heads = scale.width // width

    def given(device: torch.device) -> tuple[Any, ...]:
        def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        count = scale.tokens // keys
        q = numbers(count * queries, heads, width)
        k, v = (numbers(count * keys, heads, width) for _ in range(2))
        asked, held = (torch.arange(count + 1, dtype=torch.int32, device=device) * each for each in (queries, keys))
        places = torch.arange(keys - queries, keys, device=device).repeat(count) if queries < keys else None
        shared = (asked, held, queries, keys, places, width**-0.5)
        if kernel == "disentangled_attention":  # DeBERTa-v3's table; the same buckets near and far
            buckets = torch.arange(-512, 513, device=device).clamp(-256, 255).add(256).int()
            return (q, k, v, numbers(512, heads, width), numbers(512, heads, width), buckets, *shared)
        bias = numbers(heads, 257, dtype=torch.float32) if kernel == "biased_attention" else None
        return (q, k, v, *shared, WINDOW if kernel == "local_attention" else -1, bias)

    banded = kernel == "disentangled_attention"
    tiles = attention_tiles(dtype, width, queries, keys, banded)
    op = kernel if banded else "attention"
    return Case(kernel, dtype, (width, queries, keys), ATTENTIONS[kernel], *both(op), given, tiles)


def attention_tiles(dtype: torch.dtype, width: int, queries: int, keys: int, banded: bool) -> tuple[Launch, ...]:
    largest = 128 * 128 if width <= 64 else 128 * 64
    most = 96  # scores and sums of a thread
    if banded:  # bands take as much again
        largest, most = largest // 2, 64
    if dtype == torch.float32:  # and single multiplications more; of large tiles they compile for minutes
        largest, most = 64 * 32, 32
    sides = (16, 32, 64, 128)
    rows, columns = ([side for side in sides if side <= max(16, size)] for size in (queries, keys))
    least = min(largest, rows[-1] * columns[-1]) // 4
    return tuple(
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for m, n in itertools.product(rows, columns)
        if least <= m * n <= largest
        for warps in warps_of(m * (n + width), 12, most)
        for stages in ((1,) if n >= keys else (2, 3))
    )


def band_case(dtype: torch.dtype, width: int, scale: Scale) -> Case:
    """The distances of sequences of 128 tokens."""
    (width,) = scale.cut(width)
    slots = min(255, scale.vocabulary)

    def given(device: torch.device) -> tuple[Any, ...]:
        heads = scale.width // width
        rows, table = (torch.randn(n, heads, width, dtype=dtype, device=device) for n in (scale.tokens, 512))
        return rows, table, torch.arange(slots, dtype=torch.int32, device=device)

    sides = (16, 32, 64) if dtype == torch.float32 else (32, 64, 128)
    tiles = tuple(
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 1}
        for m, n in itertools.product(sides, repeat=2)
        for warps in warps_of(m * n, 8, 32 if dtype == torch.float32 else 64)
    )
    return Case("band", dtype, (width,), disentangled_attention.usual_band_launch, band, plain_band, given, tiles)


def band(rows: Tensor, table: Tensor, table_rows: Tensor) -> Tensor:
    """Without the room at the ends of its rows."""
    return disentangled_attention.band(rows, table, table_rows, 1.0)[..., : len(table_rows)]


def plain_band(rows: Tensor, table: Tensor, table_rows: Tensor) -> Tensor:
    return torch.einsum("thd,phd->htp", rows, table[table_rows]) * attention.LOG2_E


# ---- the vocabulary


def vocab_case(kernel: str, dtype: torch.dtype, width: int, scale: Scale) -> Case:
    """``vocab_logprob`` of a target a row, the best 5, or an eighth of the rows whole."""
    (width,) = scale.cut(width)

    def given(device: torch.device) -> tuple[Any, ...]:
        rows = scale.scored // (1 if kernel in ("vocab_logprob", "vocab_topk") else 8) + 1
        hidden = torch.randn(rows, width, dtype=dtype, device=device)
        words = torch.randn(scale.vocabulary, width, dtype=dtype, device=device) / width**0.5
        if kernel == "vocab_logprob":
            targets = torch.randint(scale.vocabulary, (rows,), device=device)
            return hidden, words, None, targets, torch.arange(rows, device=device)
        return (hidden, words, None, 5) if kernel == "vocab_topk" else (hidden, words, None)

    if kernel == "log_softmax":  # the rows' other half, always float32
        blocks = tuple(
            {"BLOCK": block, "num_warps": warps}
            for block in (2048, 4096, 8192, 16384)
            for warps in warps_of(block, 8, 32)
        )
        rule = vocab_rows.usual_softmax_launch
        return Case(kernel, torch.float32, (scale.vocabulary,), rule, *both("vocab_rows"), given, blocks)
    narrow = dtype != torch.float32
    tiles = tuple(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n in (((64, 128), (128, 128), (64, 256)) if narrow else ((32, 64), (64, 64), (64, 32)))
        for k in ((64, 128) if narrow else (16, 32))
        for warps in (warps_of(m * n, 32, 64) if narrow else warps_of(m * n, 8, 16))
        for stages in ((3, 4) if k == 64 else (2, 3))
    )
    return Case(kernel, dtype, (width,), vocab_tiles.usual_launch, *both(kernel), given, tiles)


# ---- what reads and writes rows


def rows_case(kernel: str, dtype: torch.dtype, width: int, scale: Scale) -> Case:
    """``add_layer_norm`` (``pre_norm`` shares its launch) or ``masked_embedding``."""
    (width,) = scale.cut(width)

    def given(device: torch.device) -> tuple[Any, ...]:
        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        if kernel == "add_layer_norm":
            x, vector = numbers(scale.tokens, width), numbers(width)
            return x, numbers(scale.tokens, width), vector, numbers(width), numbers(width), 1e-7
        ids = torch.randint(scale.vocabulary, (scale.tokens,), device=device)
        masked = torch.arange(0, scale.tokens, 64, device=device)
        tables = (numbers(scale.vocabulary, width), ids % 64, numbers(64, width), None, numbers(2, width))
        return (ids, masked, 3, *tables, numbers(width), numbers(width), 1e-7)

    warps = tuple({"num_warps": warps} for warps in warps_of(triton.next_power_of_2(width), 2, 32))
    return Case(kernel, dtype, (width,), row_norm.usual_row_launch, *both(kernel), given, warps)


def linear_case(dtype: torch.dtype, width: int, scale: Scale) -> Case:
    """GELU of ``[T, width]``, behind a product of 16 columns, so that the product is a small part of it."""
    (width,) = scale.cut(width)

    def given(device: torch.device) -> tuple[Any, ...]:
        shapes = ((scale.tokens, 16), (width, 16), (width,))
        return (*(torch.randn(shape, dtype=dtype, device=device) for shape in shapes), "gelu")

    blocks = tuple(
        {"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048, 4096) for warps in warps_of(block, 4, 32)
    )
    return Case("linear", dtype, (width,), linear.usual_launch, *both("linear"), given, blocks)


def rotary_case(dtype: torch.dtype, width: int, scale: Scale) -> Case:
    (width,) = scale.cut(width)
    heads = scale.width // width

    def given(device: torch.device) -> tuple[Any, ...]:
        angles = torch.randn(512, width // 2, device=device)
        x = torch.randn(scale.tokens, heads, width, dtype=dtype, device=device)
        return x, angles.cos(), angles.sin(), torch.arange(scale.tokens, device=device) % 512

    blocks = tuple(
        {"BLOCK_H": block, "num_warps": warps}
        for block in (1, 2, 4, 8, 16)
        if block <= triton.next_power_of_2(heads)
        for warps in warps_of(block * triton.next_power_of_2(width), 2, 16)
    )
    return Case("rotary", dtype, (heads, width), rotary.usual_launch, *both("rotary"), given, blocks)


# ---- all of it, in order


def cases(dtype: torch.dtype, scale: Scale = FULL) -> Iterator[Case]:
    """What is expected to bring most to base models comes first, then larger and rarer sizes; each case once."""
    seen: set[tuple[str, str]] = set()
    for case in _cases(dtype, scale):
        if (case.kernel, case.name) not in seen:
            seen.add((case.kernel, case.name))
            yield case


def _cases(dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
    def attends(kernel: str, width: int, *lengths: int, queries: int | None = None) -> Iterator[Case]:
        for length in lengths:
            yield attention_case(kernel, dtype, width, queries or length, length, scale)

    yield from attends("disentangled_attention", 64, 64, 128)
    yield band_case(dtype, 64, scale)
    yield from attends("disentangled_attention", 64, 32, 512)
    yield vocab_case("vocab_logprob", dtype, 768, scale)
    yield from attends("attention", 64, 64, 128, 512, 32)
    yield linear_case(dtype, 3072, scale)
    yield rows_case("add_layer_norm", dtype, 768, scale)
    yield vocab_case("vocab_topk", dtype, 768, scale)
    yield from attends("local_attention", 64, 512, 128)
    yield from attends("biased_attention", 64, 64, 128, 512)
    yield from attends("disentangled_attention", 64, 64, 128, 512, queries=1)
    yield from attends("attention", 64, 64, 128, 512, queries=1)
    yield rotary_case(dtype, 64, scale)
    yield vocab_case("vocab_rows", dtype, 768, scale)
    yield vocab_case("log_softmax", dtype, 768, scale)
    yield rows_case("masked_embedding", dtype, 768, scale)
    # Larger models; lengths that are rarer.
    yield vocab_case("vocab_logprob", dtype, 1536, scale)
    yield linear_case(dtype, 4096, scale)
    yield linear_case(dtype, 6144, scale)
    yield rows_case("add_layer_norm", dtype, 1536, scale)
    yield from attends("disentangled_attention", 64, 256, 16, 2048)
    yield from attends("attention", 64, 256, 16, 2048)
    yield from attends("biased_attention", 64, 64, 128, 512, queries=1)
    yield from attends("local_attention", 64, 2048)
    yield vocab_case("vocab_topk", dtype, 1536, scale)
    yield band_case(dtype, 128, scale)
    yield from attends("disentangled_attention", 128, 64, 128, 512)
    yield from attends("attention", 128, 64, 128, 512)
    yield vocab_case("vocab_logprob", dtype, 256, scale)
