"""``vocab_logprob`` in tiles: oneDNN's products and csrc/cpu/vocab_logprob.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.vocab_tiles import ROWS, Tile, entropy, log_partition, new_sums, row_chunks, tiles

# Most logits held at once, where ranks need them twice: 16 Mi, 64 MiB in float32.
LOGITS = 1 << 24


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
    ops = torch.ops.mlmfast_cpu
    _check("targets", targets, len(vocabulary))
    _check("target_rows", target_rows, len(hidden))
    targets, target_rows = targets.contiguous(), target_rows.contiguous()
    sums = new_sums(len(hidden))
    found = torch.empty(len(targets), dtype=torch.float32)  # the targets' logits
    places = torch.ones(len(targets) if ranks else 0, dtype=torch.int64)
    # A rank counts the tokens above the target, whose logit may come out of the last tile: the tiles are kept.
    most = max(1, min(ROWS, LOGITS // len(vocabulary))) if ranks else ROWS
    for rows in row_chunks(len(hidden), most):
        kept: list[Tile] = []
        for tile in tiles(hidden[rows], vocabulary, bias):
            ops.vocab_sums(tile.logits, tile.bias, temperature, entropies, sums[rows])
            ops.vocab_targets(tile.logits, tile.bias, temperature, tile.first, targets, target_rows, rows.start, found)
            if ranks:
                kept.append(tile)
        for tile in kept:
            ops.vocab_ranks(tile.logits, tile.bias, temperature, target_rows, rows.start, found, places)
    logprobs = (found.double() - log_partition(sums)[target_rows]).float()
    return logprobs, places, entropy(sums) if entropies else torch.empty(0, dtype=torch.float32)


def _check(name: str, values: Tensor, bound: int) -> None:
    if len(values) == 0:
        return
    least, greatest = torch.aminmax(values)
    if least < 0 or greatest >= bound:
        raise IndexError(f"vocab_logprob: {name} must be in [0, {bound}), found {int(least)} to {int(greatest)}")
