"""Residual, bias and LayerNorm in one pass."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``LayerNorm(x + bias + residual)``, row by row.

    Args:
        x: ``[T, d]``, a product whose bias has not been added.
        residual: ``[T, d]``, or None for 0.
        bias: ``[d]``, or None for 0.
        norm_weight: ``[d]``.
        norm_bias: ``[d]``, or None for 0.
        eps: added to the variance.

    Returns:
        ``[T, d]`` in the dtype of ``x``.
    """
    return backends.implementation("add_layer_norm", x)(x, residual, bias, norm_weight, norm_bias, eps)


@add_layer_norm.register_fake
def _(x, residual, bias, norm_weight, norm_bias, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)
