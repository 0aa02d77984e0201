"""The one matrix product of the kernels: tiles multiplied, sums in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, sums):
    """``sums + a @ b`` for tiles ``a [M, K]``, ``b [K, N]`` and float32 ``sums [M, N]``; float32 is IEEE, not TF32."""
    return tl.dot(a, b, sums, input_precision="ieee")
