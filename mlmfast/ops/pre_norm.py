"""A residual stream's next sum and its LayerNorm, for transformers that normalise before a block."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::pre_norm", mutates_args=())
def pre_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``sum = x + bias + residual`` and ``LayerNorm(sum)``, row by row.

    The norm is that of the sum before it is rounded to its dtype: what ``add_layer_norm`` returns, bit for bit.

    Args:
        x: ``[T, d]``, a product whose bias has not been added.
        residual: ``[T, d]``, the stream.
        bias: ``[d]``, or None for 0.
        norm_weight: ``[d]``.
        norm_bias: ``[d]``, or None for 0.
        eps: added to the variance.

    Returns:
        The sum, and its norm: ``[T, d]`` each, in the dtype of ``x``.
    """
    return backends.implementation("pre_norm", x)(x, residual, bias, norm_weight, norm_bias, eps)


@pre_norm.register_fake
def _(x, residual, bias, norm_weight, norm_bias, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape)
