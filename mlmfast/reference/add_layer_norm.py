"""Reference of ``add_layer_norm``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mlmfast.reference import accumulation


def add_layer_norm(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> Tensor:
    dtype = accumulation(x.dtype)
    rows = x.to(dtype)
    if bias is not None:
        rows = rows + bias
    if residual is not None:
        rows = rows + residual
    norm_bias = None if norm_bias is None else norm_bias.to(dtype)
    return F.layer_norm(rows, (rows.shape[1],), norm_weight.to(dtype), norm_bias, eps).to(x.dtype)
