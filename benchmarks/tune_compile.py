"""Candidates compiled side by side into Triton's cache on disk, before a GPU is asked to run one.

A process compiles what a launch would: the op is called on tensors without data, and its launches end with Triton's
compiler. What spills many registers or wants more shared memory than there is cannot win, and is never run.
The GPU's process then finds the rest compiled.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import AsyncResult
from typing import Any

import resources
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from tune_cases import Case

from mlmfast.kernels import launches
from mlmfast.kernels.launches import Launch

META = torch.device("meta")
# Bytes of stack up to which a candidate is still run: a few numbers may wait there while a loop runs, at no cost.
SPILLED = 32
# Why a candidate was not tried that may be, another time.
NOT_IN_TIME = "not compiled in time"


class Target:
    """Of Triton's driver what compiling asks for: a GPU of some capability that need not be there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Within the block launches are compiled, not made, and are in the list. All else is as at run time: the key in
    Triton's cache is made of what a call gives, in the order that the call's own code puts it."""
    built: list[Any] = []
    run = JITFunction.run

    def compile_it(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        built.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_it
    triton.runtime.driver.set_active(Target(capability))
    try:
        yield built
    finally:
        JITFunction.run = run


def fault(case: Case, tiles: Launch, capability: int) -> str | None:
    """Compiles a candidate for GPUs of this capability; None, or what speaks against ever running it.

    The process can run no kernel from then on: Triton's driver is that of :class:`Target`.
    """
    try:
        with launches.trying(case.kernel, META, case.name, tiles), compiling(capability) as built:
            case.op(*case.given(META))
        for kernel in {id(each): each for each in built}.values():
            _, stack = resources.registers_and_stack(kernel.asm["cubin"])
            few = 0 if stack <= SPILLED else stack
            if faults := list(resources.too_much(few, kernel.metadata.shared, capability)):
                return "; ".join(faults)
    except Exception as problem:  # Triton's compiler gives up in many ways: the others are still to be tried
        return f"{type(problem).__name__}: {problem}"[:200]
    return None


_cases: Sequence[Case] = ()


def _begin(cases: Sequence[Case]) -> None:
    global _cases
    _cases = cases
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's, which ends its workers


def _work(place: int, tiles: Launch, capability: int) -> str | None:
    return fault(_cases[place], tiles, capability)


class Compiler:
    """Workers that compile the cases' candidates in order; use it as a context, which ends them.

    To be made before CUDA is touched: workers are forks of this process, since a fresh one would not know where
    ``mlmfast.kernels`` is, and they know the cases from it.
    """

    def __init__(self, cases: Sequence[Case], jobs: int) -> None:
        self._places = {id(case): place for place, case in enumerate(cases)}
        self._pool = multiprocessing.get_context("fork").Pool(jobs, _begin, (cases,))
        self._asked: dict[tuple[int, int], AsyncResult[str | None]] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def ask(self, cases: Sequence[Case], capability: int) -> None:
        """Begins with these cases, the rule's own launch of each among them."""
        for case in cases:
            place = self._places[id(case)]
            for number, tiles in enumerate((case.usual, *case.candidates)):
                self._asked[place, number] = self._pool.apply_async(_work, (place, tiles, capability))

    def faults(self, case: Case, end: float) -> list[str | None]:
        """Of each candidate of a case that was asked for what speaks against it; waits until the monotonic ``end``."""
        place = self._places[id(case)]
        found: list[str | None] = []
        for number in range(len(case.candidates) + 1):
            try:
                found.append(self._asked.pop((place, number)).get(max(0.0, end - time.monotonic())))
            except multiprocessing.TimeoutError:
                found.append(NOT_IN_TIME)
        return found[1:]
