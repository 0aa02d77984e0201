"""LayerNorm of a row that a program holds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mlmfast.kernels.launches import Launch, launch


@triton.jit
def layer_norm(row, columns, width, weight, bias, eps):
    """LayerNorm of the float32 ``row [BLOCK]``, whose numbers past ``width`` are 0; ``bias`` may be None."""
    inside = columns < width
    # Rounded as IEEE has it: the GPU's own division and root are not, and a LayerNorm follows a LayerNorm.
    count = tl.zeros((), tl.float32) + width
    centred = tl.where(inside, row - tl.div_rn(tl.sum(row), count), 0.0)
    deviation = tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred), count) + eps)
    row = centred * tl.div_rn(tl.full((), 1.0, tl.float32), deviation)
    row *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        row += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return row


def usual_row_launch(dtype: torch.dtype, width: int) -> Launch:
    """Without a measured one, for a width that is a power of 2: 8 numbers a thread."""
    return {"num_warps": min(16, max(1, width // 256))}


def row_launch(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> Launch:
    """How a program that holds a whole row is launched: its block and its warps."""
    return {"BLOCK": triton.next_power_of_2(width)} | launch(kernel, device, usual_row_launch, dtype, width)
