"""``pre_norm`` in CUDA for few rows: csrc/cuda/pre_norm.cu; all else goes to Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cuda.add_layer_norm import LIMITS as LIMITS  # its kernel, for doctor
from mlmfast.cuda.add_layer_norm import fits
from mlmfast.kernels.pre_norm import pre_norm as triton_pre_norm


def pre_norm(
    x: Tensor, residual: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if not fits(x, residual, bias, norm_weight, norm_bias):
        return triton_pre_norm(x, residual, bias, norm_weight, norm_bias, eps)
    return torch.ops.mlmfast_cuda.pre_norm(x, residual, bias, norm_weight, norm_bias, eps)
