"""The cases of ``mlmfast bench pll`` under pytest-benchmark, from the same code.

    pytest benchmarks/bench_pll.py --benchmark-only             # DeBERTa-v3-base's and RoBERTa-base's shapes: minutes
    pytest benchmarks/bench_pll.py --benchmark-only -k toy      # the machinery in seconds

Both sides of a case form a group. A case whose sides disagree fails before anything is timed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from mlmfast.bench.pll import Bench

COPIES = 64
CASES = [
    (shape, length)
    for shape, lengths in {
        "deberta-v3-base": (24, 64, 128),
        "roberta-base": (24, 64, 128),
        "toy-deberta": (24, 64),
        "toy-roberta": (24, 64),
    }.items()
    for length in lengths
]


@lru_cache(maxsize=1)  # cases come shape by shape; two base models need not be held at once
def model(shape: str) -> Bench:
    return Bench(shape)


@lru_cache(maxsize=1)
def agreeing(shape: str, length: int) -> tuple[Bench, Any]:
    """A model and texts on which both sides have been seen to agree, and are warm."""
    bench = model(shape)
    texts = bench.texts(length, COPIES)
    verdict = bench.agreement(texts)
    assert verdict.holds, f"the two sides disagree, so no speed is measured: {verdict}"
    return bench, texts


@pytest.mark.parametrize("side", ["mlmfast", "hf"])
@pytest.mark.parametrize(("shape", "length"), CASES, ids=lambda value: str(value))
def test_pll(benchmark: Any, shape: str, length: int, side: str) -> None:
    bench, texts = agreeing(shape, length)
    benchmark.group = f"{shape}, {COPIES} copies of {length} tokens"
    benchmark.extra_info.update(copies=COPIES, dtype=bench.dtype, useful_flops=bench.flops(texts))
    benchmark.pedantic(bench.ours if side == "mlmfast" else bench.theirs, args=(texts,), rounds=7)
