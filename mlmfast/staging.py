"""Host tensors -> a device in one transfer, which the host does not wait for.

A batch is a dozen small arrays. Copied from pageable memory each would stop the host until the device has caught up;
laid end to end in one pinned buffer they are a single copy that is queued like a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

# Bytes that each tensor begins at a multiple of: for its dtype's sake, and because Triton compiles a kernel once more
# for pointers that are no multiple of 16.
ALIGNMENT = 64


def transferred(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on a device; to CUDA in one copy that is queued, not waited for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return laid_over(staged(tensors, device).to(device, non_blocking=True), tensors)


def staged(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Host tensors end to end, uint8 ``[bytes]``, still on the host; pinned where the device is CUDA."""
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, tensor in zip(laid_over(buffer, tensors), tensors):
        place.copy_(tensor)
    return buffer


def laid_over(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a buffer, uint8 ``[bytes]`` on any device, with the shapes and dtypes that were :func:`staged` in it."""
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(_starts(tensors), tensors)
    ]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins, in bytes, and where the last one's space ends."""
    return list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))
