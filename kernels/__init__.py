"""Triton kernels, one file an op, imported as ``mlmfast.kernels``.

Everything is packed rows; sums are in float32, and float32 products are IEEE, never TF32. With ``TRITON_INTERPRET=1``
in the environment when they are imported, the kernels run in Triton's interpreter, on the CPU, for tests.
"""

from __future__ import annotations

from mlmfast import machine

# Tensor cores for bfloat16, which the kernels' products are written for, begin with this one.
LEAST_CAPABILITY = (8, 0)


def missing(op: str, device: str) -> str | None:
    """Why this backend cannot serve an op on a device here; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not importable ({error}): pip install triton"
    interpreted = triton.knobs.runtime.interpret
    if device == "cpu":
        needed = "triton's kernels run on a CPU only with TRITON_INTERPRET=1 in the environment, which is for tests"
        return None if interpreted else needed
    if interpreted:
        return "TRITON_INTERPRET=1 is in the environment: triton's kernels are interpreted, on a CPU"
    unfit = machine.gpu_problem(LEAST_CAPABILITY)
    return None if unfit is None else f"triton's kernels {unfit}"
