"""Attention over packed sequences with DeBERTa's position terms."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::disentangled_attention", mutates_args=())
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
    """``softmax((q.k + q.pos_key[row] + k.pos_query[row]) * scale) @ v`` within each sequence and head.

    ``row = buckets[clamp(query place - key place, -N, N) + N]``, He et al. 2021 (arXiv 2006.03654), equation 4.

    Args:
        q: ``[Tq, H, D]``.
        k, v: ``[Tk, H, D]``.
        pos_key: ``[P, H, D]``, for content-to-position; None without that term.
        pos_query: ``[P, H, D]``, for position-to-content; None without that term.
        buckets: int32 ``[2 N + 1]``, the table row of each distance.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q_positions, scale: as in ``attention``.

    Returns:
        ``[Tq, H, D]`` in the dtype of ``q``.
    """
    serve = backends.implementation("disentangled_attention", q)
    return serve(
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


@disentangled_attention.register_fake
def _(q, k, v, *rest, **options):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)
