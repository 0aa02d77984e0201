"""``vocab_rows`` in Triton: the product in float32, then each row normalised in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.launches import Launch, launch
from mlmfast.kernels.rows import on_device_of
from mlmfast.kernels.vocab_tiles import Product, logits_tile, with_tile


@triton.jit(do_not_specialize=["rows"])
def vocab_rows_kernel(
    out,  # [R, V]
    hidden,
    vocabulary,
    bias,
    rows,
    tokens,
    width,
    hidden_row,
    vocabulary_row,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = logits_tile(
        hidden,
        vocabulary,
        bias,
        tl.program_id(0) * BLOCK_M,
        tl.program_id(1) * BLOCK_N,
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
    tl.store(out + r[:, None] * tokens + c[None, :], logits, mask=(r[:, None] < rows) & (c[None, :] < tokens))


@triton.jit
def log_softmax_kernel(
    logits,  # [R, V], written over
    tokens,
    BLOCK: tl.constexpr,
):
    row = logits + tl.program_id(0).to(tl.int64) * tokens
    # Tiles are [1, BLOCK] from the load on: one that becomes so later may be laid out whole in every thread.
    columns = tl.arange(0, BLOCK)[None, :]
    top = tl.full([1], float("-inf"), tl.float32)
    total, spread = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    for start in range(0, tokens, BLOCK):
        c = start + columns
        tile = tl.load(row + c, mask=c < tokens, other=float("-inf"))
        top, total, spread = with_tile(tile, top, total, spread, False)
    for start in range(0, tokens, BLOCK):
        c = start + columns
        tile = tl.load(row + c, mask=c < tokens, other=0.0)
        tl.store(row + c, tile - top[:, None] - tl.log(total)[:, None], mask=c < tokens)


def usual_softmax_launch(dtype: torch.dtype, tokens: int) -> Launch:
    """Without a measured one: the tokens of a row that are normalised at once, whatever its length."""
    return {"BLOCK": 4096, "num_warps": 8}


def vocab_rows(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    product = Product.of("vocab_rows", hidden, vocabulary, bias, temperature)
    out = torch.empty(product.rows, product.tokens, dtype=torch.float32, device=hidden.device)
    if product.rows:
        with on_device_of(hidden):
            vocab_rows_kernel[product.grid[0], product.tile_columns](out, *product.arguments(), **product.tiles)
            tiles = launch("log_softmax", out.device, usual_softmax_launch, out.dtype, product.tokens)
            log_softmax_kernel[(product.rows,)](out, product.tokens, **tiles)
    return out
