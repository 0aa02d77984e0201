"""Measures how each Triton kernel is best launched on this GPU and writes kernels/configs/<device>.json.

    python benchmarks/tune.py --budget 600
    python benchmarks/tune.py --kernels vocab --dtypes bfloat16

A case is a dtype and a kernel's sizes; those of base models in bfloat16 come first, and none is begun after the budget
is spent. Every candidate is first compared with plain torch; one that disagrees, does not compile or does not fit is
left out, and said so. (One that spills registers is slow, and loses.) The rest are timed in turns by replaying a CUDA
graph, medians are compared, and a candidate must beat the kernel's own rule by :data:`WORTH` to be written. The file is
replaced whole after each case, so an interrupt loses only the case it falls into.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mlmfast.kernels import attention, disentangled_attention, launches, vocab_tiles
from mlmfast.kernels.launches import Launch
from mlmfast.kernels.vocab_logprob import vocab_logprob
from mlmfast.reference.attention import attention as plain_attention
from mlmfast.reference.disentangled_attention import disentangled_attention as plain_disentangled
from mlmfast.reference.vocab_logprob import vocab_logprob as plain_logprob

# How many times as fast as the rule a candidate must be: less is noise.
WORTH = 1.03
ROUNDS = 15
# Calls in a graph: a launch is then a small part of what is timed.
CALLS = 10
TOKENS = 16384
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Something to tune: a kernel's case, the op, plain torch's, what both are given, and what may be tried."""

    kernel: str
    name: str
    usual: Launch
    op: Callable[..., Any]
    plain: Callable[..., Any]
    given: tuple[Any, ...]
    candidates: list[Launch]

    def call(self) -> Tensor:
        return first(self.op(*self.given))


def first(found: Any) -> Tensor:
    """A tensor, or the first of several."""
    return found[0] if isinstance(found, tuple) else found


def attention_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for width, length in itertools.product((64, 128), (64, 128, 32, 512, 16, 256, 2048)):
        heads = 768 // width
        rows = [torch.randn(TOKENS, heads, width, device=device, dtype=dtype) for _ in range(3)]
        bounds = torch.arange(0, TOKENS + 1, length, dtype=torch.int32, device=device)
        shared = (bounds, bounds, length, length, None, width**-0.5)
        tables = [torch.randn(512, heads, width, device=device, dtype=dtype) for _ in range(2)]
        buckets = torch.arange(-512, 513, device=device).clamp(-256, 255).add(256).int()
        banded = (*rows, *tables, buckets, *shared)
        name = launches.case(dtype, width, length, length)
        # float32 tiles are small: theirs are single multiplications, of which large tiles compile for minutes.
        largest = 64 * 32 if dtype == torch.float32 else 128 * 128 if width == 64 else 128 * 64
        tiles = [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            for m, n in itertools.product((16, 32, 64, 128), repeat=2)
            for warps, stages in itertools.product((4, 8), (1, 2))
            if max(m, n) <= max(16, length) and largest // 8 <= m * n <= largest
        ]
        usual = attention.usual_launch(dtype, width, length, length)
        yield Case("attention", name, usual, attention.attention, plain_attention, (*rows, *shared), tiles)
        usual = attention.usual_banded_launch(dtype, width, length, length)
        op = disentangled_attention.disentangled_attention
        yield Case("disentangled_attention", name, usual, op, plain_disentangled, banded, tiles)


def band_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for width in (64, 128):
        rows = torch.randn(TOKENS, 12, width, device=device, dtype=dtype)
        table = torch.randn(512, 12, width, device=device, dtype=dtype)
        reached = torch.arange(255, dtype=torch.int32, device=device)
        tiles = [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 1}
            for m, n, warps in itertools.product((32, 64, 128), (32, 64, 128), (4, 8))
        ]
        usual = disentangled_attention.usual_band_launch(dtype, width)
        yield Case("band", launches.case(dtype, width), usual, band, plain_band, (rows, table, reached), tiles)


def band(rows: Tensor, table: Tensor, table_rows: Tensor) -> Tensor:
    """Without the room at the ends of its rows."""
    return disentangled_attention.band(rows, table, table_rows, 1.0)[..., : len(table_rows)]


def plain_band(rows: Tensor, table: Tensor, table_rows: Tensor) -> Tensor:
    return torch.einsum("thd,phd->htp", rows, table[table_rows]) * attention.LOG2_E


