"""What is installed, what the machine has, and which backend serves which op here and why."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlmfast import __version__, backends, cpu, cuda, machine
from mlmfast.architectures import FAMILIES
from mlmfast.cpu import products
from mlmfast.generic import generic_types

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKAGES = ("torch", "transformers", "tokenizers", "triton", "numpy", "pyarrow")


def examine() -> dict[str, Any]:
    """The findings, ready for JSON.

    Returns:
        ``versions``: package -> version, None if it is not installed. ``machine``: processor, cores, threads,
        instructions, memory_bytes. ``gpus``: name, memory_bytes, capability of each, the one that decides first.
        ``backends``: device -> dtype -> a list of op, backend, reason, limits (what the backend takes itself, None for
        everything). ``cpu``: the cpu backend's ``instructions`` (None without the compiled extension), what is
        ``missing`` and what it costs (None if nothing is), and ``products``: for each dtype, with an activation and
        without, which kind was chosen by measuring, its reason and both rates in GFLOP/s. ``cuda``: the ``version`` of
        the cuda backend's extension (None where it does not serve), what is ``missing`` and the remedy. ``families``:
        model types that mlmfast's kernels compute. ``generic``: those of this transformers that load too, but run in
        transformers' own code.
    """
    gpus = machine.gpus()
    without_cuda = cuda.missing("", "cuda")
    return {
        "versions": {"mlmfast": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": _usable_cores(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": _memory_bytes(),
        },
        "gpus": [asdict(gpu) | {"capability": ".".join(map(str, gpu.capability))} for gpu in gpus],
        "backends": {
            device: {backends.dtype_name(dtype): _services(device, dtype) for dtype in DTYPES}
            for device in (["cpu", "cuda"] if gpus else ["cpu"])
        },
        "cpu": {
            "instructions": cpu.instructions(),
            "missing": cpu.extension_missing(),
            "products": [_products(dtype, fused) for dtype in products.PACKED_DTYPES for fused in (False, True)],
        },
        "cuda": {"version": None if without_cuda else cuda.VERSION, "missing": without_cuda},
        "families": sorted(FAMILIES),
        "generic": generic_types(),
    }


def show(findings: dict[str, Any]) -> None:
    """Prints the findings for a reader."""
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, found in findings["versions"].items():
        facts.add_row(name, found or "not installed")
    machine = findings["machine"]
    facts.add_row("system", Text(machine["system"]))
    facts.add_row("processor", Text(f"{machine['processor']} ({machine['instructions']})"))
    facts.add_row("cores", f"{machine['cores']}, torch uses {machine['threads']} threads")
    facts.add_row("memory", _gib(machine["memory_bytes"]))
    for gpu in findings["gpus"]:
        facts.add_row("GPU", Text(f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, capability {gpu['capability']}"))
    if not findings["gpus"]:
        facts.add_row("GPU", "none that torch can use")
    extension = findings["cpu"]
    facts.add_row("cpu extension", Text(extension["missing"] or f"runs its {extension['instructions']} path"))
    for kind in extension["products"]:
        rates = f" ({kind['plain_gflops']:.0f} GFLOP/s plain, {kind['packed_gflops']:.0f} packed)"
        facts.add_row(
            f"{kind['dtype']} products" + (" + GELU" if kind["activation"] else ""),
            Text(kind["reason"] + (rates if kind["packed_gflops"] else "")),
        )
    extension = findings["cuda"]
    facts.add_row("cuda extension", Text(extension["missing"] or f"version {extension['version']}"))
    facts.add_row("families", ", ".join(findings["families"]))
    told = "in transformers' own code, without mlmfast's kernels, where a probe at load allows it"
    facts.add_row("generic", f"{told}: {', '.join(findings['generic'])}")
    console.print(facts)
    said = {findings[name]["missing"]: f"see {name} extension" for name in ("cpu", "cuda") if findings[name]["missing"]}
    for device, served in findings["backends"].items():
        for names, services in _alike(served):
            _show_services(console, f"{names} on {device}", services, said)


def _alike(served: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Dtypes served by the same backends for the same reasons, under one name: ``"bfloat16 and float16"``."""
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    for dtype, services in served.items():
        for i, (names, others) in enumerate(groups):
            if others == services:
                groups[i] = (f"{names} and {dtype}", others)
                break
        else:
            groups.append((dtype, services))
    return groups


def _show_services(console: Console, title: str, services: list[dict[str, Any]], said: dict[str, str]) -> None:
    """A table with a row an op; one line where the same is true of all. ``said``: what stands above -> where."""
    if all(service | {"op": ""} == services[0] | {"op": ""} for service in services):
        console.print(Text(f"\n{title}: {services[0]['backend']} serves every op ({services[0]['reason']})"))
        return
    table = Table("op", "backend", "why", title=f"\n{title}", title_justify="left")
    above = ""
    for service in services:
        reason = ": ".join(filter(None, [service["reason"], service["limits"]]))
        for sentence, place in said.items():
            reason = reason.replace(sentence, place)
        repeated = reason == above and len(reason) > 80
        table.add_row(service["op"], service["backend"], Text("as above" if repeated else reason))
        above = reason
    console.print(table)


def _services(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    return [
        asdict(service) | {"limits": backends.limits(service.op, service.backend)}
        for service in backends.report(device, dtype)
    ]


def _products(dtype: torch.dtype, fused: bool) -> dict[str, Any]:
    """How the cpu backend computes one kind of products, and the rates that decided it."""
    chosen = products.choice(dtype, fused)
    return {
        "dtype": backends.dtype_name(dtype),
        "activation": fused,
        "packed": math.isfinite(chosen.least),
        "reason": chosen.reason,
        "plain_gflops": chosen.plain_gflops,
        "packed_gflops": chosen.packed_gflops,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's own name, where the system tells."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores that this process may run on: a container or taskset may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
