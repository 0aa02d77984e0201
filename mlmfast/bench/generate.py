"""Greedy generation, a token at a time: exact, windowed and drafted, the Hugging Face loop and a causal model.

All sides are given one random prompt and generate as many tokens; none ends it. What is compared is seconds a token,
the first pass over the prompt among them. The loop needs seconds for one where the prompt is long, so that it may be
given only some of the steps: after prefixes of exact's own tokens, spread evenly, so that the mean length of its passes
is that of all of them (to half a token).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

import mlmfast
from mlmfast import backends
from mlmfast.bench import machine, peers
from mlmfast.bench.agreement import Agreement, Truth, agreement, draft_agreement, greedy_agreement
from mlmfast.bench.peers.generating import GENERATING, CausalGPT2, GeneratingPeer, HuggingFaceLoop
from mlmfast.bench.peers.scored import plain_logprobs
from mlmfast.bench.pll import DTYPES, check_device
from mlmfast.bench.shapes import named
from mlmfast.bench.timing import full_float32, interleaved, limited, summary
from mlmfast.bench.work import COPY_BYTES, CPU_COPY_BYTES, Peak, copy_bandwidth, useful_flops, weight_bytes
from mlmfast.decoding import Frame, plan_of
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan
from mlmfast.packing import pack
from mlmfast.results import Generation
from mlmfast.searches import Ask

# mlmfast's own ways, and the arguments of `generate` that choose them.
SIDES: dict[str, dict[str, Any]] = {"exact": {}, "window": {"cache": "window"}, "drafted": {"draft": "masks"}}


@dataclass(frozen=True)
class Row:
    """A side of a case. Speeds are None where it, or exact, is not what it should be.

    Attributes:
        shape, prompt, new_tokens: the case; the prompt's tokens without special ones and masks.
        side: ``"exact"``, ``"window"``, ``"drafted"``, or a peer's name.
        dtype: what this side computes in.
        approximate: whether it may generate other tokens than exact does.
        steps: how many of the case's tokens it generates in a round.
        seconds_token, tokens_second: medians.
        ratio: this side's seconds a token over exact's: above 1, exact is the faster.
        window_ratio: the same over the window's, None without one.
        peak_share: exact's useful operations a second over the machine's matrix-product peak.
        bandwidth_share: the bytes of the weights that a step of the window reads, over the seconds a token, first pass
            and refreshes included, and over the machine's bytes a second in a plain copy.
        same_tokens: share of this side's tokens that are exact's; of a checked peer's, after exact's own prefixes.
        max_abs_diff: largest difference of a token's log-probability from exact's, where that is checked; of a window
            over all tokens for the window.
        seconds_token_quartiles, ratio_quartiles: the first and the third; ratios are those of single rounds.
    """

    shape: str
    prompt: int
    new_tokens: int
    side: str
    dtype: str
    approximate: bool
    steps: int
    seconds_token: float | None = None
    tokens_second: float | None = None
    ratio: float | None = None
    window_ratio: float | None = None
    peak_share: float | None = None
    bandwidth_share: float | None = None
    same_tokens: float | None = None
    max_abs_diff: float | None = None
    seconds_token_quartiles: tuple[float, float] | None = None
    ratio_quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measurement:
    """A row and what stands behind it."""

    row: Row
    details: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt, what exact made of it, and where that is checked.

    Attributes:
        ids, text: the prompt.
        exact: what exact generated.
        places: int64 ``[N]``, the steps that are checked and that loops are given.
        prefixes: the prompt and exact's tokens before each of them.
    """

    ids: list[int]
    text: str
    exact: Generation
    places: np.ndarray
    prefixes: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        """Exact's choice after each prefix."""
        found: list[int] = self.exact.token_ids[self.places].tolist()
        return found


