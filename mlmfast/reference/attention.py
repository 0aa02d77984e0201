"""Reference of ``attention``, and what the disentangled one shares with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mlmfast.reference import accumulation

# Most scores held at once: 64 Mi, 256 MiB in float32.
SCORES = 1 << 26


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
    def bias(q: Tensor, k: Tensor, distances: Tensor) -> Tensor | None:
        if distance_bias is None and local_window < 0:
            return None
        if distance_bias is None:
            added = q.new_zeros(())
        else:
            longest = distance_bias.shape[1] // 2
            columns = distances.clamp(-longest, longest) + longest  # [n, Lq, Lk]
            added = distance_bias.to(q.dtype)[:, columns].transpose(0, 1)  # [n, H, Lq, Lk]
        return added if local_window < 0 else added.where((distances.abs() <= local_window)[:, None], -torch.inf)

    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, q_positions, scale, bias)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_positions: Tensor | None,
    scale: float,
    bias: Callable[[Tensor, Tensor, Tensor], Tensor | None],
) -> Tensor:
    """Softmax attention with a bias on the scores, a block of equally long sequences at a time.

    ``bias(q [n, H, Lq, D], k [n, H, Lk, D], distances int64 [n, Lq, Lk])`` returns something that adds to the scaled
    scores ``[n, H, Lq, Lk]``, or None; a distance is the query's place minus the key's.
    """
    dtype = accumulation(q.dtype)
    heads, width = q.shape[1:]
    out = torch.empty_like(q)
    for rows_q, rows_k, n in blocks(cu_seqlens_q, cu_seqlens_k, heads):
        query, key, value = (
            t[rows].to(dtype).view(n, -1, heads, width).transpose(1, 2)  # [n, H, L, D]
            for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k))
        )
        places = torch.arange(key.shape[2], device=q.device)
        mine = places[None] if q_positions is None else q_positions[rows_q].view(n, -1)
        mixed = torch.empty_like(query)
        step = max(1, SCORES // (n * heads * key.shape[2]))  # a single long sequence goes by some queries at a time
        for start in range(0, query.shape[2], step):
            some = slice(start, start + step)
            distances = mine[:, some, None] - places  # [1 or n, Lq, Lk]
            scores = query[:, :, some] @ key.transpose(2, 3) * scale
            extra = bias(query[:, :, some], key, distances)
            if extra is not None:
                scores = scores + extra
            mixed[:, :, some] = scores.softmax(-1) @ value
        out[rows_q] = mixed.transpose(1, 2).reshape(-1, heads, width).to(q.dtype)
    return out


def blocks(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, heads: int) -> Iterator[tuple[slice, slice, int]]:
    """Runs of neighbouring sequences with equal lengths, cut so that a block's scores stay bounded.

    Yields the block's query rows, its key rows and its number of sequences; sequences without queries are passed over.
    """
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    count = len(bounds_q) - 1
    first = 0
    while first < count:
        length_q = bounds_q[first + 1] - bounds_q[first]
        length_k = bounds_k[first + 1] - bounds_k[first]
        most = max(1, SCORES // max(1, heads * length_q * length_k))
        last = first + 1
        while (
            last < count
            and last - first < most
            and bounds_q[last + 1] - bounds_q[last] == length_q
            and bounds_k[last + 1] - bounds_k[last] == length_k
        ):
            last += 1
        if length_q:
            yield slice(bounds_q[first], bounds_q[last]), slice(bounds_k[first], bounds_k[last]), last - first
        first = last
