"""The ops one by one: checked against float64 first, then timed, beside the device's own copy and matrix rates.

All ops stand in one table, ``op_table.py``, in place of a file each: they differ in what they are given and in what
work that is, and in nothing else. ``benchmarks/gpu.py`` runs it; a new op is a function that makes its cases. What a
backend does not take, for its dtype or its shape, is skipped with the reason.

A call is timed on inputs that the caches do not hold: there are as many sets of them as fill the GPU's second-level
cache three times, taken in turn. On a GPU one CUDA graph holds a call a set, so that launches cost next to nothing;
what cannot be captured (the reference's attention asks the device for lengths) is timed by events around the same
calls.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from op_table import Draw, OpCase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlmfast import backends
from mlmfast.bench.timing import device_seconds, summary, synchronize
from mlmfast.ops.vocab_logprob import vocab_logprob

# A backend's error against float64: this many times that of plain torch in the dtype, and beyond it so much.
FACTOR = 2.0
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# Seconds that the repeats of a round take together, about.
ROUND_SECONDS = 0.03
# Times that the second-level cache is filled before inputs come round again, and the most sets that this may take: 180
# MB of a decoding step's smallest weights.
CACHE_TIMES, MOST_SETS = 3, 160


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


def outputs(case: OpCase, arguments: tuple[Any, ...], backend: str) -> list[Tensor]:
    """What a call gives by a backend, tensors without numbers left out."""
    return _tensors(_op(case, arguments, backend))


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
    if case.op == "vocab_topk":  # a token may be chosen before another if both their errors together make it the better
        allowed[1] = 2 * allowed[0]
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


class Called(TorchDispatchMode):
    """Notes the namespaces of the ops that are called in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def untaken(case: OpCase, arguments: tuple[Any, ...], backend: str) -> str | None:
    """Why a backend does not compute a case itself, by its dtype or its shape; None if it does.

    A backend with ``LIMITS`` hands what is beyond them to the next one, which is measured by its own name. That it kept
    a call is seen by an op of its compiled extension.
    """
    like = next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    (known,) = (one for one in backends.BACKENDS if one.name == backend)
    if refusal := known.refusal(case.op, like.device.type, like.dtype):
        return refusal
    if (limits := backends.limits(case.op, backend)) is None:
        return None
    with backends.forced(backend), Called() as called:
        backends.implementation(case.op, like)(*arguments)
    return None if f"mlmfast_{backend}" in called.namespaces else f"{backend} takes {limits}"


def checked(
    case: OpCase, dtype: torch.dtype, device: str, backend: str, arguments: tuple[Any, ...] | None = None
) -> dict[str, Any]:
    """A row that says whether a backend is right in a case, on these arguments or on ones drawn for it; or why the case
    is ``skipped``: the backend does not take it."""
    row: dict[str, Any] = {"op": case.op, "case": case.name, "dtype": backends.dtype_name(dtype), "backend": backend}
    try:
        with torch.inference_mode():
            given = arguments or case.make(Draw(dtype, device, seed=0))
            if reason := untaken(case, given, backend):
                return row | {"skipped": reason}
            verdict = judged(case, given, backend)
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
    """A row a backend: checked, then timed in turns. One that errs, fails or does not take the case has the reason, and
    no speed."""
    with torch.inference_mode():
        sets = input_sets(case, dtype, device)
        rows = [checked(case, dtype, device, backend, sets[0]) for backend in sides]
        runs: dict[int, tuple[Callable[[], object], int]] = {}
        for place, row in enumerate(rows):
            if "skipped" in row or not row["agrees"]:
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
