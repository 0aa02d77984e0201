"""Measures how each Triton kernel is best launched on this GPU and writes kernels/configs/<device>.json.

    python benchmarks/from_checkout.py benchmarks/tune.py --budget 300
    python benchmarks/from_checkout.py benchmarks/tune.py --kernels vocab_logprob,vocab_topk --dtypes bfloat16
    python benchmarks/from_checkout.py benchmarks/tune.py --compile-only 90 --kernels band       # no GPU needed
    TRITON_INTERPRET=1 python benchmarks/from_checkout.py benchmarks/tune.py --toy               # nor here

A case is a dtype and a kernel's sizes (``tune_cases.py``). All candidates are compiled first, on all cores and in the
order of the cases (``tune_compile.py``); those that spill or do not fit are left out. Every other one is compared with
plain torch, and left out if it disagrees. The rest are timed in turns by replaying a CUDA graph, medians are compared,
and a candidate must beat the kernel's own rule by :data:`WORTH` to be written.

Both files are replaced whole after each case, so an interrupt loses only the case that it falls into: the
configurations, and ``RESULTS/<device>/tuning.json`` with what was measured, losses too. A case that stands there with
the same Triton and the same text of the kernels is not measured again unless ``--again`` is given. Exit status: 0, 1 a
rule's own launch failed or is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import tune_cases
from torch import Tensor
from tune_cases import Case
from tune_compile import NOT_IN_TIME, Compiler

from mlmfast.bench import machine
from mlmfast.kernels import launches
from mlmfast.kernels.launches import Launch

ROOT = Path(__file__).resolve().parent.parent
# How many times as fast as the rule a candidate must be: less is noise.
WORTH = 1.03
ROUNDS = 15
TOY_ROUNDS = 2
# After this many rounds, those that take more than so many times as long as the best are timed no longer.
SIFTED, HOPELESS = 3, 1.2
# Calls in a graph, as long as they take: a launch is then a small part of what is timed.
CALLS, MILLISECONDS = 10, 5.0
# Most seconds that a case waits for its candidates to be compiled.
PATIENCE = 60.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class RuleError(Exception):
    """A rule's own launch fails or disagrees with plain torch: there is nothing to compare with."""


@dataclass(frozen=True)
class Tuned:
    """What was measured of a case; milliseconds a call."""

    best: Launch | None  # None for the kernel's own rule
    gain: float  # how many times as fast as the rule; 1 for the rule itself
    rule: float
    tried: list[tuple[Launch, float]]  # fastest first
    left_out: list[tuple[Launch, str]]
    seconds: float  # that tuning took


# ---- one case


# Calls -> a function that says how many milliseconds one of them takes, by its number, each time it is asked.
Timer = Callable[[Sequence[Callable[[], Any]]], Callable[[int], float]]


def tuned(
    case: Case, device: torch.device, timer: Timer, faults: Sequence[str | None] = (), rounds: int = ROUNDS
) -> Tuned:
    """Times a case's candidates against its rule.

    Args:
        faults: of each candidate why it is not even run, or None; empty for none.

    Raises:
        RuleError: the rule's own launch fails or is wrong.
    """
    begun = time.monotonic()
    given = case.given(device)
    narrow = any(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in given)
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
    right, plain = first(case.plain(*wide)), first(case.plain(*given))
    del wide
    allowed = 2 * distance(plain, right) + (1e-3 if narrow else 1e-6)  # as the op tests have it

    def launched(tiles: Launch) -> Any:
        with launches.trying(case.kernel, device, case.name, tiles):
            return case.op(*given)

    def fault(tiles: Launch) -> str | None:
        try:
            error = distance(first(launched(tiles)), right)
        except Exception as problem:  # too large, or Triton's compiler gives up: the others are still to be tried
            return f"{type(problem).__name__}: {problem}"[:200]
        return None if error <= allowed else f"off by {error:.3g}, allowed {allowed:.3g}"  # also NaN

    if problem := fault(case.usual):
        raise RuleError(f"{case.kernel} {case.name}: the rule's own launch: {problem}")
    sides, left_out = [case.usual], []
    for tiles, known in zip(case.candidates, faults or [None] * len(case.candidates)):
        if tiles == case.usual:
            continue
        problem = known or fault(tiles)
        if problem is None:
            sides.append(tiles)
        else:
            left_out.append((tiles, problem))
    medians = in_turns(len(sides), timer([partial(launched, tiles) for tiles in sides]), rounds)
    order = sorted(range(len(sides)), key=medians.__getitem__)
    gain = medians[0] / medians[order[0]]
    best = sides[order[0]] if gain >= WORTH else None
    tried = [(sides[side], medians[side]) for side in order if side]
    seconds = time.monotonic() - begun
    return Tuned(best, gain if best else 1.0, medians[0], tried, left_out, seconds)


