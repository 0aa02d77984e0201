"""``linear`` in CUDA for few rows: csrc/cuda/linear.cu reads the weights once; all else goes to Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cuda.rows import FEW_ROWS, alike, on_pieces
from mlmfast.kernels.linear import linear as triton_linear

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh", "geglu")
# What else than op and dtype decides, for doctor.
LIMITS = f"up to {FEW_ROWS} rows on 16-byte bounds, a multiple of 8 wide; others go to triton"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    if not fits(x, weight, bias, activation):
        return triton_linear(x, weight, bias, activation)
    return torch.ops.mlmfast_cuda.linear(x, weight, bias, activation)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Whether the kernel takes these; a GeGLU of an odd number of outputs and the like have their error elsewhere."""
    return (
        x.ndim == weight.ndim == 2
        and 0 < len(x) <= FEW_ROWS
        and x.shape[1] == weight.shape[1]
        and activation in ACTIVATIONS
        and (activation != "geglu" or len(weight) % 2 == 0)
        and alike(x, weight, bias)
        and on_pieces(x)
        and on_pieces(weight)
    )
