"""Reference of ``pre_norm``."""

from __future__ import annotations

from torch import Tensor

from mlmfast.reference.add_layer_norm import added, layer_norm


def pre_norm(
    x: Tensor, residual: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    rows = added(x, residual, bias)
    return rows.to(x.dtype), layer_norm(rows, norm_weight, norm_bias, eps).to(x.dtype)
