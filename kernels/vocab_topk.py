"""``vocab_topk`` in Triton: each tile's best tokens, then the best among those; logits stay in the program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.rows import on_device_of
from mlmfast.kernels.vocab_rows import vocab_rows
from mlmfast.kernels.vocab_tiles import PARTS, Product, log_partition, logits_tile, with_tile

# Most candidates held at once, a logit and an id each: 8 Mi, 64 MiB.
CANDIDATES = 1 << 23
# A tile's best are taken out one after the other. For more than this whole rows are cheaper, a few at a time.
MOST = 32


@triton.jit(do_not_specialize=["rows", "columns", "k"])
def vocab_topk_kernel(
    greatest,  # [R, PARTS]
    total,  # [R, PARTS]
    values,  # [R, tiles, K], the best logits of each tile
    ids,  # int32 [R, tiles, K], V where a tile has no more
    hidden,
    vocabulary,
    bias,
    rows,
    tokens,
    width,
    hidden_row,
    vocabulary_row,
    inverse_temperature,
    columns,  # tiles of a part
    k,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    part = tl.program_id(1)
    here = r < rows
    tiles = tl.cdiv(tokens, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(part * columns, (part + 1) * columns):
        if tile < tiles:
            logits = logits_tile(
                hidden,
                vocabulary,
                bias,
                tl.program_id(0) * BLOCK_M,
                tile * BLOCK_N,
                rows,
                tokens,
                width,
                hidden_row,
                vocabulary_row,
                inverse_temperature,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            top, sums, _ = with_tile(logits, top, sums, sums, False)
            place = (r * tiles + tile) * k
            j = tl.arange(0, BLOCK_N)[None, :]
            left = tl.broadcast_to(tile * BLOCK_N + j < tokens, [BLOCK_M, BLOCK_N])
            for i in range(k):
                # Of what is left the best, the first of equals; also where all that is left is -inf.
                best = tl.max(tl.where(left, logits, float("-inf")), 1)
                at = tl.min(tl.where(left & (logits == best[:, None]), j, BLOCK_N), 1)
                found = at < BLOCK_N
                tl.store(values + place + i, tl.where(found, best, float("-inf")), mask=here)
                tl.store(ids + place + i, tl.where(found, tile * BLOCK_N + at, tokens), mask=here)
                left = left & (j != at[:, None])
    tl.store(greatest + r * PARTS + part, top, mask=here)
    tl.store(total + r * PARTS + part, sums, mask=here)


def vocab_topk(
    hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    logprobs = torch.empty(len(hidden), k, dtype=torch.float32, device=hidden.device)
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    if not logprobs.numel():
        return logprobs, ids
    whole = Product.of("vocab_topk", hidden, vocabulary, bias, temperature)
    few = k <= min(MOST, whole.tiles["BLOCK_N"])
    step = max(1, CANDIDATES // (whole.tile_columns * k if few else whole.tokens))
    for start in range(0, whole.rows, step):
        rows = slice(start, start + step)
        if few:
            part = Product.of("vocab_topk", hidden[rows], vocabulary, bias, temperature)
            logprobs[rows], ids[rows] = _best_of_tiles(part, k)
        else:
            logprobs[rows], ids[rows] = vocab_rows(hidden[rows], vocabulary, bias, temperature).topk(k)
    return logprobs, ids


def _best_of_tiles(product: Product, k: int) -> tuple[Tensor, Tensor]:
    greatest, total = product.empty_parts(2)
    shape = (product.rows, product.tile_columns * k)
    values = torch.empty(shape, dtype=torch.float32, device=greatest.device)
    ids = torch.empty(shape, dtype=torch.int32, device=greatest.device)
    with on_device_of(greatest):
        vocab_topk_kernel[product.grid](
            greatest,
            total,
            values,
            ids,
            *product.arguments(),
            triton.cdiv(product.tile_columns, PARTS),
            k,
            PARTS=PARTS,
            **product.tiles,
        )
    peak, log_total, _ = log_partition(greatest, total, None)
    # A token of logit -inf still comes before none at all.
    order = values.clamp(min=torch.finfo(torch.float32).min).masked_fill_(ids == product.tokens, -torch.inf)
    at = order.topk(k).indices
    return values.gather(1, at) - peak[:, None] - log_total[:, None], ids.gather(1, at).long()
