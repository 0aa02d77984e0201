"""``mlmfast doctor`` on machines with and without a GPU and its extension, told by a table instead of hardware."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mlmfast import backends, cpu, cuda, doctor, machine
from mlmfast.cpu import products
from mlmfast.machine import GPU

pytest.importorskip("triton", reason="what is asked here is which of the three backends on a GPU serves")
from mlmfast import kernels

H200 = GPU("NVIDIA H200", (9, 0), 141 * 2**30)
T4 = GPU("Tesla T4", (7, 5), 15 * 2**30)
MI300 = GPU("AMD Instinct MI300X", (9, 4), 192 * 2**30, "AMD")
OP = "disentangled_attention"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Makes a machine of GPUs and of what loading the CUDA extension comes to; returns doctor's findings there."""

    def examined(gpus: list[GPU], extension: int | str, torch_has_cuda: bool = True) -> dict[str, Any]:
        def load(name: str) -> int | str:
            assert name == "mlmfast._cuda"
            assert gpus, "beside a torch without CUDA it must not be tried"
            return extension

        monkeypatch.setattr(machine, "gpus", lambda: gpus)
        monkeypatch.setattr(machine, "extension", load)
        monkeypatch.setattr(machine, "torch_has_cuda", lambda: torch_has_cuda)
        backends.choose.cache_clear()
        return json.loads(json.dumps(doctor.examine()))

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield examined
    backends.choose.cache_clear()  # choices are made once a process


