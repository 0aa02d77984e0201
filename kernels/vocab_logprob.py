"""``vocab_logprob`` in Triton: sums and the targets' logits from one product; ranks from the same product once more."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.rows import on_device_of
from mlmfast.kernels.vocab_tiles import PARTS, Product, log_partition, logits_tile, with_tile


@triton.jit(do_not_specialize=["rows", "columns"])
def vocab_logprob_kernel(
    greatest,  # [R, PARTS]
    total,  # [R, PARTS]
    spread,  # [R, PARTS] or None
    targets,  # int64 [N], by row
    starts,  # int64 [R + 1], where each row's targets begin
    found,  # [N], the targets' logits
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
    ENTROPIES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    part = tl.program_id(1)
    here = r < rows
    begin = tl.load(starts + r, mask=here, other=0)
    count = tl.load(starts + r + 1, mask=here, other=0) - begin
    most = tl.max(count)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    spreads = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(part * columns, (part + 1) * columns):
        if tile * BLOCK_N < tokens:
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
            top, sums, spreads = with_tile(logits, top, sums, spreads, ENTROPIES)
            for i in range(most):
                target = tl.load(targets + begin + i, mask=here & (i < count), other=-1)
                mine = (target >= tile * BLOCK_N) & (target < tl.minimum((tile + 1) * BLOCK_N, tokens))
                if tl.max(mine.to(tl.int32)) > 0:
                    logit = tl.sum(
                        tl.where(target[:, None] - tile * BLOCK_N == tl.arange(0, BLOCK_N)[None, :], logits, 0.0), 1
                    )
                    tl.store(found + begin + i, logit, mask=mine)
    tl.store(greatest + r * PARTS + part, top, mask=here)
    tl.store(total + r * PARTS + part, sums, mask=here)
    if ENTROPIES:
        tl.store(spread + r * PARTS + part, spreads, mask=here)


@triton.jit(do_not_specialize=["rows", "columns"])
def vocab_ranks_kernel(
    found,  # [N], the targets' logits, by row
    starts,  # int64 [R + 1]
    places,  # int64 [N], added to
    hidden,
    vocabulary,
    bias,
    rows,
    tokens,
    width,
    hidden_row,
    vocabulary_row,
    inverse_temperature,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Counts the tokens above each target: the same tiles as before, so a target equals itself to the last bit."""
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    part = tl.program_id(1)
    here = r < rows
    begin = tl.load(starts + r, mask=here, other=0)
    count = tl.load(starts + r + 1, mask=here, other=0) - begin
    most = tl.max(count)
    for tile in range(part * columns, (part + 1) * columns):
        if tile * BLOCK_N < tokens:
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
            for i in range(most):
                asked = here & (i < count)
                bar = tl.load(found + begin + i, mask=asked, other=float("inf"))
                above = tl.sum((logits > bar[:, None]).to(tl.int32), 1)
                # Whole numbers: their sum does not depend on the order.
                tl.atomic_add(places + begin + i, above.to(tl.int64), mask=asked & (above > 0))


def vocab_logprob(
    hidden: Tensor,
    vocabulary: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    temperature: float = 1.0,
    ranks: bool = False,
    entropies: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    device = hidden.device
    nothing = torch.empty(0, dtype=torch.float32, device=device)
    if len(hidden) == 0 or (len(targets) == 0 and not entropies):
        return nothing, torch.empty(0, dtype=torch.int64, device=device), nothing.clone()
    product = Product.of("vocab_logprob", hidden, vocabulary, bias, temperature)
    # Targets by row, so that a program finds those of its rows without a search.
    by_row, order = torch.sort(target_rows, stable=True)
    starts = torch.searchsorted(by_row, torch.arange(product.rows + 1, device=device))
    # A target that is no token is found in no tile, and must not pass for a number.
    found = torch.full((len(targets),), torch.nan, dtype=torch.float32, device=device)
    greatest, total, *rest = product.empty_parts(3 if entropies else 2)
    spread = rest[0] if entropies else None
    columns = triton.cdiv(product.tile_columns, PARTS)
    with on_device_of(hidden):
        vocab_logprob_kernel[product.grid](
            greatest,
            total,
            spread,
            targets[order],
            starts,
            found,
            *product.arguments(),
            columns,
            ENTROPIES=entropies,
            PARTS=PARTS,
            **product.tiles,
        )
    peak, log_total, entropy = log_partition(greatest, total, spread)
    logprobs = torch.empty_like(found)
    logprobs[order] = found - peak[by_row] - log_total[by_row]
    places = torch.ones(len(targets) if ranks else 0, dtype=torch.int64, device=device)
    if ranks and len(targets):
        counted = torch.ones_like(places)
        with on_device_of(hidden):
            vocab_ranks_kernel[product.grid](found, starts, counted, *product.arguments(), columns, **product.tiles)
        places[order] = counted
    return logprobs, places, nothing if entropy is None else entropy
