"""Everything measured on a GPU, by one command that needs torch, Triton and transformers, and no network.

    make gpu-bench PYTHON=python3

Correctness first: every op against float64. Then passes against peers and the ops one by one, what matters most first,
until the budget is spent; what was left out is listed, and can be asked for by name in a run of its own (``--shapes
roberta-large --name gpu_large``, say). ``RESULTS/<device>/NAME.json`` is written anew after every step,
so that whatever ends the run leaves what it had; the table and the figure come last. Exit status: 0 all rows agree, 1
some disagree or failed, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bench_ops
import figure
import op_table
import torch

from mlmfast import backends
from mlmfast.bench import machine, peers
from mlmfast.bench.pll import DTYPES, Bench, check_device
from mlmfast.bench.shapes import SHAPES, named
from mlmfast.bench.timing import full_float32
from mlmfast.bench.work import COPY_BYTES, Peak, copy_bandwidth
from mlmfast.errors import RequestError

# Seconds that a repeat of a side may take: the copies of a case are cut until it does.
MOST_SECONDS = 0.5
# Rows of a case's copies together before that.
COPY_TOKENS = 65536
SHAPE_NAMES = ("deberta-v3-base", "roberta-base", "deberta-v2-xlarge", "roberta-large", "deberta-v2-xxlarge")
# The lengths that sentences have come first. RoBERTa's table ends before the last one.
LENGTHS = (64, 128, 24, 512, 2048)
LONG = 512
PEERS = ("hf", "hf-scored", "disentangled-flash")
COMPILED = ("hf-compile",)
# Seconds that a step may take, guessed for an H200: none is begun with less left. Compiling is most of a compiled case.
SECONDS = {"base": 12.0, "large": 20.0, "xlarge": 25.0, "xxlarge": 40.0, "toy": 1.0}
COMPILING = 75.0
OP_SECONDS, CHECK_SECONDS = 3.0, 20.0


@dataclass(frozen=True)
class Case:
    """A pass to be measured: a shape, a dtype, tokens a copy, and the peers."""

    shape: str
    dtype: str
    length: int
    against: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.length} tokens, against {', '.join(self.against)}"

    @property
    def seconds(self) -> float:
        """A guess at what it takes."""
        return SECONDS[size_of(self.shape)] + (COMPILING if self.against == COMPILED else 0)


@dataclass(frozen=True)
class Step:
    """Something to run if there is time; it returns what it adds to the lists of the result."""

    name: str
    seconds: float
    run: Callable[[], dict[str, list[Any]]]


@dataclass
class Result:
    """What is written, anew after every step: by renaming, so that no reader and no kill ever meets half a file.

    Attributes:
        lists: ``checks`` and ``ops`` of :mod:`bench_ops`, ``rows`` and ``details`` as ``mlmfast bench pll`` has them,
            steps that ``failed`` with the reason, and those ``not_run``.
    """

    path: Path
    header: dict[str, Any]
    lists: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in ("checks", "rows", "details", "ops", "failed", "not_run")}
    )

    def add(self, found: dict[str, list[Any]]) -> None:
        for name, items in found.items():
            self.lists[name] += items
        self.write()

    def write(self, finished: bool = False) -> None:
        whole = finite({"header": self.header, **self.lists, "finished": finished})
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    @property
    def agrees(self) -> bool:
        rows = self.lists["checks"] + self.lists["details"] + self.lists["ops"]
        return all(row["agrees"] for row in rows) and not self.lists["failed"]


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size_of(shape: str) -> str:
    """``"base"``, ``"xxlarge"`` and so on; ``"toy"``."""
    return next(size for size in ("toy", "xxlarge", "xlarge", "large", "base") if size in shape)


def blocks(
    shapes: Sequence[str], dtypes: Sequence[str], lengths: Sequence[int], against: Sequence[str]
) -> list[list[Case]]:
    """Every case, the most important first.

    The base shapes in the first dtype, then in the others; the larger shapes at one length; one of each base shape
    compiled, which costs more than a minute; the larger shapes' other lengths; lengths beyond 512; the rest.
    """
    base = [shape for shape in shapes if size_of(shape) in ("base", "toy")]
    larger = [shape for shape in shapes if shape not in base]
    short = [length for length in lengths if length <= LONG]
    first, others = dtypes[:1], dtypes[1:]
    plain, compiled = ([peer for peer in against if (peer in COMPILED) is kind] for kind in (False, True))
    wanted: list[tuple[Sequence[str], Sequence[str], Sequence[int], Sequence[str]]] = [
        (base, first, short, plain),
        (base, others, short, plain),
        (larger, first, short[:1], plain),
        (base, first, short[:1], compiled),
        (larger, first, short[1:], plain),
        (larger, others, short[:1], plain),
        (shapes, dtypes, [length for length in lengths if length > LONG], plain),
        (base, first, short[1:], compiled),
        (base, others, short[:1], compiled),
        (larger, others, short[1:], plain),
    ]
    return [
        [
            Case(shape, dtype, length, serving(shape, peers_here))
            for dtype in kinds
            for shape in some
            for length in sizes
            if length <= named(shape).held and serving(shape, peers_here)
        ]
        for some, kinds, sizes, peers_here in wanted
    ]


def serving(shape: str, against: Sequence[str]) -> tuple[str, ...]:
    """The peers that know a shape's family."""
    deberta = SHAPES[shape].config_class.model_type == "deberta-v2"
    return tuple(peer for peer in against if deberta or peer != "disentangled-flash")


