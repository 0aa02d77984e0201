"""Reference of ``vocab_logprob``."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.reference import accumulation
from mlmfast.reference.vocab_rows import row_chunks, vocab_rows


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
    dtype = accumulation(hidden.dtype)
    logprobs = torch.empty(len(targets), dtype=dtype, device=hidden.device)
    places = torch.empty(len(targets) if ranks else 0, dtype=torch.int64, device=hidden.device)
    spread = torch.empty(len(hidden) if entropies else 0, dtype=dtype, device=hidden.device)
    for rows in row_chunks(len(hidden), len(vocabulary)):
        chunk = vocab_rows(hidden[rows], vocabulary, bias, temperature)  # [r, V]
        mine = ((target_rows >= rows.start) & (target_rows < rows.stop)).nonzero()[:, 0]
        of = target_rows[mine] - rows.start
        logprobs[mine] = chunk[of, targets[mine]]
        if ranks:
            # A row at a time: several targets may share one.
            better = [(chunk[r] > p).sum() for r, p in zip(of, logprobs[mine])]
            places[mine] = torch.stack(better) + 1 if better else places[mine]
        if entropies:
            # A token of probability 0 adds nothing, where 0 * -inf would be NaN.
            spread[rows] = torch.special.entr(chunk.exp()).sum(1)
    return logprobs, places, spread
