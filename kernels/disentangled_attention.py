"""``disentangled_attention`` in Triton: what positions add, by slot of distances, then attention that reads it skewed.

In a sequence of L tokens only 2 L - 1 distances occur. A first kernel multiplies every query with the table rows of
those distances, and every key with theirs: bands ``[H, T, S]`` with a slot a distance (or, where the table is shorter
than that, a slot a table row). The score of query i and key j then adds the band's numbers at i - j, which is a plain
read at an address that differs from its neighbour's by a constant. Nothing is gathered in registers, which would spill.

Bands are large, so heads are taken in groups whose bands stay within :data:`BANDS`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.attention import LOG2_E, attend, block_width
from mlmfast.kernels.launches import Launch, launch
from mlmfast.kernels.products import product
from mlmfast.kernels.rows import on_device_of, whole

# Most bytes of bands held at once, unless a single head's are more.
BANDS = 64 << 20


@triton.jit(do_not_specialize=["tokens", "slots"])  # they change from batch to batch
def band_kernel(
    rows,  # [T, H, D]
    table,  # [P, H, D]
    table_rows,  # int32 [S], or None for every row of the table in turn
    out,  # [H, T, S]
    tokens,  # T
    slots,  # S
    row_row,
    row_head,
    table_row,
    table_head,
    out_row,  # strides, in numbers
    width,  # D
    log2_scale,  # of scores, in powers of 2
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    t = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    s = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    wide = d[None, :] < width
    row = tl.load(
        rows + head * row_head + t[:, None] * row_row + d[None, :], mask=(t[:, None] < tokens) & wide, other=0.0
    )  # [M, D]
    where = s
    if table_rows is not None:
        where = tl.load(table_rows + s, mask=s < slots, other=0)
    position = tl.load(
        table + head * table_head + where.to(tl.int64)[:, None] * table_row + d[None, :],
        mask=(s[:, None] < slots) & wide,
        other=0.0,
    )  # [N, D]
    band = product(row, tl.trans(position), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    tl.store(
        out + (head * tokens + t[:, None]) * out_row + s[None, :],
        (band * log2_scale).to(out.dtype.element_ty),  # float16 could not hold them unscaled
        mask=(t[:, None] < tokens) & (s[None, :] < slots),
    )


def usual_band_launch(dtype: torch.dtype, width: int) -> Launch:
    """Without a measured one, for a head width that is a power of 2."""
    side = 32 if dtype == torch.float32 else 64
    return {"BLOCK_M": side, "BLOCK_N": side, "num_warps": 8 if width > 64 else 4, "num_stages": 1}


def band(rows: Tensor, table: Tensor, table_rows: Tensor | None, scale: float) -> Tensor:
    """``out[h, t, s] = rows[t, h] . table[table_rows[s], h] * scale * log2(e)``, what attention adds in powers of 2.

    Args:
        rows: ``[T, H, D]``.
        table: ``[P, H, D]``.
        table_rows: int32 ``[S]``, or None for the whole table, ``S = P``.

    Returns:
        ``[H, T, S]`` in the dtype of ``rows``, its rows on 16-byte bounds.
    """
    tokens, heads, width = rows.shape
    slots = len(table) if table_rows is None else len(table_rows)
    out = torch.empty(heads, tokens, slots + -slots % 16, dtype=rows.dtype, device=rows.device)
    tiles = launch("band", rows.device, usual_band_launch, rows.dtype, block_width(width))
    grid = (triton.cdiv(tokens, tiles["BLOCK_M"]), triton.cdiv(slots, tiles["BLOCK_N"]), heads)
    with on_device_of(rows):
        band_kernel[grid](
            rows,
            table,
            table_rows,
            out,
            tokens,
            slots,
            rows.stride(0),
            rows.stride(1),
            table.stride(0),
            table.stride(1),
            out.stride(1),
            width,
            scale * LOG2_E,
            BLOCK_D=block_width(width),
            **tiles,
        )
    return out


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
    q, k, v, pos_key, pos_query = whole(q), whole(k), whole(v), whole(pos_key), whole(pos_query)
    q_positions, buckets = whole(q_positions), whole(buckets)
    cu_seqlens_q, cu_seqlens_k = whole(cu_seqlens_q), whole(cu_seqlens_k)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q) == 0:
        return out
    tables = [table for table in (pos_key, pos_query) if table is not None]
    slots: Tensor | None = buckets
    table_rows, reach = None, len(buckets) // 2
    if len({len(table) for table in tables}) > 1:
        raise ValueError("disentangled_attention: pos_key and pos_query must have as many rows")
    width = len(tables[0]) if tables else 0
    if 2 * max_seqlen_k - 1 <= width:
        distances = torch.arange(1 - max_seqlen_k, max_seqlen_k, device=q.device)
        slots, table_rows = None, buckets[distances.clamp(-reach, reach) + reach]
        width = len(distances)
    heads = q.shape[1]
    rows_of_bands = (0 if pos_key is None else len(q)) + (0 if pos_query is None else len(k))
    most = max(1, BANDS // max(1, rows_of_bands * width * q.element_size()))
    step = triton.cdiv(heads, triton.cdiv(heads, most))  # groups of nearly one size
    for first in range(0, heads, step):
        some = slice(first, first + step)
        attend(
            q[:, some],
            k[:, some],
            v[:, some],
            out[:, some],
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            q_positions,
            scale,
            q_terms=None if pos_key is None else band(q[:, some], pos_key[:, some], table_rows, scale),
            k_terms=None if pos_query is None else band(k[:, some], pos_query[:, some], table_rows, scale),
            slots=slots,
        )
    return out
