"""The machinery of ``make gpu-bench``: its budget, what it keeps, and what it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import script, strict

from mlmfast.errors import RequestError

gpu_run = script("gpu_run")
HEADER: dict[str, Any] = {"time": "1", "load": 0.1, "copy_bandwidth": 5.0, "commit": "a", "settings": {"budget": 1}}


def result_of(folder: Path) -> Any:
    return gpu_run.Result(folder / "gpu.json", HEADER)


def opened(result: Any, more: dict[str, Any] | None = None, **how: bool) -> Any:
    return gpu_run.Result.opened(result.path, HEADER | (more or {}), **how)


def test_the_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: clock[0])
    ran: list[str] = []

    def step(name: str, guess: float, takes: float) -> Any:
        def run() -> dict[str, list[Any]]:
            ran.append(name)
            clock[0] += takes
            if name == "fails":
                raise torch.OutOfMemoryError("no room")
            return {"checks": [{"agrees": True}]}

        return gpu_run.Step(name, guess, run)

    result = result_of(tmp_path)
    todo = [step("first", 5, 9), step("fails", 5, 1), step("too long", 11, 1), step("fits", 9, 9), step("late", 5, 1)]
    gpu_run.carry_out(iter(todo), result, budget=20)
    assert ran == ["first", "fails", "fits"]
    left = strict(result.path)
    assert left["not_run"] == ["too long", "late"]
    assert left["failed"] == [{"step": "fails", "reason": "OutOfMemoryError: no room"}]
    assert not result.agrees


def test_results_hold_no_nan(tmp_path: Path) -> None:
    result = result_of(tmp_path)
    result.add({"checks": [{"agrees": False, "error": float("nan"), "more": (1.5, float("inf"))}]})
    assert strict(result.path)["checks"] == [{"agrees": False, "error": None, "more": [1.5, None]}]
    assert not result.agrees


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    ran: list[str] = []

    def step(name: str) -> Any:
        def work() -> dict[str, list[Any]]:
            ran.append(name)
            if name == "fails":
                raise ValueError("no")
            return {"checks": [{"agrees": True, "step": name}]}

        return gpu_run.Step(name, 1, work)

    todo = [step(name) for name in ("one", "fails", "two", "three")]
    result = opened(result_of(tmp_path))
    assert not result.path.exists()
    gpu_run.carry_out(iter(todo[:2]), result, budget=9)
    result = opened(result, {"time": "2", "copy_bandwidth": 4.0, "settings": {"budget": 7}})
    gpu_run.carry_out(iter(todo[:3]), result, budget=9)
    gpu_run.carry_out(iter(todo), opened(result, {"time": "3", "copy_bandwidth": 6.0}), budget=0)
    left = strict(result.path)
    assert ran == ["one", "fails", "two"]
    assert (left["done"], left["not_run"]) == (["one", "two"], ["three"])
    assert [check["step"] for check in left["checks"]] == ["one", "two"]
    assert [later["time"] for later in left["header"]["continued"]] == ["2", "3"]
    assert (left["header"]["time"], left["header"]["copy_bandwidth"]) == ("1", 6.0)
    gpu_run.carry_out(iter(todo), opened(result, retry=True), budget=9)
    assert ran == ["one", "fails", "two", "fails", "three"]
    gpu_run.carry_out(iter(todo[:1]), opened(result, anew=True), budget=9)
    assert strict(result.path)["done"] == ["one"]


def test_the_next_machine_of_a_kind_goes_on(tmp_path: Path) -> None:
    """With another processor, a little more memory, a commit of what was measured so far; the sources are the same."""
    result = result_of(tmp_path)
    result.header = HEADER | {"device": {"name": "x", "memory_bytes": 5}}
    result.add({"checks": [{"agrees": True}]})
    found = opened(result, {"commit": "b", "cpu": "other", "device": {"name": "x", "memory_bytes": 7}})
    assert len(found.lists["checks"]) == 1
    assert (found.header["commit"], found.header["continued"]) == (
        "a",
        [{"time": "1", "load": 0.1, "commit": "b", "cpu": "other"}],
    )


@pytest.mark.parametrize(
    "other", [{"sources": "b"}, {"settings": {"budget": 1, "rounds": 7}}, {"device": {"name": "x"}}]
)
def test_what_was_measured_otherwise_is_not_continued(tmp_path: Path, other: dict[str, Any]) -> None:
    result = result_of(tmp_path)
    result.add({"checks": [{"agrees": True}]})
    before = result.path.read_text()
    with pytest.raises(RequestError, match="--name NAME writes another file, --anew replaces this one"):
        opened(result, other)
    assert result.path.read_text() == before
    assert opened(result, other, anew=True).lists["checks"] == []


def test_a_step_that_ends_the_process_is_not_tried_again(tmp_path: Path) -> None:
    result = result_of(tmp_path)

    def dies() -> dict[str, list[Any]]:
        raise SystemExit

    todo = [gpu_run.Step("dies", 1, dies), gpu_run.Step("next", 1, lambda: {"checks": [{"agrees": True}]})]
    with pytest.raises(SystemExit):
        gpu_run.carry_out(iter(todo), result, budget=9)
    assert strict(result.path)["running"] == "dies"
    gpu_run.carry_out(iter(todo), opened(result), budget=9)
    left = strict(result.path)
    assert left["failed"] == [{"step": "dies", "reason": "the process ended in this step"}]
    assert (left["done"], left["running"]) == (["next"], None)


def test_a_lost_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, list[Any]]:
        raise RuntimeError("an illegal memory access was encountered")

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    result = result_of(tmp_path)
    todo = [gpu_run.Step(name, 1, fails) for name in ("first", "second")]
    gpu_run.carry_out(iter(todo), result, budget=9)
    assert [failed["step"] for failed in result.lists["failed"]] == ["first"]
    assert strict(result.path)["not_run"] == ["second"]
    wrong = {"agrees": False, "op": "o", "dtype": "d", "case": "c"}
    row = gpu_run.Step("a row of it fails", 1, lambda: {"checks": [wrong]})
    gpu_run.carry_out(iter([row, *todo]), opened(result), budget=9)
    assert strict(result.path)["not_run"] == ["second"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    again = opened(result)
    gpu_run.carry_out(iter(todo), again, budget=9)
    assert [failed["step"] for failed in again.lists["failed"]] == ["first", "second"]


def test_rankings_and_generations_count(tmp_path: Path) -> None:
    for name in ("ranking", "generation"):
        for agrees in (True, False):
            result = result_of(tmp_path)
            result.add({name: [{"details": {"agrees": agrees}}]})
            assert result.agrees == agrees
