"""``add_layer_norm`` in Triton: a program a row, which is read and written once; ``pre_norm`` shares the kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.row_norm import layer_norm, row_launch
from mlmfast.kernels.rows import on_device_of, row_stride, whole


@triton.jit
def add_layer_norm_kernel(
    x,  # [T, d]
    residual,  # [T, d] or None
    bias,  # [d] or None
    norm_weight,  # [d]
    norm_bias,  # [d] or None
    out,  # [T, d]
    total,  # [T, d] for the sum before its norm, or None
    x_stride,
    residual_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(x + t * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        row += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        row += tl.load(residual + t * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + t * width + columns, row.to(total.dtype.element_ty), mask=inside)
    row = layer_norm(row, columns, width, norm_weight, norm_bias, eps)
    tl.store(out + t * width + columns, row.to(out.dtype.element_ty), mask=inside)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> Tensor:
    return norm_rows(x, residual, bias, norm_weight, norm_bias, eps)


def norm_rows(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    total: Tensor | None = None,
) -> Tensor:
    """``LayerNorm(x + bias + residual)``; writes the sum too, into a contiguous ``[T, d]`` where one is given."""
    x, residual, bias = whole(x), whole(residual), whole(bias)
    norm_weight, norm_bias = whole(norm_weight), whole(norm_bias)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    strides = (x.stride(0), row_stride(residual))
    tiles = row_launch("add_layer_norm", x.device, x.dtype, width)
    with on_device_of(x):
        add_layer_norm_kernel[(rows,)](
            x, residual, bias, norm_weight, norm_bias, out, total, *strides, width, eps, **tiles
        )
    return out
