"""``linear``: the vendor's matrix product with its bias, then the activation in one elementwise kernel.

What cuBLAS may do is torch's setting: as it comes, float32 products are IEEE, and 16-bit products may add up a few
partial sums in 16 bits (``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``), as Hugging Face's do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.launches import Launch, launch
from mlmfast.kernels.rows import on_device_of

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "tanh", "geglu")


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def gelu(x):
    """Through erf, as it was trained: 0.7071... is the square root of a half."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def linear_kernel(
    y,  # [T, m], the product and the bias
    out,  # [T, width]
    y_stride,
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    row = y + t * y_stride
    x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    else:
        tl.static_assert(ACTIVATION == "geglu")
        gate = tl.load(row + width + columns, mask=inside, other=0.0).to(tl.float32)
        x = gelu(x) * gate
    tl.store(out + t * width + columns, x.to(out.dtype.element_ty), mask=inside)


def usual_launch(dtype: torch.dtype, width: int) -> Launch:
    """Without a measured one: 8 numbers a thread, whatever the width of a row."""
    return {"BLOCK": 1024, "num_warps": 4}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    if activation != "none" and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r} is not known")
    y = F.linear(x, weight, bias)  # [T, m]: one rounding for both, as in plain torch
    if activation == "none":
        return y
    rows, width = y.shape
    out = y
    if activation == "geglu":
        width //= 2
        out = torch.empty(rows, width, dtype=y.dtype, device=y.device)
    if rows:
        tiles = launch("linear", y.device, usual_launch, y.dtype, width)
        with on_device_of(y):
            linear_kernel[(rows, triton.cdiv(width, tiles["BLOCK"]))](
                y, out, y.stride(0), width, ACTIVATION=activation, **tiles
            )
    return out
