"""One packed pass against a peer: the same weights, the same plan, agreement first, then interleaved times."""

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
from mlmfast.bench import machine
from mlmfast.bench.peers import Peer, peer_named
from mlmfast.bench.shapes import named
from mlmfast.bench.work import PRODUCTS, Peak, useful_flops
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan, TokenSequence, make_plan
from mlmfast.packing import pack, unique_copies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# float32: how far a log-probability may be from the peer's, times max(1, its size).
FLOAT32_BOUND = 1e-4
# bfloat16: how far from float32, as a multiple of the peer's own distance, and beyond it.
NARROW_FACTOR, NARROW_BOUND = 2.0, 1e-3


@dataclass(frozen=True)
class Row:
    """A line of the result: medians in seconds; speeds are None where the two sides disagree.

    Attributes:
        shape, length, copies, dtype: what was computed; tokens a copy, copies.
        backend: what served mlmfast's ops.
        peer: what it was compared with.
        seconds, peer_seconds, ratio: of a whole pass, and the peer's over ours: above 1 is a win.
        peak_share: useful operations a second over the machine's matrix-product peak.
        max_abs_diff: largest difference of two log-probabilities, ours and the peer's.
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


@dataclass(frozen=True)
class Measurement:
    """A row and what stands behind it."""

    row: Row
    details: dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """Whether two sides computed the same, and by which measure.

    Attributes:
        max_abs_diff: between ours and the peer's.
        error: what is bounded: in float32 the largest ``|ours - peer| / max(1, |peer|)``, in narrower dtypes ours
            against float32.
        bound: what it may be.
    """

    max_abs_diff: float
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # False for NaN


def agreement(ours: np.ndarray, theirs: np.ndarray, truth: np.ndarray | None = None) -> Agreement:
    """Compares log-probabilities ``[N]``; ``truth``, in float32, is needed where both sides compute in less."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    apart = np.abs(ours - theirs)
    if truth is None:
        return Agreement(float(apart.max()), float((apart / np.maximum(1, np.abs(theirs))).max()), FLOAT32_BOUND)
    allowed = NARROW_FACTOR * float(np.abs(theirs - truth).max()) + NARROW_BOUND
    return Agreement(float(apart.max()), float(np.abs(ours - truth).max()), allowed)


