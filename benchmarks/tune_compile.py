"""Candidates compiled side by side into Triton's cache on disk, before a GPU is asked to run one.

A process compiles what a launch would: the op is called on tensors without data and its launches are recorded
(``resources.py``). What spills registers or wants more shared memory than there is cannot win, and is never run. The
GPU's process then finds the rest compiled.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.pool import AsyncResult

import resources
import torch
from tune_cases import Case

from mlmfast.kernels import launches
from mlmfast.kernels.launches import Launch

META = torch.device("meta")


def fault(case: Case, tiles: Launch, capability: int) -> str | None:
    """Compiles a candidate for GPUs of this capability; None, or what speaks against ever running it."""
    try:
        with launches.trying(case.kernel, META, case.name, tiles), resources.recording() as recorded:
            case.op(*case.given(META))
        dtype = str(case.dtype).removeprefix("torch.")
        taken = [resources.resources(case.kernel, case.name, dtype, each, capability) for each in recorded]
    except Exception as problem:  # Triton's compiler gives up in many ways: the others are still to be tried
        return type(problem).__name__
    return "; ".join(fault for each in taken for fault in each.faults) or None


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
                found.append("not compiled in time")
        return found[1:]
