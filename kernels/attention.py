"""``attention`` in Triton: softmax on the fly over packed sequences; the disentangled one shares the kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.launches import Launch, launch
from mlmfast.kernels.products import product
from mlmfast.kernels.rows import on_device_of, whole

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["blocks", "reach", "window"])  # they change from batch to batch
def attention_kernel(
    q,  # [Tq, H, D]
    k,  # [Tk, H, D]
    v,  # [Tk, H, D]
    out,  # [Tq, H, D]
    cu_seqlens_q,  # int32 [C + 1]
    cu_seqlens_k,  # int32 [C + 1]
    q_positions,  # int64 [Tq], or None where queries and keys are the same rows
    q_terms,  # [H, Tq, S], what a query adds to the scores of each slot of distances, or None
    k_terms,  # [H, Tk, S], what a key adds, or None; both scaled, in powers of 2
    slots,  # int32 [2 N + 1], the slot of each distance, or None where slots follow distances
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    q_terms_head,
    k_terms_head,
    terms_row,  # strides, in numbers
    blocks,  # of queries, in the longest sequence
    width,  # D
    reach,  # N of slots; without them, the slot of distance 0
    log2_scale,  # of scores, in powers of 2
    window,
    LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0) // blocks
    first_query = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    q_begin, k_begin = tl.load(cu_seqlens_q + sequence), tl.load(cu_seqlens_k + sequence)
    queries = tl.load(cu_seqlens_q + sequence + 1) - q_begin
    keys = tl.load(cu_seqlens_k + sequence + 1) - k_begin
    if first_query >= queries:
        return

    # Offsets within a tile fit 32 bits, and where it begins is one number: registers are what this kernel is short of.
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q_row0 = (q_begin + first_query).to(tl.int64)
    asked = first_query + i < queries
    asked_d = asked[:, None] & (d[None, :] < width)
    places = first_query + i
    if q_positions is not None:
        places = tl.load(q_positions + q_row0 + i, mask=asked, other=0).to(tl.int32)
    query = tl.load(q + head * q_head + q_row0 * q_row + i[:, None] * q_row + d[None, :], mask=asked_d, other=0.0)

    first_key, last_key = 0, keys
    if LOCAL:
        nearest = tl.min(tl.where(asked, places, 2147483647))
        farthest = tl.max(tl.where(asked, places, 0))
        first_key = tl.maximum(nearest - window, 0) // BLOCK_N * BLOCK_N
        last_key = tl.minimum(farthest + window + 1, keys)
    greatest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first_key, last_key, BLOCK_N):
        k_row0 = (k_begin + start).to(tl.int64)
        there = start + j < keys
        there_d = there[:, None] & (d[None, :] < width)
        key = tl.load(k + head * k_head + k_row0 * k_row + j[:, None] * k_row + d[None, :], mask=there_d, other=0.0)
        scores = product(query, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * log2_scale  # [M, N]
        distances = places[:, None] - (start + j)[None, :]
        seen = there[None, :]
        if q_terms is not None or k_terms is not None:
            both = asked[:, None] & there[None, :]
            if slots is None:
                slot = distances + reach
            else:
                slot = tl.load(slots + tl.minimum(tl.maximum(distances, -reach), reach) + reach, mask=both, other=0)
            # Neighbours share all but one of their distances: read along a query, or along a key, these are one band.
            if q_terms is not None:
                band = q_terms + head * q_terms_head + q_row0 * terms_row
                scores += tl.load(band + (i[:, None] * terms_row + slot), mask=both, other=0.0).to(tl.float32)
            if k_terms is not None:
                band = k_terms + head * k_terms_head + k_row0 * terms_row
                scores += tl.load(band + (j[None, :] * terms_row + slot), mask=both, other=0.0).to(tl.float32)
        if LOCAL:
            seen = seen & (tl.abs(distances) <= window)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(greatest, tl.max(scores, 1))
        # A query may see nothing of the first blocks of its window; -inf less -inf is no number.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(greatest - base)
        total = total * fade + tl.sum(weights, 1)
        value = tl.load(v + head * v_head + k_row0 * v_row + j[:, None] * v_row + d[None, :], mask=there_d, other=0.0)
        mixed = product(weights.to(value.dtype), value, mixed * fade[:, None])
        greatest = highest
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # rows past the last query may have seen nothing
    rows = out + head * out_head + q_row0 * out_row
    tl.store(rows + i[:, None] * out_row + d[None, :], mixed.to(out.dtype.element_ty), mask=asked_d)


def block_width(width: int) -> int:
    """The tile that a head of this width is held in: a power of 2, and at least what a product takes."""
    return max(16, triton.next_power_of_2(width))


def usual_launch(dtype: torch.dtype, width: int, queries: int, keys: int) -> Launch:
    """Without a measured one: tiles as large as sequences and registers allow.

    Args:
        dtype: of queries and keys.
        width: of a head, a power of 2.
        queries, keys: most of them in a sequence, powers of 2.
    """
    if dtype == torch.float32:
        most_rows = most_columns = 32 if width <= 64 else 16
    else:
        most_rows, most_columns = (64 if width <= 128 else 32), (64 if width <= 64 else 32)
    rows = max(16, min(most_rows, queries))
    # float32 products are made of single multiplications, whose operands fill the registers: with 4 warps Triton 3.6
    # takes all 255 and spills, with 8 at most 80.
    warps = 8 if dtype == torch.float32 and rows == 32 else 4
    return {"BLOCK_M": rows, "BLOCK_N": max(16, min(most_columns, keys)), "num_warps": warps, "num_stages": 2}


def usual_banded_launch(dtype: torch.dtype, width: int, queries: int, keys: int) -> Launch:
    """The same with bands, whose loads need as many registers again as the scores: so smaller tiles or more threads."""
    tiles = usual_launch(dtype, width, queries, keys)
    if tiles["BLOCK_M"] == 16:
        tiles["BLOCK_N"] = min(tiles["BLOCK_N"], 32)
    if dtype == torch.float32:
        return tiles
    held = tiles["BLOCK_M"] * (tiles["BLOCK_N"] + width)  # scores and sums
    return tiles | {"num_warps": 8 if held > 40 * 128 else 4}  # at most 40 a thread of 4 warps


def usual_biased_launch(dtype: torch.dtype, width: int, queries: int, keys: int) -> Launch:
    """With one row of numbers for all queries; by what spills on no GPU, and a band's tiles of few keys do."""
    if dtype == torch.float32:
        return usual_launch(dtype, width, queries, keys)
    tiles = usual_banded_launch(dtype, width, queries, keys)
    return tiles | {"BLOCK_N": max(16, min(64, keys))} if tiles["BLOCK_M"] == 64 else tiles


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_positions: Tensor | None,
    scale: float,
    local_window: int = -1,
    q_terms: Tensor | None = None,
    k_terms: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """Attention of some heads, with what positions add to the scores, into ``out [Tq, H, D]``.

    Args:
        q_terms, k_terms: ``[H, Tq, S]`` and ``[H, Tk, S]``: what is added to a scaled score, in powers of 2, by the
            slot of its distance; None for nothing. Rows may be one and the same, 0 numbers apart.
        slots: int32 ``[2 N + 1]``, the slot of each distance from ``-N`` to ``N``, farther ones being those; None where
            the slot of distance ``x`` is ``x + max_seqlen_k - 1``.
    """
    heads, width = q.shape[1:]
    sequences = len(cu_seqlens_q) - 1
    terms = k_terms if q_terms is None else q_terms
    name, usual = "attention" if local_window < 0 else "local_attention", usual_launch
    if terms is not None:
        name, usual = "disentangled_attention", usual_banded_launch
        if terms.stride(1) == 0:
            name, usual = "biased_attention", usual_biased_launch
    tiles = launch(name, q.device, usual, q.dtype, block_width(width), max_seqlen_q, max_seqlen_k)
    blocks = triton.cdiv(max_seqlen_q, tiles["BLOCK_M"])
    with on_device_of(q):
        attention_kernel[(sequences * blocks, heads)](
            q,
            k,
            v,
            out,
            cu_seqlens_q,
            cu_seqlens_k,
            q_positions,
            q_terms,
            k_terms,
            slots,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            out.stride(0),
            out.stride(1),
            0 if q_terms is None else q_terms.stride(0),
            0 if k_terms is None else k_terms.stride(0),
            0 if terms is None else terms.stride(1),
            blocks,
            width,
            max_seqlen_k - 1 if slots is None else len(slots) // 2,
            scale * LOG2_E,
            min(local_window, 1 << 30),
            LOCAL=local_window >= 0,
            BLOCK_D=block_width(width),
            **tiles,
        )


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        terms = None if distance_bias is None else by_distance(distance_bias, max_seqlen_k, len(q))
        bounds = (whole(cu_seqlens_q), whole(cu_seqlens_k), max_seqlen_q, max_seqlen_k, whole(q_positions))
        attend(whole(q), whole(k), whole(v), out, *bounds, scale, local_window, q_terms=terms)
    return out


def by_distance(bias: Tensor, longest: int, queries: int) -> Tensor:
    """A ``distance_bias [H, 2 N + 1]`` as terms ``[H, Tq, S]`` of queries that all have the same row.

    A slot a distance that sequences of up to ``longest`` keys have, so that the kernel looks up no slots.
    """
    reach = bias.shape[1] // 2
    distances = torch.arange(1 - longest, longest, device=bias.device)
    terms = (bias * LOG2_E)[:, distances.clamp(-reach, reach) + reach]  # [H, S]
    return terms[:, None].expand(-1, queries, -1)
