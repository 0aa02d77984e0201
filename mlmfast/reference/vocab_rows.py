"""Reference of ``vocab_rows``, and the chunks that the other vocabulary ops go through it in."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from mlmfast.reference import accumulation

# Most logits held at once: 16 Mi, 64 MiB in float32.
LOGITS = 1 << 24


def vocab_rows(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    logits = F.linear(hidden, vocabulary).to(accumulation(hidden.dtype))
    if bias is not None:
        logits += bias
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(1)


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover ``rows``, each small enough that its logits may be held."""
    step = max(1, LOGITS // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
