"""What ``gpu.py`` measures, the most important first: ops checked, passes, ranking, generation, the ops one by one."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import bench_ops
import op_table
from gpu_run import Step

from mlmfast.bench import peers
from mlmfast.bench.generate import Bench as GenerationBench
from mlmfast.bench.pll import DTYPES, Bench
from mlmfast.bench.rank import QUESTIONS, Question, RankBench
from mlmfast.bench.shapes import SHAPES, named
from mlmfast.bench.work import Peak

PARTS = ("pll", "rank", "generate", "ops")
SHAPE_NAMES = (
    "deberta-v3-base",
    "modernbert-base",
    "deberta-v2-xlarge",
    "roberta-large",
    "esm2-t33-650m",
    "deberta-v2-xxlarge",
)
# The lengths that sentences have come first. RoBERTa's table ends before the last one.
LENGTHS = (64, 128, 24, 512, 2048)
LONG = 512
PEERS = ("hf", "hf-scored", "disentangled-flash", "flashdeberta")
DEBERTA_V2_ONLY = ("disentangled-flash", "flashdeberta")
COMPILED = ("hf-compile",)
# What users have without mlmfast, candidate by candidate.
RANKING = ("hf", "hf-scored")
# Tokens of the prompts: with 64 new ones and the masks RoBERTa's table holds the longer one, too.
PROMPTS = (32, 384)
GENERATING = ("hf", "gpt2")
# Steps that the Hugging Face loop is given in a round: as many log-probabilities are checked.
PEER_TOKENS = 32
TOY_QUESTIONS = (Question(9, 3, 4, 1), Question(20, 4, 1, 1))
# Seconds that a step may take, guessed for an H200: none is begun with less left. Drawing weights, setting up, trying
# out and repeats that are cut to half a second; then more for more weights. Compiling is most of a compiled case.
LEAST_SECONDS, MILLION_SECONDS, COMPILING_LAYER = 10.0, 0.022, 6.0
OP_SECONDS, CHECK_SECONDS = 3.0, 5.0
# Most rounds of ranking and generation, whose peers launch kernel after kernel and take seconds.
ROUNDS = 5
# Millions of weights in the layers: the base shapes have fewer, the larger ones more.
BASE = 200.0


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
        layers = named(self.shape).settings["num_hidden_layers"]
        return seconds_of(self.shape) + (COMPILING_LAYER * layers if self.against == COMPILED else 0)


def millions(shape: str) -> float:
    """Weights of the layers' products, in millions."""
    sizes = named(shape).settings
    width, wide = sizes["hidden_size"], sizes["intermediate_size"]
    gated = SHAPES[shape].config_class.model_type == "modernbert"
    return float(sizes["num_hidden_layers"] * (4 * width**2 + (3 if gated else 2) * width * wide) / 1e6)


def seconds_of(shape: str) -> float:
    """A guess at what a step with this shape takes."""
    return 1.0 if shape.startswith("toy") else LEAST_SECONDS + MILLION_SECONDS * millions(shape)