class Bench:
    """A shape's model in a dtype, generating through mlmfast and through peers.

    Args:
        shape: a name of :data:`mlmfast.bench.shapes.SHAPES`.
        longest: tokens of the longest prompt.
        new_tokens: that every side generates.
        peer_tokens: steps that a loop is given in a round; None for all.
        sides: of :data:`SIDES`; exact is always there.
        against: names of :data:`mlmfast.bench.peers.generating.GENERATING`, ``:dtype`` after one with its own.
        recompute, refresh: of the window, as ``generate`` takes them.
        dtype, backend, device: as of :class:`mlmfast.bench.pll.Bench`.
    """

    def __init__(
        self,
        shape: str,
        *,
        longest: int,
        new_tokens: int = 64,
        peer_tokens: int | None = None,
        num_masks: int = 3,
        recompute: int | None = None,
        refresh: int | str | None = "auto",
        sides: Sequence[str] = ("exact", "window"),
        against: Sequence[str] = ("hf", "gpt2"),
        dtype: str = "float32",
        backend: str = "auto",
        device: str = "cpu",
    ) -> None:
        self.name, self.shape, self.dtype, self.backend, self.device = shape, named(shape), dtype, backend, device
        self.new_tokens, self.num_masks = new_tokens, num_masks
        self.steps = new_tokens if peer_tokens is None else min(peer_tokens, new_tokens)
        self.sides = [side for side in SIDES if side == "exact" or side in sides]
        self._window = {"recompute": recompute, "refresh": refresh}
        self.model = self.shape.model(device=device).to(DTYPES[dtype])
        self.tokenizer = self.shape.tokenizer(spelled=True)
        self.lm = mlmfast.load(self.model, self.tokenizer, backend=backend)
        self._models = {dtype: self.model}
        wanted = peers.chosen(GENERATING, against, dtype, torch.device(device).type) if against else {}
        self.dtypes = {label: own for label, (_, own) in wanted.items()}
        self.peers: dict[str, GeneratingPeer] = {}
        for label, (peer, own) in wanted.items():
            subject = peers.Subject(self._model(own), self.tokenizer, own)
            self.peers[label] = peer(subject, num_masks=num_masks, longest=longest + new_tokens)
        special: Any = self.tokenizer
        after = (special.sep_token_id,)
        self.frame = Frame((special.cls_token_id,), num_masks, after, special.mask_token_id)

    def _model(self, dtype: str) -> Any:
        """The same weights, as far as the dtype holds them."""
        if dtype not in self._models:
            self._models[dtype] = copy.deepcopy(self.model).to(DTYPES[dtype])
        return self._models[dtype]

    def generate(self, side: str, text: str, **other: Any) -> Generation:
        """mlmfast's whole way from a text, none of whose ends stops it; ``other`` settings go before a side's own."""
        manner = SIDES[side] | (self._window if side == "window" else {}) | other
        request: dict[str, Any] = {"num_masks": self.num_masks, "max_new_tokens": self.new_tokens}
        found: Generation = self.lm.generate(text, eos_token_id=[], progress=False, **request, **manner)
        return found

    def case(self, prompt: int) -> Case:
        """A random prompt of so many tokens, and exact's continuation."""
        draw = np.random.default_rng(prompt)
        ids = draw.integers(len(self.shape.special), self.shape.settings["vocab_size"], prompt).tolist()
        text = self.shape.spell(ids)
        exact = self.generate("exact", text)
        # The middles of as many equal parts.
        places = ((np.arange(self.steps) + 0.5) * self.new_tokens / self.steps).astype(np.int64)
        prefixes = [[*ids, *exact.token_ids[:place].tolist()] for place in places]
        return Case(ids, text, exact, places, prefixes)

    def plan(self, prefixes: Sequence[Sequence[int]], targets: Sequence[int]) -> MaskPlan:
        """The copies of some steps."""
        plan = plan_of(self.frame, [Ask(list(prefix)) for prefix in prefixes])
        return replace(plan, targets=np.array(targets, np.int64))

    def verdicts(self, case: Case) -> tuple[dict[str, Agreement], dict[str, dict[str, Any]]]:
        """Of exact and every side that computes the same, whether it did; and what else is known of a side's tokens.

        Log-probabilities of exact's own tokens after exact's own prefixes are compared: along another path everything
        after the first choice between two tokens that are equal within rounding would differ.
        """
        plan, pad = self.plan(case.prefixes, case.tokens), self.tokenizer.pad_token_id
        ours = case.exact.logprobs[case.places]
        right = plain_logprobs(self._model("float32"), plan, pad)
        truth, plain = None, right
        if {self.dtype, *self.dtypes.values()} != {"float32"}:
            truth = Truth(right, plain_logprobs(self._model("bfloat16"), plan, pad))
            plain = right if self.dtype == "float32" else truth.narrow
        judged = {"exact": agreement(ours, plain, (self.dtype, self.dtype), truth)}
        known: dict[str, dict[str, Any]] = {}
        for side in self.sides[1:]:
            found = self.generate(side, case.text)
            known[side] = {"same_tokens": float((found.token_ids == case.exact.token_ids).mean())}
            known[side]["tokens_per_pass"] = found.tokens_per_pass
            if side == "window":  # approximate; what can be judged is that it is exact over all tokens
                found = self.generate(side, case.text, recompute=len(case.ids) + self.new_tokens, refresh=None)
            judged[side] = draft_agreement(found, case.exact, self.dtype, truth)
        for label, peer in self.peers.items():
            if isinstance(peer, HuggingFaceLoop):
                given, best, chosen = peer.judge(case.prefixes, case.tokens)
                known[label] = {"same_tokens": float((chosen == case.tokens).mean())}
                judged[label] = agreement(ours, given, (self.dtype, self.dtypes[label]), truth)
                if judged[label].holds and truth is None:
                    judged[label] = max(judged[label], greedy_agreement(best, given), key=lambda one: not one.holds)
            elif isinstance(peer, CausalGPT2):
                made = peer.generate(case.ids, self.new_tokens)
                if len(made) != self.new_tokens:
                    raise RuntimeError(f"{label} generated {len(made)} tokens in place of {self.new_tokens}")
        return judged, known

    def runs(self, case: Case) -> dict[str, tuple[Callable[[], object], int]]:
        """What is timed, and how many tokens each generates."""
        found: dict[str, tuple[Callable[[], object], int]] = {
            side: (partial(self.generate, side, case.text), self.new_tokens) for side in self.sides
        }
        for label, peer in self.peers.items():
            if isinstance(peer, HuggingFaceLoop):
                found[label] = (partial(peer.choose, case.prefixes), self.steps)
            elif isinstance(peer, CausalGPT2):
                found[label] = (partial(peer.generate, case.ids, self.new_tokens), self.new_tokens)
        return found

    def flops(self, case: Case) -> float:
        """Useful operations a token of exact's, the mean of all steps."""
        whole = [*case.ids, *case.exact.token_ids.tolist()]
        prefixes = [whole[: len(case.ids) + i] for i in range(self.new_tokens)]
        batches = pack(self.plan(prefixes, [0] * self.new_tokens), self.lm.batch_tokens)
        return useful_flops(self.lm.spec(), batches) / self.new_tokens

    def measure(self, prompt: int, *, pairs: int, peak: Peak, bandwidth: float) -> list[Measurement]:
        """Checks agreement, which also warms all sides up, then times ``pairs`` interleaved rounds of those that agree.

        Args:
            bandwidth: the machine's, bytes a second.

        Returns:
            A row a side, exact first.
        """
        case = self.case(prompt)
        judged, known = self.verdicts(case)
        runs = self.runs(case)
        timed = [side for side in runs if side not in judged or judged[side].holds] if judged["exact"].holds else []
        times = dict(
            zip(timed, interleaved([runs[side][0] for side in timed], pairs, between=peak.sample, device=self.device))
        )
        a_token = {side: [seconds / runs[side][1] for seconds in found] for side, found in times.items()}
        with backends.forced(None if self.backend == "auto" else self.backend):
            report = backends.report(torch.device(self.device).type, DTYPES[self.dtype])
        shared = {"pairs": pairs, "backend": "+".join(sorted({service.backend for service in report}))}
        flops, read = self.flops(case), weight_bytes(self.lm.spec())
        measured = []
        for side, (_, steps) in runs.items():
            verdict = judged.get(side)
            row = Row(
                shape=self.name,
                prompt=prompt,
                new_tokens=self.new_tokens,
                side=side if side in SIDES else self.peers[side].name,
                dtype=self.dtypes.get(side, self.dtype),
                approximate=side == "window",
                steps=steps,
                same_tokens=known.get(side, {}).get("same_tokens"),
                max_abs_diff=None if verdict is None else verdict.max_abs_diff,
            )
            details: dict[str, Any] = {"agrees": judged["exact"].holds and (verdict is None or verdict.holds)}
            if verdict is not None:
                details |= {"judged": verdict.side, "error": verdict.error, "bound": verdict.bound}
            if side == "drafted":
                details["tokens_per_pass"] = known[side]["tokens_per_pass"]
            if side in self.peers:
                details["way"] = self.peers[side].way()
            if side in a_token:
                speeds, behind = self._speeds(a_token, side)
                row, details = replace(row, **speeds), details | behind
                median = behind["seconds_token"]["median"]
                if side == "exact":
                    row = replace(row, peak_share=flops / median / peak.flops)
                    details |= {"useful_flops": flops, "peak_flops": peak.flops, "peak_source": peak.source}
                elif side == "window":
                    row = replace(row, bandwidth_share=read / median / bandwidth)
                    details |= {"weight_bytes": read, "copy_bytes_second": bandwidth} | self._window
            measured.append(Measurement(row, details | shared))
        return measured

    @staticmethod
    def _speeds(a_token: dict[str, list[float]], side: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A row's speeds and the details behind them."""
        mine = summary(a_token[side])
        found = {"seconds_token": mine["median"], "tokens_second": 1 / mine["median"]}
        found["seconds_token_quartiles"] = (mine["q1"], mine["q3"])
        details = {"seconds_token": mine}
        for base, name in (("exact", "ratio"), ("window", "window_ratio")):
            if base in a_token and side != base:
                rounds = summary([own / other for own, other in zip(a_token[side], a_token[base])])
                found[name] = mine["median"] / float(np.median(a_token[base]))
                details[name] = rounds
                if name == "ratio":
                    found["ratio_quartiles"] = (rounds["q1"], rounds["q3"])
        return found, details


def run(
    shapes: Sequence[str],
    prompts: Sequence[int],
    *,
    new_tokens: int = 64,
    peer_tokens: int | None = None,
    num_masks: int = 3,
    recompute: int | None = None,
    refresh: int | str | None = "auto",
    sides: Sequence[str] = ("exact", "window"),
    against: Sequence[str] = ("hf", "gpt2"),
    dtype: str = "float32",
    pairs: int = 5,
    backend: str = "auto",
    threads: int | None = None,
    device: str = "cpu",
    products: Sequence[tuple[int, int, int]] | None = None,
    copied: int | None = None,
) -> Iterator[dict[str, Any] | Measurement]:
    """Measures every shape at every prompt's length: first the header, a dict, then a :class:`Measurement` a side.

    Args:
        products: of the machine's peak; None for what fills the device.
        copied: bytes of the copy that its memory is measured by; None for many times its caches.
        shapes, prompts, pairs, threads: what is measured, and how often.

    The others are those of :class:`Bench`.

    Raises:
        RequestError: an argument is not known or impossible; judged before anything is timed.
    """
    if min(pairs, new_tokens, num_masks, *prompts, *([] if peer_tokens is None else [peer_tokens])) < 1:
        raise RequestError("pairs, prompts, new tokens, the peer's tokens and masks are whole numbers from 1")
    if dtype not in DTYPES:
        raise RequestError(f"dtype={dtype!r} is not measured; choose {' or '.join(DTYPES)}")
    if unknown := [side for side in sides if side not in SIDES]:
        raise RequestError(f"side {unknown[0]!r} is not known; choose from {', '.join(SIDES)}")
    check_device(device)
    if against:
        peers.chosen(GENERATING, against, dtype, torch.device(device).type)
    for shape in shapes:
        for prompt in prompts:
            # The last token is predicted with the masks, not beside them; two special tokens.
            if (rows := prompt + new_tokens - 1 + num_masks + 2) > (held := named(shape).held):
                raise RequestError(f"a prompt of {prompt} takes {rows} tokens in the end; {shape} holds {held}")
    settings: dict[str, Any] = {
        "dtype": dtype,
        "pairs": pairs,
        "against": list(against),
        "sides": list(sides),
        "backend": backend,
    }
    manner: dict[str, Any] = {"new_tokens": new_tokens, "peer_tokens": peer_tokens, "num_masks": num_masks}
    manner |= {"recompute": recompute, "refresh": refresh}
    if copied is None:
        copied = CPU_COPY_BYTES if torch.device(device).type == "cpu" else COPY_BYTES
    with limited(threads), full_float32():
        yield machine.describe(device) | {"settings": settings | manner}
        peak = Peak(DTYPES[dtype], products, device)
        for _ in range(3):  # the first calls pay for allocation and thread start
            peak.sample()
        chosen: dict[str, Any] = {
            "against": against,
            "sides": sides,
            "dtype": dtype,
            "backend": backend,
            "device": device,
        }
        bandwidth = 0.0
        for shape in shapes:
            bench = Bench(shape, longest=max(prompts), **manner, **chosen)
            for prompt in prompts:
                bandwidth = max(bandwidth, copy_bandwidth(device, copied))
                yield from bench.measure(prompt, pairs=pairs, peak=peak, bandwidth=bandwidth)


def record(header: dict[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """What ``--output`` writes: where it was measured, the rows, and beside each row its details."""
    rows = [asdict(m.row) for m in measurements]
    return {"header": header, "rows": rows, "details": [m.details for m in measurements]}
