"""Reference of ``disentangled_attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.reference.attention import attend


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
    longest = len(buckets) // 2

    def bias(q: Tensor, k: Tensor, distances: Tensor) -> Tensor:
        # Only a few distances occur: take their table rows as columns, then each score picks its column.
        nearest, farthest = int(distances.min()), int(distances.max())
        occurring = torch.arange(nearest, farthest + 1, device=q.device)
        rows = buckets[occurring.clamp(-longest, longest) + longest].long()  # [W]
        columns = (distances - nearest)[:, None].expand(len(q), q.shape[1], -1, -1)  # [n, H, Lq, Lk]
        total = torch.zeros((), dtype=q.dtype, device=q.device)
        if pos_key is not None:
            table = pos_key[rows].to(q.dtype).permute(1, 2, 0)  # [H, D, W]
            total = total + (q @ table).gather(3, columns)
        if pos_query is not None:
            table = pos_query[rows].to(q.dtype).permute(1, 2, 0)
            total = total + (k @ table).gather(3, columns.transpose(2, 3)).transpose(2, 3)
        return total * scale

    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, q_positions, scale, bias)
