"""Reference of ``add_layer_norm``, and what ``pre_norm`` shares with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mlmfast.reference import accumulation


def add_layer_norm(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> Tensor:
    return layer_norm(added(x, residual, bias), norm_weight, norm_bias, eps).to(x.dtype)


def added(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x + bias + residual``, in the dtype that sums are made in."""
    rows = x.to(accumulation(x.dtype))
    if bias is not None:
        rows = rows + bias
    if residual is not None:
        rows = rows + residual
    return rows


def layer_norm(rows: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm in the dtype of ``rows [T, d]``, whatever the weights'."""
    norm_bias = None if norm_bias is None else norm_bias.to(rows.dtype)
    return F.layer_norm(rows, (rows.shape[1],), norm_weight.to(rows.dtype), norm_bias, eps)
