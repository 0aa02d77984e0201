"""One packed pass against peers: the same weights, the same plan, agreement first, then interleaved times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

import mlmfast
from mlmfast import backends
from mlmfast.bench import machine, peers
from mlmfast.bench.agreement import Agreement, Truth, agreement
from mlmfast.bench.peers.scored import plain_logprobs
from mlmfast.bench.sentences import token_sequences
from mlmfast.bench.shapes import named
from mlmfast.bench.timing import full_float32, interleaved, limited, seconds_of, summary
from mlmfast.bench.work import Peak, useful_flops
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan, TokenSequence, make_plan
from mlmfast.packing import pack, unique_copies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rows of a case's copies together, unless told otherwise.
COPY_TOKENS = 8192
# Letters kept of the reason for which a peer failed: a compiler's can be pages.
REASON = 400


@dataclass(frozen=True)
class Row:
    """A case against a peer: medians in seconds; speeds are None where the two sides disagree or the peer failed.

    Attributes:
        shape, length, copies, dtype: what was computed; tokens of the longest copy, copies, mlmfast's dtype.
        backend: what served mlmfast's ops.
        peer: what it was compared with.
        seconds, peer_seconds, ratio: of a whole pass, and the peer's over ours: above 1 is a win.
        peak_share: useful operations a second over the machine's matrix-product peak.
        max_abs_diff: largest difference of two log-probabilities, ours and the peer's; None where the peer failed.
        case: ``"random"`` tokens in texts of one length, real ``"texts"``, or a question of :mod:`mlmfast.bench.rank`.
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
    max_abs_diff: float | None
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


class _Failed(Exception):
    """A peer failed while it was timed; why, the bench has noted."""