def shown(findings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a reader sees, its lines long enough not to break."""
    monkeypatch.setenv("COLUMNS", "2000")
    capsys.readouterr()
    doctor.show(findings)
    return capsys.readouterr().out


def table_of(text: str) -> list[str]:
    """The lines after the title of the GPU's narrow dtypes; a CPU without its extension has a table above."""
    return text.partition("\nbfloat16 and float16 on cuda")[2].splitlines()


def served(findings: dict[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
    """op -> who serves it on the GPU in a dtype."""
    services = findings["backends"]["cuda"][dtype]
    assert [service["op"] for service in services] == list(backends.OPS)
    return {service["op"]: service for service in services}


@pytest.mark.parametrize(
    ("torch_has_cuda", "why"), [(True, "torch finds none"), (False, "this torch is built without CUDA")]
)
def test_without_a_gpu(
    on: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    torch_has_cuda: bool,
    why: str,
) -> None:
    findings = on([], cuda.VERSION, torch_has_cuda)
    assert findings["gpus"] == [] and list(findings["backends"]) == ["cpu"]
    assert findings["cuda"] == {"version": None, "missing": f"cuda's kernels need a GPU, and {why}"}
    text = shown(findings, capsys, monkeypatch)
    assert "none that torch can use" in text and f"need a GPU, and {why}" in text
    assert "on cuda" not in text and "MLMFAST_BUILD_CUDA" not in text  # building it would change nothing
    for service in backends.report("cuda", torch.bfloat16):  # asked all the same, it answers
        assert service.backend == "reference" and f"triton's kernels need a GPU, and {why}" in service.reason


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        ("is not installed", "is not installed"),
        ("does not load (undefined symbol: moon)", "does not load (undefined symbol: moon)"),
        (cuda.VERSION + 1, f"is of version {cuda.VERSION + 1} where {cuda.VERSION} is needed"),
        (0, f"is of version 0 where {cuda.VERSION} is needed"),
    ],
)
def test_with_a_gpu_and_no_extension_that_serves(
    on: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extension: int | str,
    said: str,
) -> None:
    findings = on([H200], extension)
    missing = f"cuda's compiled extension {said}; {cuda.REMEDY}"
    assert findings["cuda"] == {"version": None, "missing": missing}
    for dtype in ("float32", "bfloat16", "float16"):
        assert {service["backend"] for service in served(findings, dtype).values()} == {"triton"}
    assert served(findings, "bfloat16")[OP]["reason"] == missing
    assert served(findings, "bfloat16")[OP]["limits"] is None
    assert served(findings, "float32")[OP]["reason"] == "cuda takes float16 and bfloat16, not float32"
    assert {service["backend"] for service in served(findings, "float64").values()} == {"reference"}
    text = shown(findings, capsys, monkeypatch)
    assert "NVIDIA H200, 141.0 GiB, capability 9.0" in text
    (row,) = (line for line in text.splitlines() if line.startswith("cuda extension"))
    assert missing in row
    (row,) = (line for line in table_of(text) if line.startswith(f"│ {OP} "))
    assert " triton " in row and "see cuda extension" in row
    assert text.count(cuda.REMEDY) == 1
    assert "float32 on cuda: triton serves every op (cuda takes float16 and bfloat16, not float32)" in text


def test_with_a_gpu_and_the_extension(
    on: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = on([H200, T4], cuda.VERSION)  # the first one decides
    assert findings["cuda"] == {"version": cuda.VERSION, "missing": None}
    assert [gpu["capability"] for gpu in findings["gpus"]] == ["9.0", "7.5"]
    text = shown(findings, capsys, monkeypatch)
    assert f"version {cuda.VERSION}" in next(line for line in text.splitlines() if line.startswith("cuda extension"))
    assert "MLMFAST_BUILD_CUDA" not in text
    assert "\nbfloat16 and float16 on cuda" in text
    found = served(findings, "bfloat16")
    assert found[OP]["backend"] == "cuda"
    above = None
    for op, service in found.items():
        (row,) = (line for line in table_of(text) if line.startswith(f"│ {op} "))
        if service["backend"] == "cuda":
            assert service["reason"] == "first choice on cuda"
            assert service["limits"] == backends.limits(op, "cuda") and "triton" in service["limits"]
            assert " cuda " in row and ("as above" if service["limits"] == above else service["limits"]) in row
        else:
            assert (service["backend"], service["limits"]) == ("triton", None)
            assert f"cuda has no {op} in this version" in row
        above = service["limits"]
    assert {service["backend"] for service in served(findings, "float32").values()} == {"triton"}


@pytest.mark.parametrize("extension", [cuda.VERSION, "is not installed"])
def test_a_gpu_that_the_extension_has_no_code_for(
    on: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, extension: int | str
) -> None:
    """Both backends say so for themselves; the remedy is not offered, since no build of the extension would help."""
    too_old = "need compute capability 8.0 or newer, and this GPU has 7.5"
    findings = on([T4, H200], extension)
    assert findings["cuda"] == {"version": None, "missing": f"cuda's kernels {too_old}"}
    service = served(findings, "bfloat16")[OP]
    assert service["backend"] == "reference"
    assert service["reason"] == f"cuda's kernels {too_old}; triton's kernels {too_old}"
    monkeypatch.setattr(kernels, "LEAST_CAPABILITY", (7, 5))  # where Triton takes it, Triton serves
    service = served(on([T4], extension), "bfloat16")[OP]
    assert (service["backend"], service["reason"]) == ("triton", f"cuda's kernels {too_old}")


def test_amd(on: Callable[..., dict[str, Any]]) -> None:
    findings = on([MI300], "is not installed")
    assert findings["cuda"]["missing"] == "cuda's kernels here were never run on AMD's GPUs"
    assert {service["backend"] for service in served(findings, "bfloat16").values()} == {"reference"}


def test_what_torch_says_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's own source; the rest of the package asks nothing else."""
    properties = [
        type("Properties", (), {"name": gpu.name, "major": gpu.capability[0], "minor": gpu.capability[1]})
        for gpu in (T4, H200)
    ]
    for found, gpu in zip(properties, (T4, H200)):
        found.total_memory = gpu.memory_bytes  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.version, "hip", None)
    assert machine.gpus() == [H200, T4]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert [gpu.maker for gpu in machine.gpus()] == ["AMD", "AMD"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpus() == []


def test_products(capsys: pytest.CaptureFixture[str]) -> None:
    findings = doctor.examine()
    assert findings["cpu"]["missing"] == cpu.extension_missing()
    assert {service["backend"] for service in findings["backends"]["cpu"]["float64"]} == {"reference"}
    assert "cpu" in {service["backend"] for service in findings["backends"]["cpu"]["float32"]}
    kinds = findings["cpu"]["products"]
    assert [(kind["dtype"], kind["activation"]) for kind in kinds] == [
        ("float32", False),
        ("float32", True),
        ("bfloat16", False),
        ("bfloat16", True),
    ]
    for kind in kinds:
        chosen = products.choice(getattr(torch, kind["dtype"]), kind["activation"])
        assert kind["reason"] == chosen.reason
        assert kind["packed"] == kind["reason"].startswith("packed")
    doctor.show(findings)
    assert "bfloat16 products + GELU" in capsys.readouterr().out
