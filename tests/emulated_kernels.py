"""CUDA kernels compiled for the host, for ctypes, and the bound on their error."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]


def compiled(name: str, folder: Path, fault: tuple[str, str, str] | None = None) -> ctypes.CDLL:
    """``tests/emulated/<name>.cpp`` as a library in ``folder``.

    Args:
        fault: a file of ``csrc/cuda``, what stands there once, and what is to stand there instead.
    """
    compiler = next(filter(None, map(shutil.which, [*os.environ.get("CXX", "").split()[:1], "g++", "c++"])), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = ROOT
    if fault is not None:
        root = folder
        for copied in ("csrc/cuda", "tests/emulated"):
            shutil.copytree(ROOT / copied, root / copied)
        file, right, wrong = fault
        source = root / "csrc/cuda" / file
        text = source.read_text(encoding="utf-8")
        assert text.count(right) == 1, f"{file} has {text.count(right)} times {right!r}"
        source.write_text(text.replace(right, wrong), encoding="utf-8")
    library = folder / f"{name}.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    command = [compiler, *flags, str(root / f"tests/emulated/{name}.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def widened(arguments: Any) -> Any:
    """The same arguments, the float ones in float64."""
    if isinstance(arguments, Tensor):
        return arguments.double() if arguments.is_floating_point() else arguments
    if isinstance(arguments, dict):
        return {name: widened(value) for name, value in arguments.items()}
    return [widened(value) for value in arguments] if isinstance(arguments, (list, tuple)) else arguments


def assert_near(found: Tensor, right: Tensor, own: Tensor) -> None:
    """Within twice the error of plain torch in the dtype, plus 1e-3, of plain torch in float64."""
    assert found.shape == right.shape
    assert bool(torch.isfinite(found).all()), "NaN, infinite, or never written"
    error, allowed = (found.double() - right).abs().max(), 2 * (own.double() - right).abs().max() + 1e-3
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"
