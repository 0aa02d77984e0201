"""What the vocabulary ops share: logits a tile at a time, and the sums over them that a log-softmax needs.

A program holds some rows of hidden states and goes through one of :data:`PARTS` parts of the vocabulary; it leaves each
row's greatest logit there and the sums relative to it. A second kernel adds up the parts in their order. So nothing is
locked, nothing is added atomically, and the same input gives the same result. (QuACK's cross-entropy has this shape.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlmfast.kernels.launches import COMPILED, Launch, launch
from mlmfast.kernels.products import product
from mlmfast.kernels.rows import on_device_of, whole

# Parts that a vocabulary is cut into, always: a row's sums then do not depend on how many rows there are.
PARTS = 64


@triton.jit
def logits_tile(
    hidden,  # [R, d]
    vocabulary,  # [V, d]
    bias,  # [V] or None
    row,  # the tile's first row of hidden
    token,  # its first row of the vocabulary
    rows,  # R
    tokens,  # V
    width,  # d
    hidden_row,
    vocabulary_row,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 ``[M, N]``, -inf where there is no such token."""
    i, j, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    here, there = row + i < rows, token + j < tokens
    # Offsets within a tile fit 32 bits; where it begins may not.
    left = hidden + tl.cast(row, tl.int64) * hidden_row
    right = vocabulary + tl.cast(token, tl.int64) * vocabulary_row
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        inside = start + d < width
        a = tl.load(
            left + start + (i[:, None] * hidden_row + d[None, :]), mask=here[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(
            right + start + (j[None, :] * vocabulary_row + d[:, None]), mask=there[None, :] & inside[:, None], other=0.0
        )
        logits = product(a, b, logits)
    if bias is not None:
        logits += tl.load(bias + token + j, mask=there, other=0.0).to(tl.float32)[None, :]
    return tl.where(there[None, :], logits * inverse_temperature, float("-inf"))


@triton.jit
def with_tile(logits, greatest, total, spread, ENTROPIES: tl.constexpr):
    """A row's greatest logit ``[M]``, its sum of exp(x - greatest), its sum of (x - greatest) times that, a tile on."""
    highest = tl.maximum(greatest, tl.max(logits, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # where nothing is there yet
    above = logits - base[:, None]
    weights = tl.exp(above)
    down = tl.where(greatest == float("-inf"), 0.0, greatest - base)
    fade = tl.where(greatest == float("-inf"), 0.0, tl.exp(down))
    if ENTROPIES:  # a token of probability 0 adds nothing, where 0 * -inf would be NaN
        spread = fade * (spread + down * total) + tl.sum(tl.where(weights > 0, above, 0.0) * weights, 1)
    return highest, total * fade + tl.sum(weights, 1), spread


@triton.jit(do_not_specialize=["rows"])
def log_partition_kernel(
    greatest,  # [R, PARTS]
    total,  # [R, PARTS]
    spread,  # [R, PARTS] or None
    peak,  # [R]
    log_total,  # [R]
    entropy,  # [R] or None
    rows,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    here = r < rows
    parts = r[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    tops = tl.load(greatest + parts, mask=here[:, None], other=0.0)
    sums = tl.load(total + parts, mask=here[:, None], other=1.0)
    highest = tl.max(tops, 1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    down = tl.where(tops == float("-inf"), 0.0, tops - base[:, None])
    fade = tl.where(tops == float("-inf"), 0.0, tl.exp(down))
    whole = tl.sum(sums * fade, 1)
    tl.store(peak + r, highest, mask=here)
    tl.store(log_total + r, tl.log(whole), mask=here)
    if spread is not None:
        spreads = tl.load(spread + parts, mask=here[:, None], other=0.0)
        tl.store(entropy + r, tl.log(whole) - tl.sum(fade * (spreads + down * sums), 1) / whole, mask=here)


def usual_launch(dtype: torch.dtype, width: int) -> Launch:
    """Without a measured one, for a vocabulary of a width that is a power of 2."""
    if dtype == torch.float32:  # of more columns at once the operands of single multiplications fill the registers
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": min(64, max(16, width)), "num_warps": 8, "num_stages": 2}


@dataclass(frozen=True)
class Product:
    """``hidden [R, d] @ vocabulary [V, d].T``, and how a kernel goes through it."""

    hidden: Tensor
    vocabulary: Tensor
    bias: Tensor | None
    temperature: float
    tiles: Launch

    @classmethod
    def of(cls, op: str, hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, temperature: float) -> Product:
        """As an op goes through it: their epilogues want different tiles."""
        tiles = launch(op, hidden.device, usual_launch, hidden.dtype, hidden.shape[1])
        return cls(whole(hidden), whole(vocabulary), whole(bias), temperature, tiles)

    @property
    def rows(self) -> int:
        return len(self.hidden)

    @property
    def tokens(self) -> int:
        return len(self.vocabulary)

    @property
    def grid(self) -> tuple[int, int]:
        """A program for some rows and a part of the vocabulary. Rows come first, so that programs that run together
        share what they read of the vocabulary, which is the larger."""
        return triton.cdiv(self.rows, self.tiles["BLOCK_M"]), PARTS

    @property
    def tile_columns(self) -> int:
        return triton.cdiv(self.tokens, self.tiles["BLOCK_N"])

    def arguments(self) -> tuple[Any, ...]:
        """What every kernel over tiles takes last."""
        sizes = (self.rows, self.tokens, self.hidden.shape[1], self.hidden.stride(0), self.vocabulary.stride(0))
        return (self.hidden, self.vocabulary, self.bias, *sizes, 1 / self.temperature)

    def empty_parts(self, count: int) -> list[Tensor]:
        """float32 ``[R, PARTS]`` each."""
        return [torch.empty(self.rows, PARTS, dtype=torch.float32, device=self.hidden.device) for _ in range(count)]


def log_partition(greatest: Tensor, total: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Adds up the parts: each row's greatest logit, the logarithm of its sum relative to that, its entropy; ``[R]``."""
    rows = len(greatest)
    peak, log_total = (torch.empty_like(greatest[:, 0]) for _ in range(2))
    entropy = None if spread is None else torch.empty_like(peak)
    with on_device_of(greatest):
        log_partition_kernel[(triton.cdiv(rows, 16),)](
            greatest, total, spread, peak, log_total, entropy, rows, BLOCK_M=16, PARTS=PARTS, num_warps=4, **COMPILED
        )
    return peak, log_total, entropy
