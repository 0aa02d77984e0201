"""What the kernels for few rows ask of their tensors."""

from __future__ import annotations

from torch import Tensor

# csrc/cuda/skinny_product.h's rows of x; beyond, a product's weights are no longer all that it costs.
FEW_ROWS = 32
# csrc/cuda/add_layer_norm_kernel.h: a row stays in shared memory.
WIDEST = 8192
# csrc/cuda/tensors.h: 32 bits count from a row to another.
FARTHEST = 1 << 25


def alike(first: Tensor, *others: Tensor | None) -> bool:
    """Whether all that are given have the first's dtype, and neighbours in their last dimension."""
    return first.stride(-1) == 1 and all(x is None or (x.dtype == first.dtype and x.stride(-1) == 1) for x in others)


def on_pieces(x: Tensor) -> bool:
    """Whether every row of 16-bit ``x [T, n]`` is whole pieces of 16 bytes on 16-byte bounds."""
    whole = x.shape[1] > 0 and x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return whole and x.stride(0) <= FARTHEST
