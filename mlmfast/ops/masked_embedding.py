"""Token ids of packed copies, masks put in -> embeddings."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::masked_embedding", mutates_args=())
def masked_embedding(
    token_ids: Tensor,
    masked_rows: Tensor,
    mask_token_id: int,
    words: Tensor,
    position_ids: Tensor | None = None,
    positions: Tensor | None = None,
    token_types: Tensor | None = None,
    types: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    copy_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``norm(scale * words[token] + positions[position] + types[type])`` for every packed row.

    Args:
        token_ids: int64 ``[T]``.
        masked_rows: int64 ``[M]``, rows that read ``mask_token_id`` whatever their token.
        mask_token_id: the mask's row of ``words``.
        words: ``[V, e]``.
        position_ids: int64 ``[T]``, rows of ``positions``; needed where ``positions`` is given.
        positions: ``[P, e]`` or None.
        token_types: int64 ``[T]``, rows of ``types``; None for type 0 everywhere.
        types: ``[K, e]`` or None.
        norm_weight: ``[e]``, LayerNorm's weight; None for no LayerNorm.
        norm_bias: ``[e]`` or None.
        eps: LayerNorm's epsilon.
        copy_scale: ``[C]``, factor on the words of each copy (ESM-2's token dropout); None for 1.
        cu_seqlens: int32 ``[C + 1]``, bounds of the copies; needed where ``copy_scale`` is given.

    Returns:
        ``[T, e]`` in the dtype of ``words``.
    """
    serve = backends.implementation("masked_embedding", words)
    return serve(
        token_ids,
        masked_rows,
        mask_token_id,
        words,
        position_ids,
        positions,
        token_types,
        types,
        norm_weight,
        norm_bias,
        eps,
        copy_scale,
        cu_seqlens,
    )


@masked_embedding.register_fake
def _(token_ids, masked_rows, mask_token_id, words, *rest, **options):  # type: ignore[no-untyped-def]
    return words.new_empty(token_ids.shape[0], words.shape[1])
