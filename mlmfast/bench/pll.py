"""One packed pass against peers: the same weights, the same plan, agreement first, then interleaved times."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import mlmfast
from mlmfast import backends
from mlmfast.bench import machine, peers
from mlmfast.bench.peers.exported import plain_logprobs
from mlmfast.bench.sentences import token_sequences
from mlmfast.bench.shapes import named
from mlmfast.bench.work import PRODUCTS, Peak, useful_flops
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan, TokenSequence, make_plan
from mlmfast.packing import pack, unique_copies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# float32: how far a log-probability may be from what it is compared with, times max(1, its size).
FLOAT32_BOUND = 1e-4
# bfloat16: how far from float32, as a multiple of plain torch's own distance, and beyond it: in the root mean square
# over tokens, and at the worst.
NARROW_FACTOR, NARROW_BOUND = 2.0, 1e-3
# And how far more a peer that rounds its log-probabilities to bfloat16, as a multiple of the largest: two spacings.
ROUNDING = 2.0**-7
# Rows of a case's copies together, unless told otherwise.
COPY_TOKENS = 8192


@dataclass(frozen=True)
class Row:
    """A case against a peer: medians in seconds; speeds are None where the two sides disagree.

    Attributes:
        shape, length, copies, dtype: what was computed; tokens of the longest copy, copies, mlmfast's dtype.
        backend: what served mlmfast's ops.
        peer: what it was compared with.
        seconds, peer_seconds, ratio: of a whole pass, and the peer's over ours: above 1 is a win.
        peak_share: useful operations a second over the machine's matrix-product peak.
        max_abs_diff: largest difference of two log-probabilities, ours and the peer's.
        case: ``"random"`` tokens in texts of one length, or real ``"texts"``.
        peer_dtype: what the peer computed in.
        shortest: tokens of the shortest copy.
        tokens: rows of all copies together.
        seconds_quartiles, peer_seconds_quartiles, ratio_quartiles: the first and the third; ratios are those of single
            rounds.
    """

    shape: str
    length: int
    copies: int
    dtype: str
    backend: str
    peer: str
    seconds: float | None
    peer_seconds: float | None
    ratio: float | None
    peak_share: float | None
    max_abs_diff: float
    case: str
    peer_dtype: str
    shortest: int
    tokens: int
    seconds_quartiles: tuple[float, float] | None = None
    peer_seconds_quartiles: tuple[float, float] | None = None
    ratio_quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measurement:
    """A row and what stands behind it."""

    row: Row
    details: dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """What sides are judged by that do not both compute in float32.

    Attributes:
        logprobs: of the same weights in float32.
        narrow: of plain torch in bfloat16.
    """

    logprobs: np.ndarray
    narrow: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Whether two sides computed the same, and by which measure.

    Attributes:
        max_abs_diff: between ours and the peer's.
        side: who is judged, the one nearer to failing: ``"mlmfast"`` or ``"the peer"``; ``"either"`` where the two are
            compared with each other.
        error: what is bounded: for float32 the largest relative distance, ``|a - b| / max(1, |b|)``; for bfloat16 the
            distance from float32, its root mean square or its largest.
        bound: what it may be.
    """

    max_abs_diff: float
    side: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # False for NaN


