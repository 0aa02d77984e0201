"""Launches by rule or as measured, and ``make gpu-tune`` without a GPU, a rehearsal of every case included."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")
from mlmfast import kernels
from mlmfast.kernels import launches
from mlmfast.kernels.launches import Launch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU kernels are compiled")


@pytest.fixture
def tune() -> Iterator[ModuleType]:
    """``benchmarks/tune.py``, imported as it is when it runs: beside the files that it imports."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("tune")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of measured configurations."""
    monkeypatch.setattr(launches, "FOLDER", tmp_path)
    for cached in (launches.measured, launches._launch):
        cached.cache_clear()
    yield tmp_path
    for cached in (launches.measured, launches._launch):
        cached.cache_clear()


SLOW, FAST, WRONG, BROKEN = ({"BLOCK_M": m, "num_warps": 4} for m in (16, 32, 64, 128))


def rule(dtype: torch.dtype, *sizes: int) -> Launch:
    return SLOW


def chosen(size: int) -> int:
    return launches.launch("band", CPU, rule, torch.float32, size)["BLOCK_M"]


def planted(tune: ModuleType, size: int = 64, wrong: int = 64) -> Any:
    """A case whose launches with ``BLOCK_M`` of ``wrong`` are wrong, and of 128 fail."""

    def op(ones: Tensor) -> Tensor:
        if chosen(size) == 128:
            raise RuntimeError("out of resources")
        return ones * (2 if chosen(size) == wrong else 1)

    return tune.Case(
        "band", torch.float32, (size,), rule, op, torch.clone, lambda _: (torch.ones(3),), (FAST, WRONG, BROKEN, SLOW)
    )


def clock(seconds: dict[int, float], size: int = 64) -> Callable[[Sequence[Callable[[], Any]]], Callable[[int], float]]:
    """A timer that reads off how a call is launched."""

    def timer(calls: Sequence[Callable[[], Any]]) -> Callable[[int], float]:
        def milliseconds(side: int) -> float:
            found = []
            launch = launches.launch
            launches.launch = lambda *a: found.append(launch(*a)["BLOCK_M"]) or launch(*a)  # type: ignore[func-returns-value]
            try:
                calls[side]()
            finally:
                launches.launch = launch
            return seconds[found[-1]]

        return milliseconds

    return timer


# ---- launches


def by_size(dtype: torch.dtype, *sizes: int) -> Launch:
    return {"BLOCK_M": sizes[0], "num_warps": 4}


def test_what_was_measured_on_a_device_goes_before_the_rule(configs: Path) -> None:
    (configs / "cpu.json").write_text(json.dumps({"band": {"float32 64": {"BLOCK_M": 128, "num_warps": 8}}}))
    found = launches.launch("band", CPU, by_size, torch.float32, 33)
    assert (found["BLOCK_M"], found["num_warps"]) == (128, 8)  # 33 is a case of 64
    assert launches.launch("band", CPU, by_size, torch.float32, 65)["BLOCK_M"] == 128  # by the rule: 65 is one of 128
    assert launches.launch("band", CPU, by_size, torch.float32, 65)["num_warps"] == 4
    assert launches.launch("band", CPU, by_size, torch.bfloat16, 33)["BLOCK_M"] == 64
    assert launches.launch("vocab", CPU, by_size, torch.float32, 33)["BLOCK_M"] == 64


def test_a_trial_ends_with_its_block(configs: Path) -> None:
    case = launches.case(torch.float32, 32)
    for _ in range(2):
        with launches.trying("band", CPU, case, {"BLOCK_M": 7, "num_warps": 1}):
            assert launches.launch("band", CPU, by_size, torch.float32, 32)["BLOCK_M"] == 7
        assert launches.launch("band", CPU, by_size, torch.float32, 32)["BLOCK_M"] == 32


# ---- what is chosen


def test_the_fastest_that_is_right_is_kept(tune: ModuleType, configs: Path) -> None:
    result = tune.tuned(planted(tune), CPU, clock({16: 3.0, 32: 2.0}))
    assert (result.best, result.gain, result.rule, result.tried) == (FAST, 1.5, 3.0, [(FAST, 2.0)])
    assert [tiles for tiles, _ in result.left_out] == [WRONG, BROKEN]
    assert "off by 1" in result.left_out[0][1] and "out of resources" in result.left_out[1][1]


