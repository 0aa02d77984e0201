"""The ops one by one: checked against float64 first, then timed, beside the device's own copy and matrix rates.

All ops stand in one table, in place of a file each: they differ in what they are given and in what work that is, and in
nothing else. ``benchmarks/gpu.py`` runs it; a new op is a function that makes its cases.

A call is timed on inputs that the caches do not hold: there are as many sets of them as fill the GPU's second-level
cache three times, taken in turn. On a GPU one CUDA graph holds a call a set, so that launches cost next to nothing;
what cannot be captured (the reference's attention asks the device for lengths) is timed by events around the same
calls.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from mlmfast import backends
from mlmfast.bench.timing import device_seconds, summary, synchronize
from mlmfast.bench.work import attention_dots
from mlmfast.ops.vocab_logprob import vocab_logprob

# A backend's error against float64: this many times that of plain torch in the dtype, and beyond it so much.
FACTOR = 2.0
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
# Seconds that the repeats of a round take together, about.
ROUND_SECONDS = 0.03
# Times that the second-level cache is filled before inputs come round again, and the most sets that this may take.
CACHE_TIMES, MOST_SETS = 3, 16


@dataclass(frozen=True)
class Sizes:
    """What the ops are given: ``rows`` packed rows of a model's shape."""

    width: int = 768
    heads: int = 12
    wide: int = 3072
    vocabulary: int = 128100
    span: int = 512
    buckets: int = 256
    rows: int = 65536
    top_k: int = 8


TOY = Sizes(width=32, heads=4, wide=64, vocabulary=300, span=64, buckets=16, rows=192, top_k=3)


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
    """The shapes of every op, those that a pass spends most on first."""
    for length in lengths:
        yield _attention(sizes, length, "disentangled")
    yield from _linears(sizes)
    for length in lengths:
        yield _vocabulary(sizes, length)
    for length in lengths:
        yield _attention(sizes, length)
        yield _attention(sizes, length, "distance bias")
    yield _norm(sizes, "add_layer_norm")
    yield _norm(sizes, "pre_norm")
    yield _masked_embedding(sizes)
    yield _rotary(sizes)
    for length in lengths:
        yield _vocabulary(sizes, length, sizes.top_k)