def agreement(
    ours: np.ndarray,
    theirs: np.ndarray,
    dtypes: tuple[str, str] = ("float32", "float32"),
    truth: Truth | None = None,
    *,
    rounds: bool = False,
) -> Agreement:
    """Compares log-probabilities ``[N]``: two float32 sides with each other, any others with the truth.

    So a peer that is wrong in bfloat16 does not widen its own bound.

    Args:
        ours, theirs: what was computed.
        dtypes: in what, ours and theirs.
        truth: needed unless both are float32.
        rounds: whether the peer rounds its log-probabilities to its dtype.
    """
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    apart = float(np.abs(ours - theirs).max())
    if dtypes == ("float32", "float32"):
        return Agreement(apart, "either", _relative(ours, theirs), FLOAT32_BOUND)
    if truth is None:
        raise ValueError("a side that computes in bfloat16 is judged by float32: pass the truth")
    judged = []
    for side, found, dtype in zip(("mlmfast", "the peer"), (ours, theirs), dtypes):
        if dtype == "float32":
            judged.append(Agreement(apart, side, _relative(found, truth.logprobs), FLOAT32_BOUND))
        else:
            rounding = ROUNDING * float(np.abs(truth.logprobs).max()) if rounds and side == "the peer" else 0.0
            for measure in (_root_mean_square, _worst):
                bound = NARROW_FACTOR * measure(truth.narrow - truth.logprobs) + NARROW_BOUND + rounding
                judged.append(Agreement(apart, side, measure(found - truth.logprobs), bound))
    wrong = [verdict for verdict in judged if not verdict.holds]
    return wrong[0] if wrong else max(judged, key=lambda verdict: verdict.error / verdict.bound)


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def _worst(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _relative(found: np.ndarray, right: np.ndarray) -> float:
    return float((np.abs(found - right) / np.maximum(1, np.abs(right))).max())


class Bench:
    """A shape's model in a dtype, through mlmfast and through peers.

    Args:
        shape: a name of :data:`mlmfast.bench.shapes.SHAPES`.
        dtype: ``"float32"`` or ``"bfloat16"``, mlmfast's, and a peer's that names no other.
        against: names of :data:`mlmfast.bench.peers.PEERS`, ``:dtype`` after one that computes in another dtype.
        peer_batch: most copies that a peer computes in one pass; None leaves it to the peer.
        backend: of mlmfast.

    Raises:
        RequestError: an argument is not known, or a peer is not installed.
    """

    def __init__(
        self,
        shape: str,
        *,
        dtype: str = "float32",
        against: Sequence[str] = ("hf",),
        peer_batch: int | None = None,
        backend: str = "auto",
    ) -> None:
        if dtype not in DTYPES:
            raise RequestError(f"dtype={dtype!r} is not measured; choose {' or '.join(DTYPES)}")
        wanted = peers.named(against, dtype)
        self.name, self.shape, self.dtype, self.backend = shape, named(shape), dtype, backend
        self.model = self.shape.model().to(DTYPES[dtype])
        self.tokenizer = self.shape.tokenizer()
        self.lm = mlmfast.load(self.model, self.tokenizer, backend=backend)
        self._models = {dtype: self.model}
        self.peers: dict[str, peers.Peer] = {}
        self.dtypes = {label: (dtype, own) for label, (_, own) in wanted.items()}
        for label, (peer, own) in wanted.items():
            self.peers[label] = peer(peers.Subject(self._model(own), self.tokenizer, own, peer_batch))

    def _model(self, dtype: str) -> Any:
        """The same weights, as far as the dtype holds them."""
        if dtype not in self._models:
            self._models[dtype] = copy.deepcopy(self.model).to(DTYPES[dtype])
        return self._models[dtype]

    def plan(self, texts: Sequence[TokenSequence]) -> MaskPlan:
        return make_plan(texts, self.tokenizer.mask_token_id)

    def ours(self, texts: Sequence[TokenSequence]) -> np.ndarray:
        """mlmfast's whole way from token ids: plan, packing, encoder, vocabulary."""
        return self.lm.logprobs(self.plan(texts))

    def theirs(self, texts: Sequence[TokenSequence], label: str | None = None) -> np.ndarray:
        """A peer's, the first one's unless named; it is given the plan, which mlmfast has to make for itself."""
        peer = self.peers[next(iter(self.peers)) if label is None else label]
        return peer.logprobs(self.plan(texts))

    def truth(self, texts: Sequence[TokenSequence]) -> Truth | None:
        """What sides are judged by that are not both float32; None where all are."""
        if {dtype for pair in self.dtypes.values() for dtype in pair} == {"float32"}:
            return None
        plan, pad = self.plan(texts), self.tokenizer.pad_token_id
        exact, narrow = (plain_logprobs(self._model(dtype), plan, pad) for dtype in ("float32", "bfloat16"))
        return Truth(exact, narrow)

    def texts(self, length: int, copies: int) -> list[TokenSequence]:
        """Random texts whose copies all differ: identical ones would be computed once here, and by no peer."""
        texts = self.shape.texts(length, copies)
        distinct = unique_copies(self.plan(texts))
        if distinct != copies:
            raise RequestError(
                f"{copies} copies of length {length} are only {distinct} different ones; take longer texts"
            )
        return texts

    def agreement(self, texts: Sequence[TokenSequence], label: str | None = None) -> Agreement:
        label = next(iter(self.peers)) if label is None else label
        return self._verdict(label, self.ours(texts), self.theirs(texts, label), self.truth(texts))

    def _verdict(self, label: str, ours: np.ndarray, theirs: np.ndarray, truth: Truth | None) -> Agreement:
        return agreement(ours, theirs, self.dtypes[label], truth, rounds=self.peers[label].rounds)

    def flops(self, texts: Sequence[TokenSequence]) -> int:
        """Useful operations of a pass, see :func:`mlmfast.bench.work.useful_flops`."""
        return useful_flops(self.lm.spec(), pack(self.plan(texts), self.lm.batch_tokens))

    def measure(self, texts: Sequence[TokenSequence], case: str, *, pairs: int, peak: Peak) -> list[Measurement]:
        """Checks agreement (which also warms all sides up), then times ``pairs`` interleaved rounds of ours and of
        every peer that agrees.

        Returns:
            A row a peer, whose speeds are None if the two disagree, with quartiles and single times as details.
        """
        plan, ours, truth = self.plan(texts), self.ours(texts), self.truth(texts)
        verdicts = {label: self._verdict(label, ours, self.theirs(texts, label), truth) for label in self.peers}
        agreeing = [label for label in self.peers if verdicts[label].holds]
        times: dict[str, list[float]] = {}
        if agreeing:
            sides = [lambda: self.ours(texts), *(lambda label=label: self.theirs(texts, label) for label in agreeing)]
            times = dict(zip(["", *agreeing], interleaved(sides, pairs, between=peak.sample)))
        with backends.forced(None if self.backend == "auto" else self.backend):
            services = "+".join(sorted({service.backend for service in backends.report("cpu")}))
        lengths = [len(plan.sequences[sequence]) for sequence in plan.copy_sequences]
        shared = {"useful_flops": self.flops(texts), "unique_copies": unique_copies(plan), "pairs": pairs}
        measured = []
        for label, verdict in verdicts.items():
            found = self._compared(times, label, shared["useful_flops"], peak)
            row = Row(
                shape=self.name,
                length=max(lengths),
                copies=plan.copies,
                dtype=self.dtype,
                backend=services,
                peer=self.peers[label].name,
                max_abs_diff=verdict.max_abs_diff,
                case=case,
                peer_dtype=self.dtypes[label][1],
                shortest=min(lengths),
                tokens=plan.tokens,
                **found[0],
            )
            details = {"agrees": verdict.holds, "side": verdict.side, "error": verdict.error, "bound": verdict.bound}
            details |= shared | {"peer_way": self.peers[label].way()} | found[1]
            measured.append(Measurement(row, details))
        return measured

    @staticmethod
    def _compared(
        times: dict[str, list[float]], label: str, flops: int, peak: Peak
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A row's speeds and the details behind them, of our times (under ``""``) and a peer's."""
        if label not in times:
            return dict.fromkeys(("seconds", "peer_seconds", "ratio", "peak_share")), {}
        ours, theirs = summary(times[""]), summary(times[label])
        rounds = summary([b / a for a, b in zip(times[""], times[label])])
        speeds = {
            "seconds": ours["median"],
            "peer_seconds": theirs["median"],
            "ratio": theirs["median"] / ours["median"],
            "peak_share": flops / ours["median"] / peak.flops,
            "seconds_quartiles": (ours["q1"], ours["q3"]),
            "peer_seconds_quartiles": (theirs["q1"], theirs["q3"]),
            "ratio_quartiles": (rounds["q1"], rounds["q3"]),
        }
        details = {"seconds": ours, "peer_seconds": theirs, "ratio": rounds}
        return speeds, details | {"peak_flops": peak.flops, "peak_source": peak.source}


def interleaved(
    sides: Sequence[Callable[[], object]], rounds: int, between: Callable[[], object] | None = None
) -> list[list[float]]:
    """Seconds of each side in each round. A round runs every side once, in turn from the front and from the back,
    so that a drift of the machine's speed falls on all of them alike; ``between`` runs before each round, untimed.
    """
    times: list[list[float]] = [[] for _ in sides]
    for r in range(rounds):
        if between is not None:
            between()
        order = range(len(sides)) if r % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            start = time.perf_counter()
            sides[side]()
            times[side].append(time.perf_counter() - start)
    return times


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Quartiles and all values, in the order measured."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high, "all": list(values)}


def run(
    shapes: Sequence[str],
    lengths: Sequence[int],
    *,
    copies: int = 64,
    copy_tokens: int = COPY_TOKENS,
    sentences: Sequence[str] = (),
    dtype: str = "float32",
    pairs: int = 7,
    against: Sequence[str] = ("hf",),
    peer_batch: int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    products: Sequence[tuple[int, int, int]] = PRODUCTS,
) -> Iterator[dict[str, Any] | Measurement]:
    """Measures every shape at every length, and on real sentences if there are any: first the header, a dict, then a
    :class:`Measurement` a case and peer.

    Args:
        lengths, copies: tokens a text and copies of a case;
        copy_tokens: fewer copies where they would have more rows than this together.
        sentences: all their copies are one more case.
        products: of the machine's peak.
        shapes, dtype, against, peer_batch, backend: of :class:`Bench`.

    Raises:
        RequestError: an argument is not known or impossible; judged before anything is timed.
    """
    if pairs < 1 or (peer_batch is not None and peer_batch < 1):
        raise RequestError(
            f"{pairs} pairs with {peer_batch} copies in the peer's batch measure nothing; 1 is the least"
        )
    if dtype not in DTYPES:
        raise RequestError(f"dtype={dtype!r} is not measured; choose {' or '.join(DTYPES)}")
    peers.named(against, dtype)
    for shape in shapes:
        for length in lengths:
            named(shape).texts(length, copies)
        token_sequences(named(shape), sentences)
    settings: dict[str, Any] = {"dtype": dtype, "copies": copies, "pairs": pairs, "against": list(against)}
    settings |= {"peer_batch": peer_batch, "backend": backend, "copy_tokens": copy_tokens, "sentences": len(sentences)}
    with limited(threads):
        yield machine.describe() | {"settings": settings, "peers": peers.versions(against)}
        peak = Peak(DTYPES[dtype], products)
        for _ in range(3):  # the first calls pay for allocation and thread start
            peak.sample()
        for shape in shapes:
            bench = Bench(shape, dtype=dtype, against=against, peer_batch=peer_batch, backend=backend)
            for length in lengths:
                texts = bench.texts(length, max(1, min(copies, copy_tokens // length)))
                yield from bench.measure(texts, "random", pairs=pairs, peak=peak)
            if sentences:
                texts = token_sequences(bench.shape, sentences)
                yield from bench.measure(texts, "texts", pairs=pairs, peak=peak)


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


def record(header: dict[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """What ``--output`` writes: where it was measured, the rows, and beside each row its details."""
    return {
        "header": header,
        "rows": [asdict(m.row) for m in measurements],
        "details": [m.details for m in measurements],
    }
