"""The cuda backend: the compiled extension ``mlmfast._cuda``, for what Triton cannot do well.

It registers its functions under ``torch.ops.mlmfast_cuda``. It may be absent (an install without nvcc) or fail to load
(beside a torch without CUDA); neither is an error, since Triton serves the same ops: :func:`missing` says so to
:mod:`mlmfast.backends`, and through it to the user.
"""

from __future__ import annotations

from mlmfast import machine

# The csrc/cuda/library.cpp that this Python goes with.
VERSION = 3

REMEDY = (
    "to build it, install the CUDA toolkit (nvcc) and a C++17 compiler, then "
    "`MLMFAST_BUILD_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps mlmfast`, "
    "or in a checkout `MLMFAST_BUILD_CUDA=1 pip install -e .`"
)


# The oldest GPU that setup.py compiles for when nothing else is asked of it.
LEAST_CAPABILITY = (8, 0)


def missing(op: str, device: str) -> str | None:
    """Why this backend cannot serve an op here, and the remedy where there is one; None if it can."""
    unfit = machine.gpu_problem(LEAST_CAPABILITY)
    if unfit is not None:  # and no build of the extension would change that
        return f"cuda's kernels {unfit}"
    # Not before there is a GPU: beside a torch without CUDA it cannot load.
    problem = machine.extension_problem("mlmfast._cuda", VERSION)
    return None if problem is None else f"cuda's compiled extension {problem}; {REMEDY}"
