"""How kernels are launched: measured configurations by device name, else each kernel's own rule.

``configs/<device>.json`` holds ``{kernel: {case: {"BLOCK_M": ..., "num_warps": ..., "num_stages": ...}}}``, written by
``benchmarks/tune.py`` on that device. A case is a dtype and the kernel's sizes, each rounded up to a power of 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import triton

Launch = dict[str, int]

# Triton 3.10 will no longer fuse a product and a sum into one rounding unless it is told to.
COMPILED = {"enable_fp_fusion": True}

FOLDER = Path(__file__).with_name("configs")


def launch(kernel: str, device: torch.device, usual: Callable[..., Launch], dtype: torch.dtype, *sizes: int) -> Launch:
    """The configuration of a launch.

    Args:
        kernel: as the configurations name it.
        device: where it will run.
        usual: the kernel's rule, of the dtype and the rounded sizes, for what nobody has measured.
        dtype, sizes: the case.
    """
    return _launch(kernel, device_name(device), usual, dtype, *map(triton.next_power_of_2, sizes)) | COMPILED


@cache
def _launch(kernel: str, device: str, usual: Callable[..., Launch], dtype: torch.dtype, *sizes: int) -> Launch:
    return measured(device).get(kernel, {}).get(case(dtype, *sizes)) or usual(dtype, *sizes)


def case(dtype: torch.dtype, *sizes: int) -> str:
    """A case's name, ``"bfloat16 64 128"``."""
    return " ".join([str(dtype).removeprefix("torch."), *map(str, sizes)])


@cache
def device_name(device: torch.device) -> str:
    """A device's name as its file has it, ``"nvidia-h200"``; ``"cpu"`` for the interpreter."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")


@cache
def measured(device: str) -> dict[str, dict[str, Launch]]:
    """What was measured on a device, nothing if that is nothing."""
    path = FOLDER / f"{device}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextmanager
def trying(kernel: str, device: torch.device, name: str, tiles: Launch) -> Iterator[None]:
    """Within the block a kernel's case is launched like this, whatever was measured."""
    known = measured(device_name(device)).setdefault(kernel, {})
    before = known.get(name)
    known[name] = tiles
    _launch.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del known[name]
        else:
            known[name] = before
        _launch.cache_clear()
