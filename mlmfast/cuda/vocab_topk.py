"""``vocab_topk`` in CUDA for few rows and few tokens: csrc/cuda/vocab_topk.cu reads the vocabulary once."""

from __future__ import annotations

import torch
from torch import Tensor

from mlmfast.cuda.rows import FEW_ROWS, alike, on_pieces
from mlmfast.kernels.vocab_topk import vocab_topk as triton_vocab_topk

# The best of a row have a lane of a warp each.
MOST = 32
# What else than op and dtype decides, for doctor.
LIMITS = f"the best {MOST} of up to {FEW_ROWS} rows on 16-byte bounds, a multiple of 8 wide; others go to triton"


def vocab_topk(
    hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    if not fits(hidden, vocabulary, bias, k):
        return triton_vocab_topk(hidden, vocabulary, bias, k, temperature)
    return torch.ops.mlmfast_cuda.vocab_topk(hidden, vocabulary, bias, k, temperature)


def fits(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int) -> bool:
    """Whether the kernels take these."""
    return (
        0 < len(hidden) <= FEW_ROWS
        and 0 < k <= min(MOST, len(vocabulary))
        and hidden.shape[1] == vocabulary.shape[1]
        and alike(hidden, vocabulary, bias)
        and on_pieces(hidden)
        and on_pieces(vocabulary)
    )
