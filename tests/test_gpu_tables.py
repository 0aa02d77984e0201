"""The tables of ``make gpu-bench``: losses are bold, and what has no speed says why."""

from __future__ import annotations

from typing import Any

from benchmark_scripts import script

tables = script("gpu_tables")
HEADER: dict[str, Any] = {"cpu": "C", "instructions": "I", "threads": 2, "python": "3", "torch": "2"}
HEADER |= {"transformers": "5", "mlmfast": "0", "commit": "abc", "time": "noon", "load": 0}
HEADER |= {"peers": {"flashdeberta": "0.0.8"}}
HEADER |= {"settings": {"new_tokens": 8}, "copy_bandwidth": 4e12, "matrix_rates": {"bfloat16": 7e14}}
HEADER |= {"absent": {"disentangled-flash": "pip install disentangled_flash"}}


def ranked(**other: Any) -> dict[str, Any]:
    row = {"shape": "s", "dtype": "bfloat16", "case": "q", "copies": 72, "peer": "hf", "peer_dtype": "bfloat16"}
    row |= {"seconds": 0.06, "peer_seconds": 0.03, "ratio": 0.5, "peak_share": 0.1, "max_abs_diff": 1e-3}
    row |= {f"{name}_quartiles": (row[name], row[name]) for name in ("seconds", "peer_seconds", "ratio")}
    return row | {"details": {"asked": 6, "pairs": 5, "unique_copies": 48}} | other


def generated(side: str, ratio: float | None, window_ratio: float | None) -> dict[str, Any]:
    row = {"shape": "s", "dtype": "bfloat16", "prompt": 9, "new_tokens": 8, "side": side, "steps": 4, "ratio": ratio}
    row |= {"seconds_token": 0.002, "seconds_token_quartiles": (0.001, 0.003), "tokens_second": 500.0}
    row |= {"window_ratio": window_ratio, "same_tokens": 1.0, "max_abs_diff": None}
    return row | {"peak_share": None, "bandwidth_share": None, "details": {"pairs": 5}}


def tabulated(**lists: Any) -> str:
    empty: dict[str, Any] = {name: [] for name in script("gpu_run").LISTS}
    return "\n".join(tables.tabulate(empty | {"header": HEADER} | lists))


def test_ranking() -> None:
    wrong = {"asked": 6, "pairs": 5, "unique_copies": 48, "side": "mlmfast", "error": 0.3, "bound": 0.1}
    table = tabulated(ranking=[ranked(), ranked(ratio=None, details=wrong)])
    assert "| q | 12, 8 | 10 ms (10-10) | 10.0% | hf | 5 ms (5-5) | **0.5x (0.5-0.5)** | 1.0e-03 |" in table
    assert "| hf | disagrees (mlmfast, error 0.3, bound 0.1) |  | 1.0e-03 |" in table
    assert "commit abc; against flashdeberta 0.0.8" in table
    assert "disentangled-flash is not installed there" in table


def test_generation() -> None:
    rows = [generated("exact", None, 2.0), generated("window", 0.5, None), generated("gpt2", 0.7, 1.4)]
    rows.append(generated("hf-loop", 0.5, 0.4) | {"seconds_token": None, "details": {"error": 0.3, "bound": 0.1}})
    table = tabulated(generation=rows)
    assert "| exact | 2 ms (1-3) | 500 |  | 2x | 100% |" in table
    assert "| 0.5x |  | 100% |" in table  # our own, and no loss
    assert "| **0.7x** | 1.4x | 100% |  | 4 steps, evenly spread |" in table
    assert "| hf-loop | disagrees (error 0.3, bound 0.1) |  |  |  |" in table


def test_what_was_skipped_or_failed() -> None:
    skipped = [{"op": "linear", "dtype": "bfloat16", "case": str(i), "skipped": "cuda takes few"} for i in (1, 2)]
    ops = [{"op": "linear", "dtype": "bfloat16", "case": "c", "backend": "triton", "failure": "no"}]
    failed = [{"step": "a step", "reason": "no room"}]
    table = tabulated(ops=ops, skipped=skipped, failed=failed, not_run=["another"])
    assert "linear in bfloat16 not measured so: cuda takes few (2 cases)." in table
    assert "| linear | bfloat16 | c | triton | failed: no |" in table
    assert "- a step: no room" in table and "- another" in table
    assert "### Generation" not in table