def vocab_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for width, tokens in ((768, 128100), (1536, 128100)):  # a case is of widths up to a power of 2
        hidden = torch.randn(1024, width, device=device, dtype=dtype)
        words = torch.randn(tokens, width, device=device, dtype=dtype) / width**0.5
        targets = torch.randint(tokens, (1024,), device=device)
        given = (hidden, words, None, targets, torch.arange(1024, device=device))
        narrow = dtype != torch.float32
        tiles = [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
            for m, n in (((64, 128), (128, 128), (64, 256), (128, 256)) if narrow else ((32, 64), (64, 64)))
            for k in ((32, 64) if narrow else (16, 32))
            for warps, stages in itertools.product((4, 8), (2, 3, 4))
        ]
        power = triton.next_power_of_2(width)
        usual = vocab_tiles.usual_launch(dtype, power)
        yield Case("vocab", launches.case(dtype, power), usual, vocab_logprob, plain_logprob, given, tiles)


KERNELS: dict[str, Callable[[torch.dtype, torch.device], Iterator[Case]]] = {
    "attention": attention_cases,
    "band": band_cases,
    "vocab": vocab_cases,
}


def tuned(case: Case, device: torch.device) -> tuple[Launch | None, float]:
    """The launch that a case is fastest with, None for the kernel's own rule, and how many times as fast it is."""
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.given)
    right, plain = first(case.plain(*wide)), first(case.plain(*case.given))
    allowed = 2 * distance(plain, right) + (1e-6 if "float32" in case.name else 1e-3)  # as the op tests have it
    if not (error := distance(case.call(), right)) <= allowed:
        raise SystemExit(
            f"{case.kernel} {case.name}: the rule's own launch is off by {error:.3g}, allowed {allowed:.3g}"
        )
    tries = [tiles for tiles in case.candidates if works(case, tiles, device, right, allowed)]
    sides = [case.usual, *tries]
    runs = []
    for tiles in sides:
        with launches.trying(case.kernel, device, case.name, tiles):
            runs.append(repeated(case.call))
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for run, own in zip(runs, times):
            own.append(milliseconds(run))
    medians = [statistics.median(own) for own in times]
    best = min(range(len(sides)), key=medians.__getitem__)
    gain = medians[0] / medians[best]
    return (sides[best], gain) if gain >= WORTH else (None, 1.0)


def distance(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).abs().max())


def works(case: Case, tiles: Launch, device: torch.device, right: Tensor, allowed: float) -> bool:
    """Whether a candidate compiles, fits and is right."""
    try:
        with launches.trying(case.kernel, device, case.name, tiles):
            error = distance(case.call(), right)
    except Exception as problem:  # too large, or Triton's compiler gives up: the others are still to be tried
        print(f"  {tiles}: {type(problem).__name__}, left out", flush=True)
        return False
    if not error <= allowed:  # also NaN
        print(f"  {tiles} is off by {error:.3g}, allowed {allowed:.3g}: left out", flush=True)
        return False
    return True


def repeated(call: Callable[[], Any]) -> Callable[[], Any]:
    """Some calls in one launch, as they are launched now."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def milliseconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def write(path: Path, found: dict[str, dict[str, Launch]]) -> None:
    """Replaces the file whole."""
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(draft, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="vocab,attention,band", help="commas between")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="commas between")
    parser.add_argument("--budget", type=float, default=1200, help="seconds after which no case is begun")
    parser.add_argument("--folder", type=Path, default=launches.FOLDER, help="where the file goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU to measure on")
    device = torch.device("cuda")
    path = arguments.folder / f"{launches.device_name(device)}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    torch.manual_seed(0)
    end = time.monotonic() + arguments.budget
    for dtype, kernel in itertools.product(arguments.dtypes.split(","), arguments.kernels.split(",")):
        for case in KERNELS[kernel](DTYPES[dtype], device):
            if time.monotonic() > end:
                print(f"{case.kernel} {case.name}: not begun, the budget is spent", flush=True)
                continue
            tiles, gain = tuned(case, device)
            print(f"{case.kernel} {case.name}: {tiles or case.usual}, {gain:.2f} times the rule's speed", flush=True)
            known = found.setdefault(case.kernel, {})
            known.pop(case.name, None)
            if tiles is not None:
                known[case.name] = tiles
            write(path, found)


if __name__ == "__main__":
    main()
