"""The truth: every op in plain torch, same names and signatures as in :mod:`mlmfast.ops`.

Written to be read and to be right in any dtype, float64 included. Never edited in a change that makes something faster.
"""

from __future__ import annotations

import torch


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
