"""``pre_norm`` in Triton: ``add_layer_norm``'s kernel, which writes the sum before its norm too."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.kernels.add_layer_norm import norm_rows


def pre_norm(
    x: Tensor, residual: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, norm_rows(x, residual, bias, norm_weight, norm_bias, eps, total)
