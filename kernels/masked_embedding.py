"""``masked_embedding`` in Triton: a program a row reads its tables, adds, normalises and writes once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.row_norm import layer_norm, row_launch
from mlmfast.kernels.rows import on_device_of, row_stride, whole


@triton.jit(do_not_specialize=["mask_token_id", "copies"])
def masked_embedding_kernel(
    token_ids,  # int64 [T]
    masked,  # bool [T]
    mask_token_id,
    words,  # [V, e]
    position_ids,  # int64 [T] or None
    positions,  # [P, e] or None
    token_types,  # int64 [T] or None
    types,  # [K, e] or None
    norm_weight,  # [e] or None
    norm_bias,  # [e] or None
    scales,  # [C] or None
    cu_seqlens,  # int32 [C + 1] or None
    copies,
    out,  # [T, e]
    words_stride,
    positions_stride,
    types_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    token = tl.where(tl.load(masked + t) != 0, mask_token_id, tl.load(token_ids + t))
    row = tl.load(words + token * words_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if scales is not None:
        # The copy that holds this row: the last one that begins at it or before.
        first, last = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + copies
        while last - first > 1:
            middle = (first + last) // 2
            before = tl.load(cu_seqlens + middle) <= t
            first = tl.where(before, middle, first)
            last = tl.where(before, last, middle)
        row *= tl.load(scales + first).to(tl.float32)
    if positions is not None:
        place = tl.load(position_ids + t)
        row += tl.load(positions + place * positions_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if types is not None:
        kind = tl.zeros((), tl.int64)
        if token_types is not None:
            kind = tl.load(token_types + t)
        row += tl.load(types + kind * types_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if norm_weight is not None:
        row = layer_norm(row, columns, width, norm_weight, norm_bias, eps)
    tl.store(out + t * width + columns, row.to(out.dtype.element_ty), mask=inside)


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
    words, positions, types = whole(words), whole(positions), whole(types)
    rows, width = len(token_ids), words.shape[1]
    out = torch.empty(rows, width, dtype=words.dtype, device=words.device)
    if rows == 0:
        return out
    # A byte a row says which are masked; the other way, a search in masked_rows, would wait for a dozen loads a row.
    masked = torch.zeros(rows, dtype=torch.bool, device=words.device).index_fill_(0, masked_rows, True)
    with on_device_of(words):
        masked_embedding_kernel[(rows,)](
            whole(token_ids),
            masked,
            mask_token_id,
            words,
            whole(position_ids),
            positions,
            whole(token_types),
            types,
            whole(norm_weight),
            whole(norm_bias),
            whole(copy_scale),
            whole(cu_seqlens),
            0 if copy_scale is None else len(copy_scale),
            out,
            row_stride(words),
            row_stride(positions),
            row_stride(types),
            width,
            eps,
            **row_launch("masked_embedding", words.device, words.dtype, width),
        )
    return out
