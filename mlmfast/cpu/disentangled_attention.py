"""``disentangled_attention`` in C++: csrc/cpu/disentangled_attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_positions: Tensor | None,
    scale: float,
) -> Tensor:
    return torch.ops.mlmfast_cpu.disentangled_attention(
        q, k, v, pos_key, pos_query, buckets, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_positions, scale
    )
