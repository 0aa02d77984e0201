"""The vocabulary in tiles: what ``vocab_logprob``, ``vocab_topk`` and ``vocab_rows`` share.

A tile's logits come out of one product and are used up by the extension (csrc/cpu/vocab_tile.cpp) while they are in
cache. All three ops cut at the same tokens, so that a packed vocabulary is packed once. Few rows, a decoding step's,
are multiplied by csrc/cpu/few_rows.cpp in float32: reading the vocabulary is all their time, and oneDNN's products,
which add in one chain, round more than twice as much as torch's own. In bfloat16 the products' sums are float32 but the
logits are rounded: torch offers no float32 result of a bfloat16 product on the CPU (``torch.mm(..., out_dtype=...)``
has no kernel there as of 2.13). All else is float32 and float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlmfast.cpu.products import product
from mlmfast.cpu.rows import whole_rows

TOKENS = 8192  # of a tile
ROWS = 512  # that go through the vocabulary together
FEW_ROWS = 16  # and at most so many in float32 without packed weights

# A row's sums before its first tile.
_NOTHING = torch.tensor([[-torch.inf, 0.0, 0.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Tile:
    """Logits of some rows at neighbouring tokens.

    Attributes:
        first: the first token.
        logits: ``[r, w]`` without bias, in the dtype of the hidden states.
        bias: float32 ``[w]`` or None.
    """

    first: int
    logits: Tensor
    bias: Tensor | None


def tiles(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None) -> Iterator[Tile]:
    """The logits of ``hidden [r, d]``, without bias, a tile after the other."""
    bias = None if bias is None else bias.float().contiguous()
    few = len(hidden) <= FEW_ROWS and hidden.dtype == vocabulary.dtype == torch.float32 and vocabulary.stride(1) == 1
    hidden = whole_rows(hidden) if few else hidden
    for first in range(0, len(vocabulary), TOKENS):
        tile = slice(first, first + TOKENS)
        if few:
            logits = torch.ops.mlmfast_cpu.few_rows(hidden, vocabulary[tile])
        else:
            logits = whole_rows(product(hidden, vocabulary[tile]))
        yield Tile(first, logits, None if bias is None else bias[tile])


def row_chunks(rows: int, most: int = ROWS) -> Iterator[slice]:
    """Slices that cover ``rows``, ``most`` at a time."""
    for start in range(0, rows, most):
        yield slice(start, min(start + most, rows))


def new_sums(rows: int) -> Tensor:
    """Running sums for the extension to add tiles to, float64 ``[rows, 3]``.

    Of each row: the greatest logit so far, the sum of e^(logit - greatest), that of e^(logit - greatest) * (logit -
    greatest).
    """
    return _NOTHING.repeat(rows, 1)


def log_partition(sums: Tensor) -> Tensor:
    """log of the sum of e^logit, float64 ``[rows]``."""
    return sums[:, 0] + sums[:, 1].log()


def entropy(sums: Tensor) -> Tensor:
    """In nats, float32 ``[rows]``; the sums must have been asked for it."""
    return (sums[:, 1].log() - sums[:, 2] / sums[:, 1]).float()
