"""What the kernels ask of their arguments: whole numbers of neighbours in the last dimension."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def whole(x: MaybeTensor) -> MaybeTensor:
    """``x`` itself if its last dimension is contiguous, wherever rows begin; else a copy. None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_stride(x: Tensor | None) -> int:
    """Numbers from one row to the next; 0 for None."""
    return 0 if x is None else x.stride(0)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launches within the block go to this tensor's GPU: Triton takes the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
