"""``masked_embedding`` in CUDA for few rows: csrc/cuda/masked_embedding.cu; all else goes to Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cuda.rows import FEW_ROWS, WIDEST, alike
from mlmfast.kernels.masked_embedding import masked_embedding as triton_masked_embedding

# What else than op and dtype decides, for doctor.
LIMITS = f"up to {FEW_ROWS} rows, up to {WIDEST} wide, all tables in one dtype; others go to triton"


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
    few = 0 < len(token_ids) <= FEW_ROWS and words.shape[1] <= WIDEST
    if not (few and alike(words, positions, types, norm_weight, norm_bias)):
        return triton_masked_embedding(
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
    return torch.ops.mlmfast_cuda.masked_embedding(
        token_ids.contiguous(),
        masked_rows.contiguous(),
        mask_token_id,
        words,
        None if position_ids is None else position_ids.contiguous(),
        positions,
        None if token_types is None else token_types.contiguous(),
        types,
        norm_weight,
        norm_bias,
        eps,
        None if copy_scale is None else copy_scale.float().contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
    )
