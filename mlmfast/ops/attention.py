"""Bidirectional attention over packed sequences."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::attention", mutates_args=())
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
    """``softmax(q @ k.T * scale + bias) @ v`` within each sequence and head.

    ``bias = distance_bias[head, clamp(query place - key place, -N, N) + N]``: what bucketed relative biases become
    (Raffel et al. 2020, arXiv 1910.10683, section 2.1), a bucket's number at each of its distances.

    Args:
        q: ``[Tq, H, D]``.
        k, v: ``[Tk, H, D]``.
        cu_seqlens_q: int32 ``[C + 1]``, bounds of each sequence's queries; a sequence may have none.
        cu_seqlens_k: int32 ``[C + 1]``, bounds of its keys.
        max_seqlen_q, max_seqlen_k: most queries and keys of a sequence, so that nobody asks the device.
        q_positions: int64 ``[Tq]``, each query's place among its sequence's keys; None where queries and keys are the
            same rows.
        scale: factor on the products.
        local_window: greatest distance from query to key that is attended; -1 for every one.
        distance_bias: float32 (float64 for a float64 ``q``) ``[H, 2 N + 1]``, contiguous: what each head adds to a
            scaled score by its distance; farther ones share the end columns. None for 0.

    Returns:
        ``[Tq, H, D]`` in the dtype of ``q``.
    """
    serve = backends.implementation("attention", q)
    return serve(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        q_positions,
        scale,
        local_window,
        distance_bias,
    )


@attention.register_fake
def _(q, k, v, *rest, **options):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)
