"""Reference of ``vocab_topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.reference import accumulation
from mlmfast.reference.vocab_rows import row_chunks, vocab_rows


def vocab_topk(
    hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    logprobs = torch.empty(len(hidden), k, dtype=accumulation(hidden.dtype), device=hidden.device)
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    for rows in row_chunks(len(hidden), len(vocabulary)):
        logprobs[rows], ids[rows] = vocab_rows(hidden[rows], vocabulary, bias, temperature).topk(k)
    return logprobs, ids
