"""``vocab_topk`` in tiles: oneDNN's products and csrc/cpu/vocab_topk.cpp. Among equals the lowest ids come first."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.vocab_tiles import log_partition, new_sums, row_chunks, tiles


def vocab_topk(
    hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    if not 0 <= k <= len(vocabulary):
        raise ValueError(f"vocab_topk: k must be in [0, {len(vocabulary)}], the size of the vocabulary; got {k}")
    sums = new_sums(len(hidden))
    best = torch.empty(len(hidden), k, dtype=torch.float32)
    ids = torch.empty(len(hidden), k, dtype=torch.int64)
    for rows in row_chunks(len(hidden)):
        for tile in tiles(hidden[rows], vocabulary, bias):
            torch.ops.mlmfast_cpu.vocab_sums(tile.logits, tile.bias, temperature, False, sums[rows])
            last = tile.first + tile.logits.shape[1] == len(vocabulary)
            torch.ops.mlmfast_cpu.vocab_best(
                tile.logits, tile.bias, temperature, tile.first, last, best[rows], ids[rows]
            )
    return (best.double() - log_partition(sums)[:, None]).float(), ids
