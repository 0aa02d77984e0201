"""``attention`` in C++: csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_positions: Tensor | None,
    scale: float,
    local_window: int = -1,
) -> Tensor:
    return torch.ops.mlmfast_cpu.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, q_positions, scale, local_window)
