"""``rotary`` in C++: csrc/cpu/rotary.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.rows import whole_heads


def rotary(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return torch.ops.mlmfast_cpu.rotary(whole_heads(x), cos, sin, position_ids.contiguous())