class Bench:
    """A shape's model in a dtype, through mlmfast and through peers.

    Args:
        shape: a name of :data:`mlmfast.bench.shapes.SHAPES`.
        dtype: ``"float32"`` or ``"bfloat16"``, mlmfast's, and a peer's that names no other.
        against: names of :data:`mlmfast.bench.peers.PEERS`, ``:dtype`` after one that computes in another dtype.
        peer_batch: most copies that a peer computes in one pass; None leaves it to the peer.
        backend: of mlmfast.
        device: where all sides compute.
        keep_going: a peer that cannot serve or fails, for want of memory say, has a row with the reason, instead of
            ending everything.

    Attributes:
        spelled: whether the tokenizer knows words, for benches that are given text.

    Raises:
        RequestError: an argument is not known, or a peer is not installed or does not serve.
    """

    spelled: ClassVar[bool] = False

    def __init__(
        self,
        shape: str,
        *,
        dtype: str = "float32",
        against: Sequence[str] = ("hf",),
        peer_batch: int | None = None,
        backend: str = "auto",
        device: str = "cpu",
        keep_going: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise RequestError(f"dtype={dtype!r} is not measured; choose {' or '.join(DTYPES)}")
        self.name, self.shape, self.dtype, self.backend, self.device = shape, named(shape), dtype, backend, device
        self.keep_going = keep_going
        self.peers: dict[str, peers.Peer] = {}
        self.failures: dict[str, str] = {}
        self.dtypes = {label: (dtype, label.partition(":")[2] or dtype) for label in against}
        wanted: dict[str, type[peers.Peer]] = {}
        for label in against:
            with self._failing(label):
                wanted[label] = peers.named([label], dtype, torch.device(device).type)[label][0]
        self.model = self.shape.model(device=device).to(DTYPES[dtype])
        self.tokenizer = self.shape.tokenizer(self.spelled)
        self.lm = mlmfast.load(self.model, self.tokenizer, backend=backend)
        self._models = {dtype: self.model}
        for label, peer in wanted.items():
            with self._failing(label):
                own = self.dtypes[label][1]
                self.peers[label] = peer(peers.Subject(self._model(own), self.tokenizer, own, peer_batch))

    @contextmanager
    def _failing(self, label: str) -> Iterator[None]:
        """Notes why a peer fails in the block, where failures are to be kept, and lets go of what it held."""
        try:
            yield
        except Exception as error:
            if not self.keep_going:
                raise
            self.failures[label] = " ".join(f"{type(error).__name__}: {error}".split())[:REASON]
            self.peers.pop(label, None)
            if torch.device(self.device).type == "cuda":
                torch.cuda.empty_cache()

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

    def tried(self, texts: Sequence[TokenSequence], labels: Sequence[str]) -> dict[str, float]:
        """Seconds of one warm pass of ours, under ``""``, and of some peers; without those that fail."""
        ours = partial(self.ours, texts)
        ours()
        found = {"": seconds_of(ours, self.device)}
        for label in labels:
            if label in self.peers:
                with self._failing(label):
                    theirs = partial(self.theirs, texts, label)
                    theirs()
                    found[label] = seconds_of(theirs, self.device)
        return found

    def measure(self, texts: Sequence[TokenSequence], case: str, *, pairs: int, peak: Peak) -> list[Measurement]:
        """Checks agreement (which also warms all sides up), then times ``pairs`` interleaved rounds of ours and of
        every peer that agrees.

        Returns:
            A row a peer, whose speeds are None if the two disagree, with quartiles and single times as details.
        """
        plan, ours, truth = self.plan(texts), self.ours(texts), self.truth(texts)
        verdicts: dict[str, Agreement] = {}
        for label in list(self.peers):
            with self._failing(label):
                verdicts[label] = self._verdict(label, ours, self.theirs(texts, label), truth)
        times = self._times(texts, [label for label in verdicts if verdicts[label].holds], pairs, peak)
        with backends.forced(None if self.backend == "auto" else self.backend):
            report = backends.report(torch.device(self.device).type, DTYPES[self.dtype])
        lengths = [len(plan.sequences[sequence]) for sequence in plan.copy_sequences]
        shared = {"useful_flops": self.flops(texts), "unique_copies": unique_copies(plan), "pairs": pairs}
        measured = []
        for label, (_, own) in self.dtypes.items():
            found = self._compared(times, label, shared["useful_flops"], peak)
            verdict = None if label in self.failures else verdicts[label]
            row = Row(
                shape=self.name,
                length=max(lengths),
                copies=plan.copies,
                dtype=self.dtype,
                backend="+".join(sorted({service.backend for service in report})),
                peer=peers.PEERS[label.partition(":")[0]].name,
                max_abs_diff=None if verdict is None else verdict.max_abs_diff,
                case=case,
                peer_dtype=own,
                shortest=min(lengths),
                tokens=plan.tokens,
                **found[0],
            )
            if verdict is None:
                details = {"agrees": False, "failure": self.failures[label], "peer_way": ""}
            else:
                details = {"agrees": verdict.holds, "peer_way": self.peers[label].way()}
                details |= {"side": verdict.side, "error": verdict.error, "bound": verdict.bound}
            measured.append(Measurement(row, details | shared | found[1]))
        return measured

    def _times(
        self, texts: Sequence[TokenSequence], labels: Sequence[str], pairs: int, peak: Peak
    ) -> dict[str, list[float]]:
        """Seconds of ours, under ``""``, and of peers; nothing without peers. Without the ones that fail, the rest is
        timed anew."""
        while labels := [label for label in labels if label not in self.failures]:

            def side(label: str) -> None:
                with self._failing(label):
                    self.theirs(texts, label)
                    return
                raise _Failed

            sides: list[Callable[[], object]] = [lambda: self.ours(texts)]
            sides += [partial(side, label) for label in labels]
            try:
                times = interleaved(sides, pairs, between=peak.sample, device=self.device)
            except _Failed:
                continue
            return dict(zip(["", *labels], times))
        return {}

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
    device: str = "cpu",
    products: Sequence[tuple[int, int, int]] | None = None,
) -> Iterator[dict[str, Any] | Measurement]:
    """Measures every shape at every length, and on real sentences if there are any: first the header, a dict, then a
    :class:`Measurement` a case and peer.

    Args:
        lengths, copies: tokens a text and copies of a case;
        copy_tokens: fewer copies where they would have more rows than this together.
        sentences: all their copies are one more case.
        products: of the machine's peak; None for what fills the device.
        shapes, dtype, against, peer_batch, backend, device: of :class:`Bench`.

    Raises:
        RequestError: an argument is not known or impossible; judged before anything is timed.
    """
    if pairs < 1 or (peer_batch is not None and peer_batch < 1):
        raise RequestError(
            f"{pairs} pairs with {peer_batch} copies in the peer's batch measure nothing; 1 is the least"
        )
    if dtype not in DTYPES:
        raise RequestError(f"dtype={dtype!r} is not measured; choose {' or '.join(DTYPES)}")
    check_device(device)
    peers.named(against, dtype, torch.device(device).type)
    for shape in shapes:
        for length in lengths:
            named(shape).texts(length, copies)
        token_sequences(named(shape), sentences)
    settings: dict[str, Any] = {"dtype": dtype, "copies": copies, "pairs": pairs, "against": list(against)}
    settings |= {"peer_batch": peer_batch, "backend": backend, "copy_tokens": copy_tokens, "sentences": len(sentences)}
    with limited(threads), full_float32():
        yield machine.describe(device) | {"settings": settings, "peers": peers.versions(against)}
        peak = Peak(DTYPES[dtype], products, device)
        for _ in range(3):  # the first calls pay for allocation and thread start
            peak.sample()
        for shape in shapes:
            bench = Bench(shape, dtype=dtype, against=against, peer_batch=peer_batch, backend=backend, device=device)
            for length in lengths:
                texts = bench.texts(length, max(1, min(copies, copy_tokens // length)))
                yield from bench.measure(texts, "random", pairs=pairs, peak=peak)
            if sentences:
                texts = token_sequences(bench.shape, sentences)
                yield from bench.measure(texts, "texts", pairs=pairs, peak=peak)


def check_device(device: str) -> None:
    """Whether torch can compute there.

    Raises:
        RequestError: an unknown device, or one that is not here.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RequestError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def record(header: dict[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """What ``--output`` writes: where it was measured, the rows, and beside each row its details."""
    return {
        "header": header,
        "rows": [asdict(m.row) for m in measurements],
        "details": [m.details for m in measurements],
    }
