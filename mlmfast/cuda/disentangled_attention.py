"""``disentangled_attention`` in CUDA: csrc/cuda/disentangled_attention.cu, where its kernels fit, else Triton."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlmfast.kernels.disentangled_attention import disentangled_attention as triton_attention

WIDTHS = (32, 64, 128)
# Queries of a sequence at any places that have a block of threads each; more are better off in Triton's tiles.
FEW_QUERIES = 16
# Bytes of shared memory that blocks of queries take with heads 128 wide: Layout<128>::BYTES of the kernel. GPUs of
# compute capability 8.6, 8.9 and 12.0 have 99 KB.
WIDEST_BYTES = 143360
# What else than op and dtype decides, for doctor.
LIMITS = (
    f"heads {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} wide, the last, but for few queries, on GPUs with "
    f"{WIDEST_BYTES >> 10} KB of shared memory a block; others go to triton"
)


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
    few = q_positions is not None
    if q.shape[2] not in WIDTHS or (max_seqlen_q > FEW_QUERIES if few else not holds(q)):
        return triton_attention(
            q,
            k,
            v,
            pos_key,
            pos_query,
            buckets,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            q_positions,
            scale,
        )
    q, k, v = in_pieces(q), in_pieces(k), in_pieces(v)
    pos_key = None if pos_key is None else in_pieces(pos_key)
    pos_query = None if pos_query is None else in_pieces(pos_query)
    q_positions = None if q_positions is None else q_positions.contiguous()
    return torch.ops.mlmfast_cuda.disentangled_attention(
        q, k, v, pos_key, pos_query, buckets, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, q_positions, scale
    )


def holds(q: Tensor) -> bool:
    """Whether the GPU has the shared memory for blocks of queries ``[T, H, D]``."""
    return q.shape[2] < WIDTHS[-1] or shared_memory(q.device) >= WIDEST_BYTES


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub does not know this one
    return int(properties.shared_memory_per_block_optin)


def aligned(x: Tensor) -> bool:
    """Whether every head of 16-bit ``x [T, H, D]`` begins at a multiple of 16 bytes."""
    return x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0


def in_pieces(x: Tensor) -> Tensor:
    """``x [T, H, D]`` itself if every head begins at a multiple of 16 bytes; else a copy whose heads do."""
    return x if aligned(x) else x.clone(memory_format=torch.contiguous_format)
