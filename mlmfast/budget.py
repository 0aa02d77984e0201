"""How many packed rows are computed at once, unless the user says."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch

from mlmfast.architectures.spec import EncoderSpec, Layer

if TYPE_CHECKING:
    from mlmfast.generic import Spec

# On a CPU, by the bytes of a number: more are slower. A base model's widest intermediate then passes 32 MiB, and what
# is larger than that glibc hands back to the system and faults in anew each time.
CPU_ROWS = {2: 4096, 4: 2048}
USUAL_ROWS = 2048
# And by the bytes of a pass, which only the logits of a generic model's large vocabulary come to.
CPU_BYTES = 1 << 30
# On a GPU: as memory allows, between what keeps it busy and what still gains from company.
LEAST_ROWS = 1024
MOST_ROWS = 65536
# The part of free memory that a batch is planned to fill. The rest is for what is not counted by rows: the allocator's
# unused pieces, cuBLAS's workspace, the vocabulary's tiles, captured passes, and other processes that grow.
SHARE = 0.5
# Bytes of DeBERTa's position terms, which backends work through some heads at a time.
POSITION_TERMS = 256 << 20
# glibc's M_MMAP_THRESHOLD, and the bytes from which a piece of memory is the system's own once memory is short.
MMAP_THRESHOLD = -3
OWN_PIECE = 1 << 20
# Bytes of a row's int64 numbers: ids, places, bounds and masks, a handful of each at a time.
ROW_NUMBERS = 128


def usual_batch_tokens(spec: Spec, device: torch.device) -> int:
    """Rows of a batch for a model on a device, as much memory as it has free now."""
    itemsize = spec.dtype.itemsize
    if device.type == "cpu":
        return min(CPU_ROWS.get(itemsize, USUAL_ROWS), max(1, CPU_BYTES // row_bytes(spec)))
    if device.type != "cuda":
        return USUAL_ROWS
    disentangled = isinstance(spec, EncoderSpec) and spec.buckets is not None
    room = free_memory(device) * SHARE - (POSITION_TERMS if disentangled else 0)
    rows = int(room / row_bytes(spec))
    return min(MOST_ROWS, max(LEAST_ROWS, rows // LEAST_ROWS * LEAST_ROWS))


def row_bytes(spec: Spec) -> int:
    """Most bytes that a packed row holds at any time in the pass."""
    width = max(map(_layer_width, spec.layers)) if isinstance(spec, EncoderSpec) else spec.width
    return width * spec.dtype.itemsize + ROW_NUMBERS


def _layer_width(layer: Layer) -> int:
    """Numbers a row at the end of a layer, whose queries, keys and values are held till then."""
    hidden, inner = layer.output.weight.shape  # inner: all heads together
    # The layer's input, what attention added to it, the feed-forward's product and the sum; queries, keys, values and
    # what attention made of them; the feed-forward's inside.
    width = 4 * hidden + 4 * inner + layer.up.weight.shape[0]
    if layer.rotary is not None:  # queries and keys once more, turned
        width += 2 * inner
    if layer.convolution is not None:  # the input once more with a row of zeros, and its taps side by side
        width += hidden + layer.convolution.linear.weight.shape[1]
    return width


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that nobody uses: those that the driver has, and those that torch holds without use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an allocator gave up: torch has a class for it on accelerators, and only messages on the CPU."""
    messages = (
        "can't allocate memory",  # Linux and macOS
        "not enough memory",  # Windows
        "could not create a primitive",  # oneDNN, which has no memory for the code that it makes for a product
        "bad_alloc",  # C++
        "aten::new_empty",  # our compiled extensions: LibTorch's stable ABI names what failed, and not why
        "out of memory",  # CUDA's driver, asked for pinned memory, a graph or a kernel of Triton's
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        message in str(error) for message in messages
    )


def make_room(device: torch.device) -> None:
    """Lets what is freed go back to the system; for a process that has run out of memory.

    On CUDA what torch holds without use is handed back, once: the driver needs it for kernels that are yet to be
    loaded. On the CPU what is freed goes back from now on. glibc keeps freed pieces of up to
    32 MiB for itself once it has seen such, in a heap that small ones break up: where memory is limited no batch would
    fit any more, however small, and nothing else that takes memory on its own, such as oneDNN's code. It costs faulting
    in each large tensor anew. Elsewhere than under glibc nothing is changed.
    """
    if device.type == "cpu":
        _return_freed()
    elif device.type == "cuda":
        torch.cuda.empty_cache()


@cache
def _return_freed() -> None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, OWN_PIECE)
        libc.malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another libc; Windows, which has no library of None
        return
