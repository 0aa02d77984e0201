"""``attention`` in CUDA for few queries: the kernel of csrc/cuda/disentangled_attention_kernel.h without its tables."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cuda.disentangled_attention import FEW_QUERIES, WIDTHS, aligned
from mlmfast.cuda.rows import FEW_ROWS
from mlmfast.kernels.attention import attention as triton_attention

# What else than op and dtype decides, for doctor.
LIMITS = (
    f"up to {FEW_ROWS} queries, {FEW_QUERIES} of a sequence, heads {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} "
    "wide on 16-byte bounds, without a distance bias; others go to triton"
)


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
    few = 0 < len(q) <= FEW_ROWS and max_seqlen_q <= FEW_QUERIES
    if not (few and distance_bias is None and q.shape[2] in WIDTHS and all(aligned(x) for x in (q, k, v))):
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return triton_attention(q, k, v, *bounds, q_positions, scale, local_window, distance_bias)
    places = None if q_positions is None else q_positions.contiguous()
    cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    return torch.ops.mlmfast_cuda.attention(q, k, v, *cu_seqlens, places, scale, local_window)
