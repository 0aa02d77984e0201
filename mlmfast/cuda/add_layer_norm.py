"""``add_layer_norm`` in CUDA for few rows: csrc/cuda/add_layer_norm.cu; all else goes to Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cuda.rows import FEW_ROWS, WIDEST, alike
from mlmfast.kernels.add_layer_norm import add_layer_norm as triton_add_layer_norm

# What else than op and dtype decides, for doctor.
LIMITS = f"up to {FEW_ROWS} rows, up to {WIDEST} wide, all in one dtype; others go to triton"


def add_layer_norm(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> Tensor:
    if not fits(x, residual, bias, norm_weight, norm_bias):
        return triton_add_layer_norm(x, residual, bias, norm_weight, norm_bias, eps)
    return torch.ops.mlmfast_cuda.add_layer_norm(x, residual, bias, norm_weight, norm_bias, eps)


def fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel takes ``x [T, d]`` with what is added to it and the norm's vectors."""
    return 0 < len(x) <= FEW_ROWS and x.shape[1] <= WIDEST and alike(x, *others)
