"""What is installed, what the machine has, and which backend serves which op here and why."""

from __future__ import annotations

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

from mlmfast import __version__, backends
from mlmfast.architectures import FAMILIES

PACKAGES = ("torch", "transformers", "tokenizers", "triton", "numpy", "pyarrow")


def examine() -> dict[str, Any]:
    """The findings, ready for JSON.

    Returns:
        ``versions``: package -> version, None if it is not installed. ``machine``: processor, cores, threads,
        instructions, memory_bytes. ``gpus``: name, memory_bytes, capability of each. ``backends``: device -> a list of
        op, backend, reason. ``families``: model types that load.
    """
    cuda = torch.cuda.is_available()
    return {
        "versions": {"mlmfast": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": _usable_cores(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": _memory_bytes(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "backends": {
            device: [asdict(service) for service in backends.report(device)]
            for device in (("cpu", "cuda") if cuda else ("cpu",))
        },
        "families": sorted(FAMILIES),
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
    facts.add_row("families", ", ".join(findings["families"]))
    console.print(facts)
    for device, services in findings["backends"].items():
        table = Table("op", "backend", "why", title=f"\non {device}", title_justify="left")
        for service in services:
            table.add_row(service["op"], service["backend"], Text(service["reason"]))
        console.print(table)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
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


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