def blocks(
    shapes: Sequence[str], dtypes: Sequence[str], lengths: Sequence[int], against: Sequence[str]
) -> list[list[Case]]:
    """Every case, the most important first.

    The base shapes in the first dtype; the larger shapes at one length; one of each base shape compiled, which costs
    more than a minute; the larger shapes' other lengths; the other dtypes; lengths beyond 512; the larger shapes
    compiled; the rest.
    """
    base = [shape for shape in shapes if millions(shape) < BASE]
    larger = [shape for shape in shapes if shape not in base]
    short = [length for length in lengths if length <= LONG]
    first, others = dtypes[:1], dtypes[1:]
    plain, compiled = ([peer for peer in against if (peer in COMPILED) is kind] for kind in (False, True))
    wanted: list[tuple[Sequence[str], Sequence[str], Sequence[int], Sequence[str]]] = [
        (base, first, short, plain),
        (larger, first, short[:1], plain),
        (base, first, short[:1], compiled),
        (larger, first, short[1:], plain),
        (base, others, short, plain),
        (larger, others, short[:1], plain),
        (shapes, dtypes, [length for length in lengths if length > LONG], plain),
        (larger, first, short[:1], compiled),
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
    return tuple(peer for peer in against if deberta or peer not in DEBERTA_V2_ONLY)


def missing(peer: str) -> list[str]:
    """The packages of a peer that are not here."""
    return [package for package in peers.PEERS[peer].packages if importlib.util.find_spec(package) is None]


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


class Measuring:
    """Runs cases, each in a bench of its own: so a GPU holds one shape's models at a time.

    Args:
        products: of the peaks; None for what fills the device.
        before: passes' rows and product rates of the run that is continued.

    Attributes:
        bandwidth: of a copy on the device, bytes a second.
        peaks, rates: of matrix products, by dtype; the best so far in operations a second.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        products: Sequence[tuple[int, int, int]] | None,
        bandwidth: float,
        before: tuple[Sequence[dict[str, Any]], Mapping[str, float]] = ((), {}),
    ) -> None:
        self._arguments, self.bandwidth = arguments, bandwidth
        self._copies = {(row["shape"], row["dtype"], row["length"]): row["copies"] for row in before[0]}
        self.peaks = {dtype: Peak(DTYPES[dtype], products, arguments.device) for dtype in arguments.dtypes}
        self.rates = dict(before[1])
        for dtype in arguments.dtypes:
            for _ in range(3):  # the first calls pay for set-up
                self.sample(dtype)

    def sample(self, dtype: str) -> float:
        """Times the products once more; returns their best rate."""
        self.rates[dtype] = max(self.rates.get(dtype, 0.0), self.peaks[dtype].sample())
        return self.rates[dtype]

    def passes(self, case: Case) -> dict[str, list[Any]]:
        """Copies cut to what the sides take, then agreement, then times."""
        its = self._arguments
        chosen: dict[str, Any] = {"backend": its.backend, "device": its.device, "keep_going": True}
        bench = Bench(case.shape, dtype=case.dtype, against=case.against, **chosen)
        # A compiled peer has as many copies as the others had before it: it compiles anew for each number.
        key = case.shape, case.dtype, case.length
        if key not in self._copies:
            labels = [label for label in bench.peers if label not in COMPILED]
            self._copies[key] = capped(bench, case.length, labels, its.copy_tokens, its.most_seconds)
        texts = bench.texts(case.length, self._copies[key])
        measured = bench.measure(texts, "random", pairs=its.rounds, peak=self.peaks[case.dtype])
        self.sample(case.dtype)
        return {"rows": [asdict(m.row) for m in measured], "details": [m.details for m in measured]}

    def ranking(self, shape: str, dtype: str, against: Sequence[str]) -> dict[str, list[Any]]:
        """Every kind of question that the shape holds."""
        its = self._arguments
        chosen: dict[str, Any] = {"backend": its.backend, "device": its.device, "keep_going": True}
        bench, rows = RankBench(shape, dtype=dtype, against=against, **chosen), []
        for question in TOY_QUESTIONS if its.toy else QUESTIONS:
            if question.length <= named(shape).held:
                texts = bench.candidates(question)
                measured = bench.measure(texts, str(question), pairs=min(ROUNDS, its.rounds), peak=self.peaks[dtype])
                rows += [asdict(m.row) | {"details": m.details | {"asked": len(texts.asked)}} for m in measured]
        return {"ranking": rows}

    def generation(self, shape: str, dtype: str, prompt: int) -> dict[str, list[Any]]:
        """mlmfast's sides and peers after a prompt."""
        its = self._arguments
        tokens: dict[str, Any] = {"longest": prompt, "new_tokens": its.new_tokens, "peer_tokens": PEER_TOKENS}
        chosen: dict[str, Any] = {"backend": its.backend, "device": its.device, "dtype": dtype}
        bench = GenerationBench(shape, sides=its.sides, against=GENERATING, **tokens, **chosen)
        pairs = min(ROUNDS, its.rounds)
        measured = bench.measure(prompt, pairs=pairs, peak=self.peaks[dtype], bandwidth=self.bandwidth)
        return {"generation": [asdict(m.row) | {"details": m.details} for m in measured]}

    def checks(self, op: str) -> dict[str, list[Any]]:
        """An op in every dtype on lengths that hurt and on few rows, by the backends that are measured."""
        its = self._arguments
        sizes = op_table.TOY if its.toy else op_table.Sizes(rows=1161, few=(1, 31))
        return told_apart(
            "checks",
            [
                bench_ops.checked(case, DTYPES[dtype], its.device, backend)
                for dtype in its.dtypes
                for case in (*op_table.cases(sizes, (1, 63, 129)), *op_table.few_rows(sizes))
                if case.op == op
                for backend in its.op_backends
                if backend != "reference"
            ],
        )

    def op(self, case: op_table.OpCase, dtype: str) -> dict[str, list[Any]]:
        """An op's rows, beside the product rate as it is at the moment."""
        its, rate = self._arguments, self.sample(dtype)
        rates: dict[str, Any] = {"matrix_rate": rate, "bandwidth": self.bandwidth}
        return told_apart("ops", bench_ops.measure(case, DTYPES[dtype], its.device, its.op_backends, **rates))


def told_apart(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of :mod:`bench_ops` under a list's name, but for what was skipped."""
    return {name: [row for row in rows if "skipped" not in row], "skipped": [row for row in rows if "skipped" in row]}


def steps(its: argparse.Namespace, measuring: Measuring) -> Iterator[Step]:
    """All of the parts that are asked for.

    An op's checks are a step of their own: one that takes the device with it ends a run, and the next goes on behind
    it. The first shape's ranking and generation come after the first block of passes; then the larger shapes' passes,
    the ops in the first dtype, and the rest.
    """
    sizes = op_table.TOY if its.toy else op_table.Sizes()
    here = [peer for peer in its.peers if not missing(peer)]
    ranked_with = [peer for peer in here if peer in RANKING]

    def passes(block: Sequence[Case]) -> Iterator[Step]:
        for case in block if "pll" in its.parts else ():
            yield Step(str(case), case.seconds, partial(measuring.passes, case))

    def requests(shapes: Sequence[str], dtype: str) -> Iterator[Step]:
        for shape in shapes:
            if "rank" in its.parts and ranked_with:
                run = partial(measuring.ranking, shape, dtype, ranked_with)
                yield Step(f"{shape}, {dtype}, ranking against {', '.join(ranked_with)}", 1.5 * seconds_of(shape), run)
            for prompt in its.prompts if "generate" in its.parts else ():
                run = partial(measuring.generation, shape, dtype, prompt)
                yield Step(f"{shape}, {dtype}, generation after {prompt} tokens", 1.5 * seconds_of(shape), run)

    def ops(dtype: str) -> Iterator[Step]:
        short = [length for length in sorted(its.lengths) if length <= LONG]
        for case in (*op_table.cases(sizes, short), *op_table.few_rows(sizes)) if "ops" in its.parts else ():
            yield Step(f"{case.op}, {dtype}, {case.name}", OP_SECONDS, partial(measuring.op, case, dtype))

    for op in dict.fromkeys(case.op for case in op_table.cases(sizes, its.lengths[:1])):
        yield Step(f"{op} against float64", 1.0 if its.toy else CHECK_SECONDS, partial(measuring.checks, op))
    first, *others = blocks(its.shapes, its.dtypes, its.lengths, here)
    yield from passes(first)
    yield from requests(its.shapes[:1], its.dtypes[0])
    yield from passes(others[0])
    yield from ops(its.dtypes[0])
    yield from requests(its.shapes[1:], its.dtypes[0])
    for block in others[1:]:
        yield from passes(block)
    for dtype in its.dtypes[1:]:
        yield from requests(its.shapes, dtype)
        yield from ops(dtype)