def first(found: Any) -> Tensor:
    """A tensor, or the first of several."""
    return found[0] if isinstance(found, tuple) else found


def distance(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).abs().max())


def in_turns(sides: int, milliseconds: Callable[[int], float], rounds: int) -> list[float]:
    """The median of each side, one after the other in every round; the hopeless are timed in the first rounds only."""
    times: list[list[float]] = [[] for _ in range(sides)]
    for turn in range(rounds):
        medians = [statistics.median(own) if own else 0.0 for own in times]
        for side in range(sides):
            if turn < SIFTED or side == 0 or medians[side] <= HOPELESS * min(medians):
                times[side].append(milliseconds(side))
    return [statistics.median(own) for own in times]


def cuda_timer(calls: Sequence[Callable[[], Any]]) -> Callable[[int], float]:
    """By CUDA's events around graphs of some calls each, all of as many; they have run before."""

    def between(run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    count = max(1, min(CALLS, int(MILLISECONDS / between(calls[0]))))
    graphs = []
    for call in calls:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(count):
                call()
    return lambda side: between(graphs[side].replay) / count


def host_timer(calls: Sequence[Callable[[], Any]]) -> Callable[[int], float]:
    """By the host's clock: what a rehearsal has."""

    def milliseconds(side: int) -> float:
        begun = time.perf_counter()
        calls[side]()
        return 1e3 * (time.perf_counter() - begun)

    return milliseconds


# ---- what is kept


class Record:
    """The two files: configurations as the kernels read them, and what was measured to get them."""

    def __init__(self, configs: Path, measured: Path) -> None:
        self.configs, self.measured = configs, measured
        self.chosen: dict[str, dict[str, Launch]] = read(configs)
        self.found: dict[str, dict[str, Any]] = read(measured)
        self.versions = {"triton": triton.__version__, "kernels": text_of_kernels()}

    def has(self, case: Case) -> bool:
        """Whether it was measured with this Triton and these kernels, and with all its candidates."""
        known = self.found.get(case.kernel, {}).get(case.name, {})
        late = any(reason == NOT_IN_TIME for _, reason in known.get("left_out", []))
        return known.get("versions") == self.versions and not late

    def add(self, case: Case, result: Tuned) -> None:
        """Writes both files anew, the configurations first: a case that is in neither is measured again."""
        known = self.chosen.setdefault(case.kernel, {})
        known.pop(case.name, None)
        if result.best is not None:
            known[case.name] = result.best
        write(self.configs, {kernel: cases for kernel, cases in self.chosen.items() if cases})
        entry = {"versions": self.versions, "usual": case.usual} | asdict(result)
        self.found.setdefault(case.kernel, {})[case.name] = entry
        write(self.measured, self.found)


def text_of_kernels() -> str:
    """Tells one text of all kernels from another."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, found: dict[str, Any]) -> None:
    """Replaces the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(draft, path)


# ---- the command


def words(text: str) -> list[str]:
    return text.split(",")


def request() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=words, help="only these; commas between")
    parser.add_argument("--dtypes", type=words, help="commas between; bfloat16,float32, and interpreted float32")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no case is begun")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--again", action="store_true", help="measure what was measured already, too")
    parser.add_argument("--configs", type=Path, help="folder of <device>.json; kernels/configs, where it is used")
    parser.add_argument("--results", type=Path, help="folder of <device>/tuning.json; benchmarks/results")
    parser.add_argument("--toy", action="store_true", help="rehearse in Triton's interpreter: tiny sizes, no GPU")
    parser.add_argument("--compile-only", type=int, metavar="CAPABILITY", help="what would be left out; no GPU needed")
    given = parser.parse_args()
    if given.dtypes is None:  # the interpreter's bfloat16 rounds down
        given.dtypes = ["float32"] if given.toy else ["bfloat16", "float32"]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if given.toy != interpreted:
        parser.error("--toy runs in Triton's interpreter, and nothing else does: set TRITON_INTERPRET=1 for it alone")
    if unknown := set(given.dtypes) - set(DTYPES):
        parser.error(f"--dtypes: {', '.join(sorted(unknown))} is not among {', '.join(DTYPES)}")
    known = {case.kernel for case in tune_cases.cases(torch.float32)}
    if unknown := set(given.kernels or ()) - known:
        parser.error(f"--kernels: {', '.join(sorted(unknown))} is not among {', '.join(sorted(known))}")
    # Not is_available, which may begin CUDA in a process that has yet to fork its compilers.
    if not (given.toy or given.compile_only or torch.cuda.device_count()):
        parser.error("there is no GPU to measure on; --toy and --compile-only need none")
    return given