def even(copies: int) -> int:
    """So many or a few less, so that batches of any power of two up to 512 divide them: a compiled peer is compiled for
    each size of a batch."""
    return copies // 512 * 512 if copies >= 512 else 1 << (copies.bit_length() - 1)


def capped(bench: Bench, length: int, labels: Sequence[str], copy_tokens: int, most_seconds: float) -> int:
    """How many copies to measure: ``copy_tokens`` rows, fewer where a side would take longer than ``most_seconds``."""
    copies = even(max(1, copy_tokens // length))
    # A sixteenth first: where a side is far too slow, all of them would take many seconds.
    probe = max(1, copies // 16)
    expected = max(bench.tried(bench.texts(length, probe), labels).values()) * copies / probe
    if expected > most_seconds:
        copies = even(max(1, int(0.9 * copies * most_seconds / expected)))
    while copies > 1:
        slowest = max(bench.tried(bench.texts(length, copies), labels).values())
        if slowest <= most_seconds:
            break
        # A little fewer than in proportion, and never as many again.
        copies = even(max(1, min(copies - 1, int(0.9 * copies * most_seconds / slowest))))
    return copies


class Passes:
    """Runs cases, each in a bench of its own: so a GPU holds one shape's models at a time.

    Attributes:
        peaks, rates: of matrix products, by dtype; the best so far in operations a second.
    """

    def __init__(self, arguments: argparse.Namespace, products: Sequence[tuple[int, int, int]] | None) -> None:
        self._arguments = arguments
        self._copies: dict[tuple[str, str, int], int] = {}
        self.peaks = {dtype: Peak(DTYPES[dtype], products, arguments.device) for dtype in arguments.dtypes}
        self.rates: dict[str, float] = {}
        for dtype in arguments.dtypes:
            for _ in range(3):  # the first calls pay for set-up
                self.sample(dtype)

    def sample(self, dtype: str) -> float:
        """Times the products once more; returns their best rate."""
        self.rates[dtype] = self.peaks[dtype].sample()
        return self.rates[dtype]

    def run(self, case: Case) -> dict[str, list[Any]]:
        """Copies cut to what the sides take, then agreement, then times."""
        its = self._arguments
        bench = Bench(
            case.shape,
            dtype=case.dtype,
            against=case.against,
            backend=its.backend,
            device=its.device,
            keep_going=True,
        )
        # A compiled peer has as many copies as the others had before it: it compiles anew for each number.
        key = case.shape, case.dtype, case.length
        if key not in self._copies:
            labels = [label for label in bench.peers if label not in COMPILED]
            self._copies[key] = capped(bench, case.length, labels, its.copy_tokens, its.most_seconds)
        texts = bench.texts(case.length, self._copies[key])
        measured = bench.measure(texts, "random", pairs=its.rounds, peak=self.peaks[case.dtype])
        self.sample(case.dtype)
        return {"rows": [asdict(m.row) for m in measured], "details": [m.details for m in measured]}


def steps(arguments: argparse.Namespace, passes: Passes, bandwidth: float) -> Iterator[Step]:
    """All of them: checks, the first block of passes, the ops in its dtype, the other passes, the other ops."""
    sizes = op_table.TOY if arguments.toy else op_table.Sizes()
    short = [length for length in sorted(arguments.lengths) if length <= LONG]

    def ops(dtype: str) -> Iterator[Step]:
        for case in op_table.cases(sizes, short):
            run = partial(measured_op, arguments, case, dtype, passes, bandwidth)
            yield Step(f"{case.op}, {dtype}, {case.name}", OP_SECONDS, run)

    yield Step("the ops against float64", CHECK_SECONDS, partial(checked_ops, arguments))
    here = [peer for peer in arguments.peers if not missing(peer)]
    for place, block in enumerate(blocks(arguments.shapes, arguments.dtypes, arguments.lengths, here)):
        for case in block:
            yield Step(str(case), case.seconds, partial(passes.run, case))
        if place == 0:
            yield from ops(arguments.dtypes[0])
    for dtype in arguments.dtypes[1:]:
        yield from ops(dtype)


def checked_ops(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Every op in every dtype on lengths that hurt, by the backends that are measured."""
    sizes = op_table.TOY if arguments.toy else op_table.Sizes(rows=1161)
    return {
        "checks": [
            bench_ops.checked(case, DTYPES[dtype], arguments.device, backend)
            for dtype in arguments.dtypes
            for case in op_table.cases(sizes, (1, 63, 129))
            for backend in arguments.op_backends
            if backend != "reference"
        ]
    }


def measured_op(
    arguments: argparse.Namespace, case: op_table.OpCase, dtype: str, passes: Passes, bandwidth: float
) -> dict[str, list[Any]]:
    """An op's rows, beside the product rate as it is at the moment."""
    rate = passes.sample(dtype)
    sides = arguments.op_backends
    return {
        "ops": bench_ops.measure(case, DTYPES[dtype], arguments.device, sides, matrix_rate=rate, bandwidth=bandwidth)
    }


def carry_out(todo: Iterator[Step], result: Result, budget: float) -> None:
    """Runs steps while there is time for them; a step that fails is noted, and the next one runs.

    Args:
        todo: what to run, in order.
        result: takes what they find, and what was not run.
        budget: seconds.
    """
    start = time.monotonic()
    for step in todo:
        spent = time.monotonic() - start
        if spent + step.seconds > budget:
            result.add({"not_run": [step.name]})
            continue  # a shorter one may still fit
        try:
            found = step.run()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            found = {"failed": [{"step": step.name, "reason": reason}]}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        result.add(found)
        say(f"[{time.monotonic() - start:4.0f} s] {step.name}: {summed_up(found)}")


def summed_up(found: dict[str, list[Any]]) -> str:
    """A step in a line."""
    if "failed" in found:
        return f"failed: {found['failed'][0]['reason']}"
    if "checks" in found:
        wrong = [f"{c['op']} {c['dtype']} {c['case']}" for c in found["checks"] if not c["agrees"]]
        return f"{len(found['checks'])} checked, wrong or failed: {'; '.join(wrong) or 'none'}"
    if "ops" in found:
        return ", ".join(op_line(row) for row in found["ops"])
    rows = list(zip(found["rows"], found["details"]))
    told_rows = [
        f"{row['peer']} {row['ratio']:.2f}x" if row["ratio"] else f"{row['peer']} {figure.refusal(details)}"
        for row, details in rows
    ]
    return f"{rows[0][0]['copies']} copies, {', '.join(told_rows)}"


def op_line(row: dict[str, Any]) -> str:
    """An op's time by one backend, and the nearer of its two bounds."""
    if "seconds" not in row:
        return f"{row['backend']} {figure.refusal(row)}"
    products, copies = row["of_matrix_rate"], row["of_copy_bandwidth"]
    near = f"{products:.0%} of products" if products > copies else f"{copies:.0%} of a copy"
    return f"{row['backend']} {row['seconds'] * 1e6:.1f} us, {near}"


def say(line: str) -> None:
    """To stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def header_of(arguments: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Where, with what and how."""
    settings = {name: value for name, value in vars(arguments).items() if name != "results"}
    settings |= {"pairs": arguments.rounds, "against": [peer for peer in arguments.peers if not missing(peer)]}
    absent = {peer: f"pip install {' '.join(missing(peer))}" for peer in arguments.peers if missing(peer)}
    kind = torch.device(arguments.device).type
    services = {d: {s.op: s.backend for s in backends.report(kind, DTYPES[d])} for d in arguments.dtypes}
    found = machine.describe(arguments.device) | {"settings": settings, "peers": peers.versions(settings["against"])}
    return found | {"absent": absent, "copy_bandwidth": bandwidth, "services": services}


def missing(peer: str) -> list[str]:
    """The packages of a peer that are not here."""
    return [package for package in peers.PEERS[peer].packages if importlib.util.find_spec(package) is None]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [part.strip() for part in text.split(",") if part.strip()]  # noqa: E731
    numbers = lambda text: [int(part) for part in words(text)]  # noqa: E731
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, imports not counted")
    parser.add_argument("--shapes", type=words, default=list(SHAPE_NAMES), help="commas between")
    parser.add_argument("--lengths", type=numbers, default=list(LENGTHS), help="tokens a copy, most important first")
    parser.add_argument("--dtypes", type=words, default=["bfloat16", "float32"], help="most important first")
    parser.add_argument("--peers", type=words, default=[*PEERS, *COMPILED], help="of `mlmfast bench pll --against`")
    parser.add_argument("--backend", default="auto", help="of mlmfast's passes")
    parser.add_argument("--op-backends", type=words, help="triton,reference on a GPU, cpu,reference on a CPU")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved, of a pass")
    parser.add_argument("--copy-tokens", type=int, default=COPY_TOKENS, help="most rows of a case's copies")
    parser.add_argument("--most-seconds", type=float, default=MOST_SECONDS, help="of a repeat of a side")
    parser.add_argument("--toy", action="store_true", help="the machinery in seconds: toy shapes and small products")
    parser.add_argument("--name", default="gpu", help="of the files in the device's folder")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="holds a folder a device")
    found = parser.parse_args(arguments)
    if found.toy:
        found.shapes, found.copy_tokens = ["toy-deberta", "toy-roberta"], min(found.copy_tokens, 512)
    if found.op_backends is None:
        found.op_backends = ["triton" if found.device.startswith("cuda") else "cpu", "reference"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    its = parsed(arguments)
    try:
        check_device(its.device)
        for peer in its.peers:
            if peer not in peers.PEERS:
                raise RequestError(f"peer {peer!r} is not known; choose from {', '.join(peers.PEERS)}")
        for shape in its.shapes:
            named(shape)
        if unknown := [dtype for dtype in its.dtypes if dtype not in DTYPES]:
            raise RequestError(f"dtype {unknown[0]!r} is not measured; choose from {', '.join(DTYPES)}")
    except RequestError as error:
        say(f"gpu.py: {error}")
        return 2
    folder = its.results / machine.slug(machine.device_name(its.device))
    folder.mkdir(parents=True, exist_ok=True)
    with full_float32():
        bandwidth = copy_bandwidth(its.device, COPY_BYTES if not its.toy else 1 << 20)
        result = Result(folder / f"{its.name}.json", header_of(its, bandwidth))
        result.write()
        passes = Passes(its, ((64, 64, 64),) if its.toy else None)
        result.header["matrix_rates"] = passes.rates
        carry_out(steps(its, passes, bandwidth), result, its.budget)
    result.write(finished=True)
    for name in result.lists["not_run"]:
        say(f"not run: {name}")
    figure.write([result.path], folder / its.name)
    say(f"written: {result.path}")
    return 0 if result.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
