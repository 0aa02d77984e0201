"""``attention`` in C++: csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.rows import whole_heads


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
    distance_bias: Tensor | None = None,
) -> Tensor:
    q_positions = None if q_positions is None else q_positions.contiguous()
    q, k, v = whole_heads(q), whole_heads(k), whole_heads(v)
    distance_bias = None if distance_bias is None else distance_bias.contiguous()
    return torch.ops.mlmfast_cpu.attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_positions, scale, local_window, distance_bias
    )
