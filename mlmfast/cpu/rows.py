"""What the compiled ops ask of their arguments, and what is done where they have something else."""

from __future__ import annotations

from torch import Tensor


def whole_rows(x: Tensor) -> Tensor:
    """``x [T, d]`` itself if its rows are contiguous, wherever they begin; else a copy whose rows are."""
    return x if x.stride(1) == 1 else x.contiguous()


def whole_heads(x: Tensor) -> Tensor:
    """``x [T, H, D]`` itself if its heads are contiguous, wherever they begin; else a copy whose heads are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def one_dtype(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all have the dtype of ``x``: the compiled ops take nothing else."""
    return all(other is None or other.dtype == x.dtype for other in others)
