"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

import mlmfast


def describe(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, commit, threads, the load at the start, and the time (UTC); a GPU where that is measured."""
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mlmfast": mlmfast.__version__,
        "commit": commit(),
    }
    return found if torch.device(device).type == "cpu" else found | {"device": accelerator(device)}


def accelerator(device: str) -> dict[str, Any]:
    """A CUDA GPU and what drives it; versions that are not to be had are None."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def device_name(device: str) -> str:
    """What computes, as it calls itself: the GPU or the processor."""
    return cpu_name() if torch.device(device).type == "cpu" else str(torch.cuda.get_device_name(device))


def slug(name: str) -> str:
    """A device's name as its results have it: ``"NVIDIA H200"`` is ``"h200"``, ``"AMD EPYC"`` ``"amd_epyc"``."""
    return re.sub(r"\W+", "_", name.lower().removeprefix("nvidia ")).strip("_")


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source that runs, ``-dirty`` after it where files differ; None outside a checkout."""
    folder = Path(mlmfast.__file__).parent
    try:
        # An installed package may lie inside somebody else's repository: it must be a file of this one.
        git = ["git", "-C", str(folder)]
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sources() -> str:
    """A fingerprint of the source that runs, in 12 digits: tells versions apart where no commit is known, or all that
    differs is not committed."""
    found = hashlib.sha256()
    for package in ("mlmfast", "mlmfast.kernels"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".py", ".json", ".so", ".pyd"):
                    found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:12]