def test_a_gain_within_noise_leaves_the_rule(tune: ModuleType, configs: Path) -> None:
    result = tune.tuned(planted(tune), CPU, clock({16: 3.0, 32: 2.99}))
    assert (result.best, result.gain) == (None, 1.0)


def test_what_cannot_win_is_not_run(tune: ModuleType, configs: Path) -> None:
    result = tune.tuned(planted(tune), CPU, clock({16: 3.0}), ["512 bytes of stack", "slow", "slow", None])
    assert not result.tried
    assert result.left_out[0] == (FAST, "512 bytes of stack")


def test_the_hopeless_are_not_timed_to_the_end(tune: ModuleType) -> None:
    asked = [0, 0, 0]

    def milliseconds(side: int) -> float:
        asked[side] += 1
        return (2.0, 1.0, 1.1)[side]

    assert tune.in_turns(3, milliseconds, 10) == [2.0, 1.0, 1.1]
    assert asked == [10, 10, 10]  # the rule itself is always timed: gains are relative to it
    asked[:] = [0, 0, 0]
    tune.in_turns(3, lambda side: milliseconds((1, 0, 2)[side]), 10)
    assert asked == [tune.SIFTED, 10, 10]


# ---- what is kept


def record(tune: ModuleType, folder: Path) -> Any:
    return tune.Record(folder / "configs" / "cpu.json", folder / "results" / "cpu" / "tuning.json")


@pytest.fixture
def quick(tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "host_timer", clock({16: 3.0, 32: 2.0}))


@pytest.mark.usefixtures("quick")
def test_what_was_measured_is_not_measured_again(tune: ModuleType, configs: Path, monkeypatch: Any) -> None:
    case = planted(tune)
    kept = record(tune, configs)
    assert not kept.has(case)
    assert tune.tune([case], kept, CPU, None, time.monotonic() + 60) == 0
    assert json.loads(kept.configs.read_text()) == {"band": {"float32 64": FAST}}
    found = json.loads(kept.measured.read_text())["band"]["float32 64"]
    assert (found["gain"], found["usual"], found["versions"]["triton"]) == (1.5, SLOW, tune.triton.__version__)
    assert record(tune, configs).has(case)
    monkeypatch.setattr(tune, "text_of_kernels", lambda: "another")
    assert not record(tune, configs).has(case)
    monkeypatch.undo()
    monkeypatch.setattr(tune.triton, "__version__", "3.6.9")
    assert not record(tune, configs).has(case)


