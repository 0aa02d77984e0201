"""Times of several sides, taken in turns, and what holds while they are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mlmfast.errors import RequestError


def interleaved(
    sides: Sequence[Callable[[], object]],
    rounds: int,
    between: Callable[[], object] | None = None,
    device: str = "cpu",
) -> list[list[float]]:
    """Seconds of each side in each round. A round runs every side once, in turn from the front and from the back,
    so that a drift of the machine's speed falls on all of them alike; ``between`` runs before each round, untimed.

    The clock is the host's, and the device is waited for at both ends: planning, packing and launching are part of it.
    """
    times: list[list[float]] = [[] for _ in sides]
    for r in range(rounds):
        if between is not None:
            between()
        order = range(len(sides)) if r % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            times[side].append(seconds_of(sides[side], device))
    return times


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """One run on the host's clock, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits for all that a device was given; a CPU is never behind."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Quartiles and all values, in the order measured."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high, "all": list(values)}


def device_seconds(run: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds a run by the device's own clock, of ``repeats`` one after another; by the host's on a CPU."""
    if torch.device(device).type != "cuda":
        return seconds_of(lambda: [run() for _ in range(repeats)]) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats  # events count milliseconds


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block float32 products are float32 for all sides: cuDNN's convolutions use TF32 unless told not to."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """torch on so many threads within the block; None leaves them as they are."""
    if threads is not None and threads < 1:
        raise RequestError(f"threads={threads} computes nothing; 1 is the least")
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
