"""``disentangled_attention`` in C++: csrc/cpu/disentangled_attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.rows import whole_heads


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
    q_positions = None if q_positions is None else q_positions.contiguous()
    q, k, v = whole_heads(q), whole_heads(k), whole_heads(v)
    pos_key = None if pos_key is None else whole_heads(pos_key)
    pos_query = None if pos_query is None else whole_heads(pos_query)
    return torch.ops.mlmfast_cpu.disentangled_attention(
        q, k, v, pos_key, pos_query, buckets, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, q_positions, scale
    )
