"""The cuda backend: the compiled extension ``mlmfast._cuda``, for what Triton cannot do well.

It registers its functions under ``torch.ops.mlmfast_cuda``. It may be absent (an install without nvcc) or fail to load
(beside a torch without CUDA); neither is an error, since Triton serves the same ops: :func:`missing` says so to
:mod:`mlmfast.backends`, and through it to the user.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

# The csrc/cuda/library.cpp that this Python goes with.
VERSION = 2

REMEDY = (
    "to build it, install the CUDA toolkit (nvcc) and a C++17 compiler, then "
    "`MLMFAST_BUILD_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps mlmfast`, "
    "or in a checkout `MLMFAST_BUILD_CUDA=1 pip install -e .`"
)


def _load(name: str) -> str | None:
    """Imports the extension; what went wrong, or None."""
    if importlib.util.find_spec(name) is None:
        return "is not installed"
    if not torch.cuda.is_available():
        return "needs a GPU"
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # undefined symbols, another platform, a failed registration
        return f"does not load ({error})"
    found = torch.ops.mlmfast_cuda.version()
    return None if found == VERSION else f"is of version {found} where {VERSION} is needed"


_problem = _load("mlmfast._cuda")


def missing(op: str, device: str) -> str | None:
    """Why this backend cannot serve an op here and the remedy; None if it can."""
    return None if _problem is None else f"cuda's compiled extension {_problem}; {REMEDY}"
