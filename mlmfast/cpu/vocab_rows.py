"""``vocab_rows`` in tiles: oneDNN's products and csrc/cpu/vocab_tile.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cpu.vocab_tiles import new_sums, tiles


def vocab_rows(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    rows = torch.empty(len(hidden), len(vocabulary), dtype=torch.float32)
    sums = new_sums(len(hidden))
    for tile in tiles(hidden, vocabulary, bias):
        here = rows[:, tile.first : tile.first + tile.logits.shape[1]]
        torch.ops.mlmfast_cpu.vocab_sums(tile.logits, tile.bias, temperature, False, sums, here)
    # In two steps: the greatest logit is a float32 and leaves without rounding, however large it is.
    return rows.sub_(sums[:, :1].float()).sub_(sums[:, 1:2].log().float())
