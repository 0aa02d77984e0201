"""``masked_embedding`` in C++: csrc/cpu/masked_embedding.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.rows import one_dtype, whole_rows
from mlmfast.reference import masked_embedding as reference


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
    if not one_dtype(words, positions, types, norm_weight, norm_bias):
        return reference.masked_embedding(
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
    return torch.ops.mlmfast_cpu.masked_embedding(
        token_ids.contiguous(),
        masked_rows.contiguous(),
        mask_token_id,
        whole_rows(words),
        None if position_ids is None else position_ids.contiguous(),
        None if positions is None else whole_rows(positions),
        None if token_types is None else token_types.contiguous(),
        None if types is None else whole_rows(types),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        eps,
        None if copy_scale is None else copy_scale.float().contiguous(),
        cu_seqlens,
    )
