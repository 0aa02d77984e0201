"""What the ops are measured on: a pass's many rows, and the few rows of a decoding step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from mlmfast.bench.work import attention_dots


@dataclass(frozen=True)
class Sizes:
    """What the ops are given: ``rows`` packed rows of a model's shape; ``few`` rows each of a decoding step."""

    width: int = 768
    heads: int = 12
    wide: int = 3072
    vocabulary: int = 128100
    span: int = 512
    buckets: int = 256
    rows: int = 65536
    top_k: int = 8
    few: tuple[int, ...] = (1, 12, 32)


TOY = Sizes(width=32, heads=4, wide=64, vocabulary=300, span=64, buckets=16, rows=192, top_k=3, few=(1, 5))


@dataclass(frozen=True)
class OpCase:
    """An op and a shape.

    Attributes:
        op: its name in :mod:`mlmfast.ops`.
        name: of the shape.
        make: arguments of a call, from a function that draws normal numbers of a shape.
        flops: operations of its products, 2 a multiply-add; 0 where there are none.
        read: bytes that a call has to read, of its arguments; None for all of them.
    """

    op: str
    name: str
    make: Callable[[Draw], tuple[Any, ...]]
    flops: int
    read: Callable[[tuple[Any, ...]], int] | None = None


class Draw:
    """Draws inputs on a device in a dtype; the same for the same seed."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self._generator, device=self.device) * std).to(self.dtype)

    def below(self, most: int, count: int) -> Tensor:
        return torch.randint(most, (count,), generator=self._generator, device=self.device)

    def bounds(self, copies: int, length: int) -> Tensor:
        return torch.arange(0, (copies + 1) * length, length, device=self.device, dtype=torch.int32)


def cases(sizes: Sizes, lengths: Sequence[int]) -> Iterator[OpCase]:
    """The shapes that every op has in a pass, those that it spends most on first."""
    for length in lengths:
        yield _attention(sizes, length, "disentangled")
    yield from _linears(sizes, sizes.rows)
    for length in lengths:
        yield _vocabulary(sizes, max(1, sizes.rows // length))
    for length in lengths:
        yield _attention(sizes, length)
        yield _attention(sizes, length, "distance bias")
    yield _norm(sizes, "add_layer_norm", sizes.rows)
    yield _norm(sizes, "pre_norm", sizes.rows)
    yield _masked_embedding(sizes, sizes.rows)
    yield _rotary(sizes)
    for length in lengths:
        yield _vocabulary(sizes, max(1, sizes.rows // length), sizes.top_k)


def few_rows(sizes: Sizes) -> Iterator[OpCase]:
    """The shapes of a decoding step: ``few`` rows that ask a sequence of ``span`` keys, and the best tokens of each."""
    for rows in sizes.few:
        yield from _linears(sizes, rows)
        yield _vocabulary(sizes, rows, sizes.top_k)
    for rows in sizes.few:
        yield _few_queries(sizes, rows, "disentangled_attention")
        yield _few_queries(sizes, rows, "attention")
        yield _norm(sizes, "add_layer_norm", rows)
        yield _norm(sizes, "pre_norm", rows)
        yield _masked_embedding(sizes, rows)


def _attention(sizes: Sizes, length: int, positions: Literal["disentangled", "distance bias"] | None = None) -> OpCase:
    disentangled = positions == "disentangled"
    copies, head = max(1, sizes.rows // length), sizes.width // sizes.heads
    buckets = _buckets(sizes)

    def make(draw: Draw) -> tuple[Any, ...]:
        q, k, v = (draw(copies * length, sizes.heads, head) for _ in range(3))
        cu_seqlens = draw.bounds(copies, length)
        shared = (cu_seqlens, cu_seqlens, length, length, None)
        if positions == "distance bias":
            bias = draw(sizes.heads, len(buckets)).float()
            return q, k, v, *shared, 1 / math.sqrt(head), -1, bias
        if not disentangled:
            return q, k, v, *shared, 1 / math.sqrt(head)
        pos_key, pos_query = (draw(2 * sizes.buckets, sizes.heads, head) for _ in range(2))
        return q, k, v, pos_key, pos_query, buckets.to(draw.device), *shared, 1 / math.sqrt(3 * head)

    dots = attention_dots(np.arange(length), length, buckets.numpy() if disentangled else None)
    op = "disentangled_attention" if disentangled else "attention"
    name = f"{copies} copies of {length}" + (f", {positions}" if positions == "distance bias" else "")
    return OpCase(op, name, make, 2 * sizes.width * dots * copies)


def _few_queries(sizes: Sizes, rows: int, op: str) -> OpCase:
    """The last ``rows`` places of a sequence of ``span`` keys."""
    keys, head, buckets = sizes.span, sizes.width // sizes.heads, _buckets(sizes)
    disentangled = op == "disentangled_attention"

    def make(draw: Draw) -> tuple[Any, ...]:
        q, k, v = (draw(count, sizes.heads, head) for count in (rows, keys, keys))
        places = torch.arange(keys - rows, keys, device=draw.device)
        shared = (draw.bounds(1, rows), draw.bounds(1, keys), rows, keys, places)
        if not disentangled:
            return q, k, v, *shared, 1 / math.sqrt(head)
        pos_key, pos_query = (draw(2 * sizes.buckets, sizes.heads, head) for _ in range(2))
        return q, k, v, pos_key, pos_query, buckets.to(draw.device), *shared, 1 / math.sqrt(3 * head)

    dots = attention_dots(np.arange(keys - rows, keys), keys, buckets.numpy() if disentangled else None)
    return OpCase(op, f"{rows} queries, {keys} keys", make, 2 * sizes.width * dots)


def _buckets(sizes: Sizes) -> Tensor:
    """Table row of each distance from ``-span`` to ``span``, int32."""
    places = torch.arange(-sizes.span, sizes.span + 1)
    rows = make_log_bucket_position(places, sizes.buckets, sizes.span).long() + sizes.buckets
    return rows.clamp(0, 2 * sizes.buckets - 1).int()


def _linears(sizes: Sizes, rows: int) -> Iterator[OpCase]:
    def make(draw: Draw, inner: int, outer: int, activation: str) -> tuple[Any, ...]:
        return draw(rows, inner), draw(outer, inner, std=inner**-0.5), draw(outer), activation

    for inner, outer, activation in (
        (sizes.width, sizes.wide, "gelu"),
        (sizes.wide, sizes.width, "none"),
        (sizes.width, sizes.width, "none"),
    ):
        name = f"{rows} rows {inner} to {outer}{', GELU' if activation == 'gelu' else ''}"
        arguments = partial(make, inner=inner, outer=outer, activation=activation)
        yield OpCase("linear", name, arguments, 2 * rows * inner * outer)


def _norm(sizes: Sizes, op: str, rows: int) -> OpCase:
    def make(draw: Draw) -> tuple[Any, ...]:
        x, residual = (draw(rows, sizes.width) for _ in range(2))
        return x, residual, *(draw(sizes.width) for _ in range(3)), 1e-7

    return OpCase(op, f"{rows} rows", make, 0)


def _masked_embedding(sizes: Sizes, rows: int) -> OpCase:
    def make(draw: Draw) -> tuple[Any, ...]:
        ids, masked = draw.below(sizes.vocabulary, rows), torch.arange(0, rows, 16, device=draw.device)
        words, norm = draw(sizes.vocabulary, sizes.width), [draw(sizes.width) for _ in range(2)]
        return ids, masked, 4, words, None, None, None, None, *norm, 1e-7

    def read(arguments: tuple[Any, ...]) -> int:  # a row of the table for each id, not the table
        ids, masked, _, words = arguments[:4]
        return int(ids.nbytes + masked.nbytes + len(ids) * words.shape[1] * words.element_size())

    return OpCase("masked_embedding", f"{rows} rows", make, 0, read)


def _rotary(sizes: Sizes) -> OpCase:
    head = sizes.width // sizes.heads

    def make(draw: Draw) -> tuple[Any, ...]:
        angles = torch.arange(sizes.span, device=draw.device)[:, None] * 0.01 ** torch.linspace(
            0, 1, head // 2, device=draw.device
        )
        places = draw.below(sizes.span, sizes.rows)
        return draw(sizes.rows, sizes.heads, head), angles.cos(), angles.sin(), places

    return OpCase("rotary", f"{sizes.rows} rows", make, 0)


def _vocabulary(sizes: Sizes, scored: int, top_k: int | None = None) -> OpCase:
    def make(draw: Draw) -> tuple[Any, ...]:
        hidden = draw(scored, sizes.width)
        head = hidden, draw(sizes.vocabulary, sizes.width, std=2 * sizes.width**-0.5), draw(sizes.vocabulary)
        rows = torch.arange(scored, device=draw.device)
        return (*head, top_k) if top_k else (*head, draw.below(sizes.vocabulary, scored), rows)

    name = f"{scored} rows" + (f", best {top_k}" if top_k else "")
    flops = 2 * scored * sizes.width * sizes.vocabulary
    return OpCase("vocab_topk" if top_k else "vocab_logprob", name, make, flops)
