"""Reference of ``rotary``."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.reference import accumulation


def rotary(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    dtype = accumulation(x.dtype)
    half = cos.shape[1]
    c, s = (table[position_ids, None].to(dtype) for table in (cos, sin))  # [T, 1, half]
    x1, x2 = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype)  # [T, H, half]
    out = x.clone(memory_format=torch.contiguous_format)
    out[..., :half] = x1 * c - x2 * s
    out[..., half : 2 * half] = x2 * c + x1 * s
    return out