def chosen_cases(given: argparse.Namespace) -> list[Case]:
    scale = tune_cases.TOY if given.toy else tune_cases.FULL
    every = [case for dtype in given.dtypes for case in tune_cases.cases(DTYPES[dtype], scale)]
    if given.toy:  # a few of each kind will do
        every = [replace(case, candidates=case.candidates[:: len(case.candidates) // 3 + 1]) for case in every]
    # A row's softmax is float32 whatever was asked for: the first dtype's, whose product hides least of it.
    unlike = {(case.kernel, case.name): case for case in reversed(every)}
    unlike = dict(reversed(unlike.items()))
    return [case for case in unlike.values() if not given.kernels or case.kernel in given.kernels]


def tune(cases: Sequence[Case], record: Record, device: torch.device, compiler: Compiler | None, end: float) -> int:
    """Tunes cases in order until the monotonic time ``end``; the exit status."""
    status, timer, rounds = (0, host_timer, TOY_ROUNDS) if compiler is None else (0, cuda_timer, ROUNDS)
    for place, case in enumerate(cases):
        if time.monotonic() > end:
            print(f"the budget is spent; not begun: {len(cases) - place} of {len(cases)} cases", flush=True)
            break
        faults = compiler.faults(case, min(end, time.monotonic() + PATIENCE)) if compiler else []
        try:
            result = tuned(case, device, timer, faults, rounds)
        except (RuleError, RuntimeError) as problem:  # out of memory among them; the other cases are still to be tuned
            print(f"{case.kernel} {case.name}: {problem}", file=sys.stderr, flush=True)
            status = 1
            continue
        record.add(case, result)
        print(
            f"{case.kernel} {case.name}: {result.best or 'the rule'}, {result.gain:.2f} times the rule's speed "
            f"({1e3 * result.rule:.1f} us); {len(result.tried)} timed, {len(result.left_out)} left out, "
            f"{result.seconds:.1f} s",
            flush=True,
        )
    return status


def capability(device: torch.device) -> int:
    """90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compile_only(cases: Sequence[Case], compiler: Compiler, capability: int, end: float) -> None:
    """Says of each case which candidates would be measured."""
    compiler.ask(cases, capability)
    begun, total, spared = time.monotonic(), 0, 0
    for case in cases:
        faults = compiler.faults(case, end)
        total, spared = total + len(faults), spared + sum(fault is not None for fault in faults)
        for tiles, fault in zip(case.candidates, faults):
            if fault:
                print(f"{case.kernel} {case.name} {tiles}: {fault}", flush=True)
    print(f"{total} candidates, {spared} left out, {time.monotonic() - begun:.0f} seconds")


def main() -> None:
    given = request()
    cases = chosen_cases(given)
    end = time.monotonic() + given.budget
    if given.compile_only:
        with Compiler(cases, given.jobs) as workers:
            compile_only(cases, workers, given.compile_only, end)
        return
    compiler = None if given.toy else Compiler(cases, given.jobs)  # before CUDA is touched
    device = torch.device("cpu" if given.toy else "cuda")
    name = launches.device_name(device)
    rehearsed = Path(tempfile.gettempdir()) / "mlmfast-tune-toy" if given.toy else None
    configs = given.configs or rehearsed or launches.FOLDER
    results = given.results or rehearsed or ROOT / "benchmarks" / "results"
    folder = name if given.toy else machine.slug(machine.device_name(str(device)))
    record = Record(configs / f"{name}.json", results / folder / "tuning.json")
    left = [case for case in cases if given.again or not record.has(case)]
    print(f"{len(left)} cases to tune, {len(cases) - len(left)} are in {record.measured}", flush=True)
    torch.manual_seed(0)
    try:
        if compiler is None:
            status = tune(left, record, device, None, end)
        else:
            with compiler:
                compiler.ask(left, capability(device))
                status = tune(left, record, device, compiler, end)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, and the next run goes on from there", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
