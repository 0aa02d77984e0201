"""``pre_norm`` in C++: csrc/cpu/pre_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.add_layer_norm import whole
from mlmfast.cpu.rows import one_dtype
from mlmfast.reference import pre_norm as reference


def pre_norm(
    x: Tensor, residual: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if not one_dtype(x, residual, bias, norm_weight, norm_bias):
        return reference.pre_norm(x, residual, bias, norm_weight, norm_bias, eps)
    return torch.ops.mlmfast_cpu.pre_norm(*whole(x, residual, bias, norm_weight, norm_bias), eps)
