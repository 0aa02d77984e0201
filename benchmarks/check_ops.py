"""Every op by every backend that serves it here, in small shapes: right, and the same bits every time.

    python benchmarks/from_checkout.py benchmarks/check_ops.py --repeats 20
    compute-sanitizer --tool racecheck python benchmarks/from_checkout.py benchmarks/check_ops.py --alone

``make gpu-test`` runs the first, ``make gpu-sanitize`` the second with each tool. ``--alone`` computes nothing but what
is checked: no reference, and inputs drawn on the host, so that a sanitizer, under which all takes a hundred times as
long, watches our kernels. Exit status: 0 all is well, 1 something is wrong or fails, or a backend that was named serves
nothing, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import bench_ops
import op_table
import torch
from torch import Tensor

from mlmfast import backends
from mlmfast.bench.pll import check_device
from mlmfast.bench.timing import full_float32, synchronize
from mlmfast.errors import RequestError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Heads of 64, blocks that are not full, a vocabulary that no tile divides, a row of queries and more than one block.
SIZES = op_table.Sizes(
    width=192, heads=3, wide=256, vocabulary=1031, span=96, buckets=32, rows=129, top_k=3, few=(1, 17, 31)
)
LENGTHS = (1, 63, 129)
USUAL = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def cases() -> Iterator[op_table.OpCase]:
    yield from op_table.cases(SIZES, LENGTHS)
    yield from op_table.few_rows(SIZES)


def arguments_of(case: op_table.OpCase, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """The same on every device."""
    drawn = case.make(op_table.Draw(dtype, "cpu", seed=0))
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in drawn)


def differing(case: op_table.OpCase, arguments: tuple[Any, ...], backend: str, repeats: int) -> int:
    """How many of so many further calls do not give the first one's bits."""
    first = bench_ops.outputs(case, arguments, backend)
    found = 0
    for _ in range(repeats):
        again = bench_ops.outputs(case, arguments, backend)
        found += not all(torch.equal(a, b) for a, b in zip(first, again))
    return found


def fault(case: op_table.OpCase, arguments: tuple[Any, ...], backend: str, its: argparse.Namespace) -> str | None:
    """What is wrong with an op in a case; None if nothing is."""
    try:
        if not its.alone:
            verdict = bench_ops.judged(case, arguments, backend)
            if not verdict.holds:
                return f"off by {verdict.error:.3g}, allowed {verdict.bound:.3g}"
        if others := differing(case, arguments, backend, its.repeats):
            return f"{others} of {its.repeats} repeats give other bits"
        synchronize(its.device)
    except Exception as error:  # whatever it is, the others are still to be checked
        return " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return None


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [part.strip() for part in text.split(",") if part.strip()]  # noqa: E731
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", type=words, help="cuda,triton on a GPU, cpu on a CPU; those that serve here")
    parser.add_argument("--dtypes", type=words, default=list(DTYPES), help="commas between")
    parser.add_argument("--ops", type=words, default=list(backends.OPS), help="commas between")
    parser.add_argument("--repeats", type=int, default=0, help="further calls whose bits are compared")
    parser.add_argument("--alone", action="store_true", help="only what is checked, for a sanitizer")
    found = parser.parse_args(arguments)
    found.named = found.backends is not None
    found.backends = found.backends or list(USUAL[torch.device(found.device).type])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    its = parsed(arguments)
    try:
        check_device(its.device)
        known_backends = [backend.name for backend in backends.BACKENDS]
        for what, asked, known in (
            ("dtype", its.dtypes, DTYPES),
            ("backend", its.backends, known_backends),
            ("op", its.ops, backends.OPS),
        ):
            if unknown := [name for name in asked if name not in known]:
                raise RequestError(f"{what} {unknown[0]!r} is not known; choose from {', '.join(known)}")
    except RequestError as error:
        print(f"check_ops.py: {error}", file=sys.stderr)
        return 2
    counts: dict[str, int] = dict.fromkeys(its.backends, 0)
    faults = 0
    with full_float32(), torch.inference_mode():
        for case in (case for case in cases() if case.op in its.ops):
            for name in its.dtypes:
                arguments = arguments_of(case, DTYPES[name], its.device)
                for backend in its.backends:
                    if bench_ops.untaken(case, arguments, backend):
                        continue
                    counts[backend] += 1
                    if problem := fault(case, arguments, backend, its):
                        faults += 1
                        print(f"{backend} {case.op}, {case.name}, {name}: {problem}", flush=True)
    for backend, count in counts.items():
        print(f"{backend}: {count} cases" if count else f"{backend} serves none of these ops here")
    print(f"{faults} faults" if faults else "no faults")
    served = (all if its.named else any)(counts.values())
    return 1 if faults or not served else 0


if __name__ == "__main__":
    sys.exit(main())
