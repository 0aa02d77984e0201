"""Reference of ``linear``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlmfast.reference import accumulation


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    y = F.linear(x, weight, bias)  # torch adds up in float32 for narrower dtypes
    if activation == "none":
        return y
    z = y.to(accumulation(x.dtype))
    if activation == "gelu":
        z = F.gelu(z)
    elif activation == "gelu_tanh":
        z = F.gelu(z, approximate="tanh")
    elif activation == "relu":
        z = F.relu(z)
    elif activation == "tanh":
        z = torch.tanh(z)
    elif activation == "geglu":
        first, second = z.chunk(2, dim=1)
        z = F.gelu(first) * second
    else:
        raise ValueError(f"linear: activation {activation!r} is not known")
    return z.to(x.dtype)
