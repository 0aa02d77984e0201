"""``add_layer_norm`` in C++: csrc/cpu/add_layer_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.rows import one_dtype, whole_rows
from mlmfast.reference import add_layer_norm as reference


def add_layer_norm(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> Tensor:
    if not one_dtype(x, residual, bias, norm_weight, norm_bias):
        return reference.add_layer_norm(x, residual, bias, norm_weight, norm_bias, eps)
    return torch.ops.mlmfast_cpu.add_layer_norm(*whole(x, residual, bias, norm_weight, norm_bias), eps)


def whole(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The same, each row and vector contiguous."""
    return (
        whole_rows(x),
        None if residual is None else whole_rows(residual),
        None if bias is None else bias.contiguous(),
        norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
    )