@pytest.mark.usefixtures("quick")
def test_a_rule_that_wins_again_ends_its_configuration(
    tune: ModuleType, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = record(tune, configs)
    tune.tune([planted(tune)], kept, CPU, None, time.monotonic() + 60)
    monkeypatch.setattr(tune, "host_timer", clock({16: 1.0, 32: 2.0}))
    tune.tune([planted(tune)], kept, CPU, None, time.monotonic() + 60)
    assert json.loads(kept.configs.read_text()) == {}


@pytest.mark.usefixtures("quick")
def test_an_interrupt_loses_only_the_case_it_falls_into(
    tune: ModuleType, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [planted(tune, size) for size in (64, 128, 256)]
    kept = record(tune, configs)
    tuned = tune.tuned

    def interrupted(case: Any, *rest: Any) -> Any:
        if case.sizes == (128,):
            raise KeyboardInterrupt
        return tuned(case, *rest)

    monkeypatch.setattr(tune, "tuned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(cases, kept, CPU, None, time.monotonic() + 60)
    assert [record(tune, configs).has(case) for case in cases] == [True, False, False]
    assert [path.name for path in kept.configs.parent.iterdir()] == ["cpu.json"]


@pytest.mark.usefixtures("quick")
def test_a_rule_that_is_wrong_ends_its_case_alone(tune: ModuleType, configs: Path, capsys: Any) -> None:
    cases = [planted(tune, 64, wrong=16), planted(tune, 128)]
    kept = record(tune, configs)
    assert tune.tune(cases, kept, CPU, None, time.monotonic() + 60) == 1
    assert [kept.has(case) for case in cases] == [False, True]
    assert "band float32 64: the rule's own launch: off by 1" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_no_case_is_begun_after_the_budget(tune: ModuleType, configs: Path, capsys: Any) -> None:
    assert tune.tune([planted(tune)], record(tune, configs), CPU, None, time.monotonic() - 1) == 0
    assert "not begun: 1 of 1 cases" in capsys.readouterr().out


# ---- the cases


def rules() -> set[Callable[..., Launch]]:
    """Every rule in the kernels' modules."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        names = vars(importlib.import_module(f"mlmfast.kernels.{module.name}"))
        found |= {value for name, value in names.items() if name.startswith("usual_") and name.endswith("launch")}
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_rule_is_tuned(tune: ModuleType, dtype: torch.dtype) -> None:
    cases = list(tune.tune_cases.cases(dtype))
    assert {case.rule for case in cases} == rules()
    names = [(case.kernel, case.name) for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert case.candidates, case.name
        assert {tiles.keys() for tiles in case.candidates if tiles.keys() != case.usual.keys()} == set()


def test_shipped_configurations_are_known_kernels(tune: ModuleType) -> None:
    usual = {case.kernel: case.usual for case in tune.tune_cases.cases(torch.bfloat16)}
    for path in launches.FOLDER.glob("*.json"):
        for kernel, cases in json.loads(path.read_text()).items():
            assert all(tiles.keys() == usual[kernel].keys() for tiles in cases.values())


@interpreted
def test_a_rehearsal_of_everything(
    tune: ModuleType, configs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of case runs and agrees with plain torch, and a second run has nothing to do."""
    folders = ["--configs", str(configs / "c"), "--results", str(configs / "r")]
    monkeypatch.setattr(sys, "argv", ["tune.py", "--toy", *folders])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 0, capsys.readouterr().err
    found = json.loads((configs / "r" / "cpu" / "tuning.json").read_text())
    assert found.keys() == {case.kernel for case in tune.tune_cases.cases(torch.float32)}
    results = [result for cases in found.values() for result in cases.values()]
    assert not [result["left_out"] for result in results if result["left_out"]]
    assert sum(len(result["tried"]) for result in results) > 20
    with pytest.raises(SystemExit):
        tune.main()
    assert "0 cases to tune" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tune.py", "--toy", "--again", "--kernels", "band", "--budget", "0", *folders])
    with pytest.raises(SystemExit):
        tune.main()
    assert "not begun: 1 of 1 cases" in capsys.readouterr().out


@interpreted
def test_wrong_requests_are_refused(tune: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, culprit in (
        ([], "--toy"),
        (["--toy", "--kernels", "vocab"], "vocab is not among"),
        (["--toy", "--dtypes", "int8"], "int8 is not among"),
    ):
        monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            tune.request()
        assert ended.value.code == 2
        assert culprit in capsys.readouterr().err


# ---- compiled side by side


def compiled(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(ROOT / "benchmarks" / "from_checkout.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_workers_say_what_cannot_win(tmp_path: Path) -> None:
    """A tile that spills and one that does not fit are named, those that may win are not, and all are in the cache."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import json, os, time, torch, tune_cases
from dataclasses import replace
from tune_compile import Compiler
case = tune_cases.attention_case("disentangled_attention", torch.bfloat16, 64, 512, 512, tune_cases.FULL)
tiles = [(64, 64, 8, 2), (128, 128, 4, 2), (64, 64, 8, 24), (60, 64, 8, 1)]
names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
case = replace(case, candidates=tuple(dict(zip(names, each)) for each in tiles))
with Compiler([case], 2) as compiler:
    compiler.ask([case], 90)
    found = compiler.faults(case, time.monotonic() + 300)
    compiler.ask([case], 90)
    found += compiler.faults(case, time.monotonic() - 1)
print(json.dumps(found))
""")
    process = compiled(tmp_path / "cache", str(script))
    assert process.returncode == 0, process.stderr
    wins, spills, large, odd, *late = json.loads(process.stdout)
    assert wins is None
    assert "bytes of stack" in spills
    assert "bytes of shared memory where" in large
    assert odd is not None and odd.startswith("CompilationError"), odd
    assert late == ["not compiled in time"] * 4
    assert len(list((tmp_path / "cache").rglob("attention_kernel.cubin"))) == 3