def _attention(sizes: Sizes, length: int, positions: Literal["disentangled", "distance bias"] | None = None) -> OpCase:
    disentangled = positions == "disentangled"
    copies, head = max(1, sizes.rows // length), sizes.width // sizes.heads
    places = torch.arange(-sizes.span, sizes.span + 1)
    rows = make_log_bucket_position(places, sizes.buckets, sizes.span).long() + sizes.buckets
    buckets = rows.clamp(0, 2 * sizes.buckets - 1).int()

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


def _linears(sizes: Sizes) -> Iterator[OpCase]:
    def make(draw: Draw, inner: int, outer: int, activation: str) -> tuple[Any, ...]:
        return draw(sizes.rows, inner), draw(outer, inner, std=inner**-0.5), draw(outer), activation

    for inner, outer, activation in (
        (sizes.width, sizes.wide, "gelu"),
        (sizes.wide, sizes.width, "none"),
        (sizes.width, sizes.width, "none"),
    ):
        name = f"{sizes.rows} rows {inner} to {outer}{', GELU' if activation == 'gelu' else ''}"
        arguments = partial(make, inner=inner, outer=outer, activation=activation)
        yield OpCase("linear", name, arguments, 2 * sizes.rows * inner * outer)


def _norm(sizes: Sizes, op: str) -> OpCase:
    def make(draw: Draw) -> tuple[Any, ...]:
        x, residual = (draw(sizes.rows, sizes.width) for _ in range(2))
        return x, residual, *(draw(sizes.width) for _ in range(3)), 1e-7

    return OpCase(op, f"{sizes.rows} rows", make, 0)


def _masked_embedding(sizes: Sizes) -> OpCase:
    def make(draw: Draw) -> tuple[Any, ...]:
        ids, masked = draw.below(sizes.vocabulary, sizes.rows), torch.arange(0, sizes.rows, 16, device=draw.device)
        words, norm = draw(sizes.vocabulary, sizes.width), [draw(sizes.width) for _ in range(2)]
        return ids, masked, 4, words, None, None, None, None, *norm, 1e-7

    def read(arguments: tuple[Any, ...]) -> int:  # a row of the table for each id, not the table
        ids, masked, _, words = arguments[:4]
        return int(ids.nbytes + masked.nbytes + len(ids) * words.shape[1] * words.element_size())

    return OpCase("masked_embedding", f"{sizes.rows} rows", make, 0, read)


def _rotary(sizes: Sizes) -> OpCase:
    head = sizes.width // sizes.heads

    def make(draw: Draw) -> tuple[Any, ...]:
        angles = torch.arange(sizes.span, device=draw.device)[:, None] * 0.01 ** torch.linspace(
            0, 1, head // 2, device=draw.device
        )
        places = draw.below(sizes.span, sizes.rows)
        return draw(sizes.rows, sizes.heads, head), angles.cos(), angles.sin(), places

    return OpCase("rotary", f"{sizes.rows} rows", make, 0)


def _vocabulary(sizes: Sizes, length: int, top_k: int | None = None) -> OpCase:
    scored = max(1, sizes.rows // length)

    def make(draw: Draw) -> tuple[Any, ...]:
        hidden = draw(scored, sizes.width)
        head = hidden, draw(sizes.vocabulary, sizes.width, std=2 * sizes.width**-0.5), draw(sizes.vocabulary)
        rows = torch.arange(scored, device=draw.device)
        return (*head, top_k) if top_k else (*head, draw.below(sizes.vocabulary, scored), rows)

    name = f"{scored} rows" + (f", best {top_k}" if top_k else "")
    flops = 2 * scored * sizes.width * sizes.vocabulary
    return OpCase("vocab_topk" if top_k else "vocab_logprob", name, make, flops)


def bytes_moved(case: OpCase, arguments: tuple[Any, ...], found: Any) -> int:
    """The fewest bytes that a call moves: each input read once, each output written once."""
    inputs = {id(a): a.nbytes for a in arguments if isinstance(a, Tensor)}
    read = sum(inputs.values()) if case.read is None else case.read(arguments)
    return int(read + sum(t.nbytes for t in _tensors(found)))


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if t.numel()]


def _op(case: OpCase, arguments: tuple[Any, ...], backend: str) -> Any:
    with backends.forced(backend):
        return getattr(importlib.import_module(f"mlmfast.ops.{case.op}"), case.op)(*arguments)


@dataclass(frozen=True)
class Verdict:
    """A backend's largest error against float64, and what it may be."""

    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # False for NaN


def judged(case: OpCase, arguments: tuple[Any, ...], backend: str) -> Verdict:
    """Compares one call with the reference in float64, and its error with the reference's in the same dtype."""
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    truth = _values(case, wide, _op(case, wide, "reference"), wide)
    plain, found = (_values(case, arguments, _op(case, arguments, b), wide) for b in ("reference", backend))
    dtype = next(a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    worst = [[float((t - g.double()).abs().max()) for t, g in zip(truth, got)] for got in (plain, found)]
    allowed = [FACTOR * error + SLACK[dtype] for error in worst[0]]
    # The one nearest to failing; a NaN is the nearest of all.
    error, bound = max(zip(worst[1], allowed), key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])
    return Verdict(error, bound)


def _values(case: OpCase, arguments: tuple[Any, ...], found: Any, wide: tuple[Any, ...]) -> list[Tensor]:
    """What is compared. The k best: their log-probabilities, and what the truth says of the tokens found, which may be
    others than the truth's where two are nearly equal."""
    if case.op != "vocab_topk":
        return [t for t in _tensors(found) if t.is_floating_point()]
    logprobs, ids = found
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
    with backends.forced("reference"):
        theirs = vocab_logprob(*wide[:3], ids.flatten(), rows)[0]
    return [logprobs, theirs.view_as(logprobs)]


def input_sets(case: OpCase, dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """As many sets of arguments as keep the caches cold, each drawn anew."""
    first = case.make(Draw(dtype, device, seed=0))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if torch.device(device).type == "cuda" else 0
    held = sum(a.nbytes for a in first if isinstance(a, Tensor))
    count = min(MOST_SETS, max(2, math.ceil(CACHE_TIMES * cache / held)))
    return [first, *(case.make(Draw(dtype, device, seed)) for seed in range(1, count))]


def replayed(calls: Sequence[Callable[[], object]], device: str) -> tuple[Callable[[], object], str]:
    """All the calls as one, and how: a CUDA graph where they can be captured."""

    def every() -> None:
        for call in calls:
            call()

    every()  # compiles
    synchronize(device)
    if torch.device(device).type != "cuda":
        return every, "host clock"
    if waits(every):
        return every, "events"
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        every()  # libraries set themselves up for a stream
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    return graph.replay, "graph"


def waits(run: Callable[[], object]) -> bool:
    """Whether a run asks the device for something, so that it cannot be captured.

    It is tried out before capturing: a capture that fails leaves torch's random numbers of the device unusable.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def checked(
    case: OpCase, dtype: torch.dtype, device: str, backend: str, arguments: tuple[Any, ...] | None = None
) -> dict[str, Any]:
    """A row that says whether a backend is right in a case, on these arguments or on ones drawn for it."""
    row: dict[str, Any] = {"op": case.op, "case": case.name, "dtype": backends.dtype_name(dtype), "backend": backend}
    try:
        with torch.inference_mode():
            verdict = judged(case, arguments or case.make(Draw(dtype, device, seed=0)), backend)
    except Exception as error:  # whatever it is, the others are still to be checked
        return row | {"agrees": False, "failure": _reason(error)}
    return row | {"agrees": verdict.holds, "error": verdict.error, "bound": verdict.bound}


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def measure(
    case: OpCase,
    dtype: torch.dtype,
    device: str,
    sides: Sequence[str],
    *,
    matrix_rate: float,
    bandwidth: float,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """A row a backend: checked, then timed in turns. One that errs or fails has the reason, and no speed."""
    with torch.inference_mode():
        sets = input_sets(case, dtype, device)
        rows = [checked(case, dtype, device, backend, sets[0]) for backend in sides]
        runs: dict[int, tuple[Callable[[], object], int]] = {}
        for place, row in enumerate(rows):
            if not row["agrees"]:
                continue
            try:
                moved = bytes_moved(case, sets[0], _op(case, sets[0], row["backend"]))
                run, how = replayed([partial(_op, case, arguments, row["backend"]) for arguments in sets], device)
                once = device_seconds(run, device)
            except Exception as error:
                row |= {"agrees": False, "failure": _reason(error)}
                continue
            row |= {"flops": case.flops, "bytes": moved, "sets": len(sets), "timed_by": how}
            runs[place] = run, max(1, min(100, int(ROUND_SECONDS / max(once, 1e-9))))
        times: dict[int, list[float]] = {place: [] for place in runs}
        for r in range(rounds):
            for place in runs if r % 2 == 0 else reversed(runs):
                run, repeats = runs[place]
                times[place].append(device_seconds(run, device, repeats) / len(sets))
    for place, seconds in times.items():
        rows[place] |= speeds(summary(seconds), rows[place]["flops"], rows[place]["bytes"], matrix_rate, bandwidth)
    return rows


def speeds(times: dict[str, Any], flops: int, moved: int, matrix_rate: float, bandwidth: float) -> dict[str, Any]:
    """A row's rates, and what they are of the device's own."""
    median = times["median"]
    return {
        "seconds": median,
        "seconds_quartiles": (times["q1"], times["q3"]),
        "tflops": flops / median / 1e12,
        "of_matrix_rate": flops / median / matrix_rate,
        "tb_per_second": moved / median / 1e12,
        "of_copy_bandwidth": moved / median / bandwidth,
    }
