"""Reference of ``masked_embedding``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlmfast.reference import accumulation


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
    dtype = accumulation(words.dtype)
    rows = words[token_ids.index_fill(0, masked_rows, mask_token_id)].to(dtype)  # [T, e]
    if copy_scale is not None:
        assert cu_seqlens is not None
        rows = rows * torch.repeat_interleave(copy_scale.to(dtype), cu_seqlens.diff().long())[:, None]
    if positions is not None:
        assert position_ids is not None
        rows = rows + positions[position_ids]
    if types is not None:
        rows = rows + (types[0] if token_types is None else types[token_types])
    if norm_weight is not None:
        bias = None if norm_bias is None else norm_bias.to(dtype)
        rows = F.layer_norm(rows, (rows.shape[1],), norm_weight.to(dtype), bias, eps)
    return rows.to(words.dtype)
