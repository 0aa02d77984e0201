"""``rotary`` in Triton: a program a row turns all its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.launches import Launch, launch
from mlmfast.kernels.rows import on_device_of, whole


@triton.jit
def rotary_kernel(
    x,  # [T, H, D]
    cos,  # [P, half]
    sin,  # [P, half]
    position_ids,  # int64 [T]
    out,  # [T, H, D]
    x_row,
    x_head,
    table_row,  # strides, in numbers
    heads,
    width,  # D
    half,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = (h[:, None] < heads) & (d[None, :] < width)
    turned = d < 2 * half
    first = d < half
    row = x + t * x_row + h[:, None] * x_head
    mine = tl.load(row + d[None, :], mask=here, other=0.0).to(tl.float32)
    partner = tl.where(first, d + half, d - half)  # x1 and x2 are each other's
    other = tl.load(row + partner[None, :], mask=here & turned[None, :], other=0.0).to(tl.float32)
    angle = tl.load(position_ids + t) * table_row + tl.where(first, d, d - half)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    result = mine * c[None, :] + other * tl.where(first, -s, s)[None, :]
    tl.store(out + (t * heads + h[:, None]) * width + d[None, :], result.to(out.dtype.element_ty), mask=here)


def usual_launch(dtype: torch.dtype, heads: int, width: int) -> Launch:
    """Without a measured one, for heads and a head's width that are powers of 2: 1024 numbers of a row at once."""
    return {"BLOCK_H": min(heads, max(1, 1024 // width)), "num_warps": 4}


def rotary(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    x, cos, sin = whole(x), cos.float().contiguous(), sin.float().contiguous()
    rows, heads, width = x.shape
    out = torch.empty(rows, heads, width, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tiles = launch("rotary", x.device, usual_launch, x.dtype, heads, width)
    with on_device_of(x):
        rotary_kernel[(rows, triton.cdiv(heads, tiles["BLOCK_H"]))](
            x,
            cos,
            sin,
            whole(position_ids),
            out,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            heads,
            width,
            cos.shape[1],
            BLOCK_D=triton.next_power_of_2(width),
            **tiles,
        )
    return out