class Bench:
    """A shape's model in a dtype, through mlmfast and through a peer.

    Args:
        shape: a name of :data:`mlmfast.bench.shapes.SHAPES`.
        dtype: ``"float32"`` or ``"bfloat16"``, of both sides.
        against: a name of :data:`mlmfast.bench.peers.PEERS`.
        peer_batch: copies that the peer computes in one pass.
        backend: of mlmfast.

    Raises:
        RequestError: an argument is not known.
    """

    def __init__(
        self, shape: str, *, dtype: str = "float32", against: str = "hf", peer_batch: int = 32, backend: str = "auto"
    ) -> None:
        if dtype not in DTYPES:
            raise RequestError(f"dtype={dtype!r} is not measured; choose {' or '.join(DTYPES)}")
        self.name, self.shape, self.dtype, self.backend = shape, named(shape), dtype, backend
        self.peer_batch = peer_batch
        self.model = self.shape.model().to(DTYPES[dtype])
        self.tokenizer = self.shape.tokenizer()
        self.lm = mlmfast.load(self.model, self.tokenizer, backend=backend)
        self.against = against
        self.peer = self._peer(self.model)

    def _peer(self, model: Any) -> Peer:
        return peer_named(self.against)(model, self.tokenizer.pad_token_id, self.peer_batch)

    def plan(self, texts: Sequence[TokenSequence]) -> MaskPlan:
        return make_plan(texts, self.tokenizer.mask_token_id)

    def ours(self, texts: Sequence[TokenSequence]) -> np.ndarray:
        """mlmfast's whole way from token ids: plan, packing, encoder, vocabulary."""
        return self.lm.logprobs(self.plan(texts))

    def theirs(self, texts: Sequence[TokenSequence]) -> np.ndarray:
        """The peer's; it is given the plan, which mlmfast has to make for itself."""
        return self.peer.logprobs(self.plan(texts))

    def truth(self, texts: Sequence[TokenSequence]) -> np.ndarray | None:
        """What bfloat16 is judged by: the peer with the same weights in float32. None for float32."""
        if self.dtype == "float32":
            return None
        return self._peer(copy.deepcopy(self.model).float()).logprobs(self.plan(texts))

    def texts(self, length: int, copies: int) -> list[TokenSequence]:
        """Random texts whose copies all differ: identical ones would be computed once here, and by no peer."""
        texts = self.shape.texts(length, copies)
        distinct = unique_copies(self.plan(texts))
        if distinct != copies:
            raise RequestError(
                f"{copies} copies of length {length} are only {distinct} different ones; take longer texts"
            )
        return texts

    def agreement(self, texts: Sequence[TokenSequence]) -> Agreement:
        return agreement(self.ours(texts), self.theirs(texts), self.truth(texts))

    def flops(self, texts: Sequence[TokenSequence]) -> int:
        """Useful operations of a pass, see :func:`mlmfast.bench.work.useful_flops`."""
        return useful_flops(self.lm.spec(), pack(self.plan(texts), self.lm.batch_tokens))

    def measure(self, length: int, copies: int, *, pairs: int, peak: Peak) -> Measurement:
        """Checks agreement (which also warms both sides up), then times ``pairs`` interleaved pairs.

        Returns:
            The row, whose speeds are None if the two disagree, with quartiles and single times as details.
        """
        texts = self.texts(length, copies)
        verdict = self.agreement(texts)
        with backends.forced(None if self.backend == "auto" else self.backend):
            services = sorted({service.backend for service in backends.report("cpu")})
        labels = (self.name, length, copies, self.dtype, "+".join(services), self.peer.name)
        details: dict[str, Any] = {
            "agrees": verdict.holds,
            "error": verdict.error,
            "bound": verdict.bound,
            "tokens": length * copies,
            "useful_flops": self.flops(texts),
        }
        if not verdict.holds:
            return Measurement(Row(*labels, None, None, None, None, verdict.max_abs_diff), details)
        times = interleaved([lambda: self.ours(texts), lambda: self.theirs(texts)], pairs, between=peak.sample)
        seconds, peer_seconds = (float(np.median(side)) for side in times)
        ratio = peer_seconds / seconds
        share = details["useful_flops"] / seconds / peak.flops
        details |= {
            "pairs": pairs,
            "seconds": summary(times[0]),
            "peer_seconds": summary(times[1]),
            "ratio": summary([b / a for a, b in zip(*times)]),
            "peak_flops": peak.flops,
            "peak_source": peak.source,
        }
        return Measurement(Row(*labels, seconds, peer_seconds, ratio, share, verdict.max_abs_diff), details)


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
    dtype: str = "float32",
    pairs: int = 7,
    against: str = "hf",
    peer_batch: int = 32,
    backend: str = "auto",
    threads: int | None = None,
    products: Sequence[tuple[int, int, int]] = PRODUCTS,
) -> Iterator[dict[str, Any] | Measurement]:
    """Measures every shape at every length: first the header, a dict, then a :class:`Measurement` a case.

    Raises:
        RequestError: an argument is not known or impossible; judged before anything is timed.
    """
    peer_named(against)
    if pairs < 1 or peer_batch < 1:
        raise RequestError(
            f"{pairs} pairs with {peer_batch} copies in the peer's batch measure nothing; 1 is the least"
        )
    if dtype not in DTYPES:
        raise RequestError(f"dtype={dtype!r} is not measured; choose {' or '.join(DTYPES)}")
    for shape in shapes:
        for length in lengths:
            named(shape).texts(length, copies)
    with limited(threads):
        settings = {"dtype": dtype, "copies": copies, "pairs": pairs, "against": against, "peer_batch": peer_batch}
        yield machine.describe() | {"settings": settings | {"backend": backend}}
        peak = Peak(DTYPES[dtype], products)
        for _ in range(3):  # the first calls pay for allocation and thread start
            peak.sample()
        for shape in shapes:
            bench = Bench(shape, dtype=dtype, against=against, peer_batch=peer_batch, backend=backend)
            for length in lengths:
                yield bench.measure(length, copies, pairs=pairs, peak=peak)


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
