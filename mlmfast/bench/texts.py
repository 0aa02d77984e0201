"""Texts a second from end to end, tokeniser and all, against what people call today."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import mlmfast
from mlmfast import backends
from mlmfast.bench import machine, peers
from mlmfast.bench.agreement import FLOAT32_BOUND
from mlmfast.bench.peers.minicons import repaired_scorer
from mlmfast.bench.sentences import tiny_tokenizer
from mlmfast.bench.shapes import SHAPES
from mlmfast.bench.timing import interleaved, limited, summary
from mlmfast.errors import RequestError

# Sentences that minicons is given at once; which is faster depends on the model.
MINICONS_BATCHES = (1, 8)
# Texts that this is tried with.
TRIAL = 24


class HuggingFaceLoop:
    """The loop that users write: a text's masked copies in one pass, logits of every position, log-softmax."""

    name = "hf-loop"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> float:
        encoding = self.tokenizer(text, return_special_tokens_mask=True)
        ids = torch.tensor(encoding["input_ids"])
        special = torch.tensor(encoding["special_tokens_mask"]).bool() & (ids != self.tokenizer.unk_token_id)
        positions = (~special).nonzero()[:, 0]
        copies = ids.repeat(len(positions), 1)  # [n, L]
        every = torch.arange(len(positions))
        copies[every, positions] = self.tokenizer.mask_token_id
        logits = self.model(input_ids=copies, attention_mask=torch.ones_like(copies)).logits  # [n, L, V]
        return float(logits[every, positions].log_softmax(1)[every, ids[positions]].double().sum())


class MiniconsScorer:
    """``sequence_score`` of minicons' ``MaskedLMScorer``, summed, in batches of the size that is fastest for it."""

    name = "minicons"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.scorer = repaired_scorer(model, tokenizer)
        self.batch = 0

    def choose(self, texts: Sequence[str]) -> None:
        """Tries some sizes of a batch on some texts."""
        sides = [lambda batch=batch: self._scores(texts, batch) for batch in MINICONS_BATCHES]
        seconds = [min(side) for side in interleaved(sides, 2)]
        self.batch = MINICONS_BATCHES[int(np.argmin(seconds))]

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return self._scores(texts, self.batch or MINICONS_BATCHES[0])

    def _scores(self, texts: Sequence[str], batch: int) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), batch):
            scores += self.scorer.sequence_score(
                list(texts[start : start + batch]), reduction=lambda x: float(x.double().sum())
            )
        return scores


SIDES: dict[str, Callable[[Any, Any], Any]] = {"hf": HuggingFaceLoop, "minicons": MiniconsScorer}


def loaded(name: str, backend: str = "auto") -> mlmfast.MaskedLM:
    """A model by name: a shape of :data:`SHAPES` with random weights and the bundled tokenizer, or a checkpoint."""
    if name not in SHAPES:
        return mlmfast.load(name, backend=backend)
    tokenizer = tiny_tokenizer()
    shape = SHAPES[name]
    if shape.settings["vocab_size"] < len(tokenizer):
        raise RequestError(f"{name} has a vocabulary of {shape.settings['vocab_size']}, fewer than real texts need")
    # RoBERTa counts positions from its padding's id.
    model = replace(shape, settings=shape.settings | {"pad_token_id": tokenizer.pad_token_id}).model()
    return mlmfast.load(model, tokenizer, backend=backend)


def run(
    models: Sequence[str],
    texts: Sequence[str],
    *,
    against: Sequence[str] = ("hf", "minicons"),
    rounds: int = 7,
    threads: int | None = None,
    backend: str = "auto",
) -> Iterator[dict[str, Any]]:
    """Measures every model: first the header, then a row a model and peer.

    Every round scores its own share of the texts, dealt like cards, with every side.

    Raises:
        RequestError: an argument is not known or impossible, or a peer is not installed.
    """
    for name in against:
        if name not in SIDES:
            raise RequestError(f"peer {name!r} is not known; choose from {', '.join(SIDES)}")
    peers.named(against, "float32")
    if len(texts) < rounds:
        raise RequestError(f"{len(texts)} texts cannot be dealt to {rounds} rounds")
    with limited(threads):
        settings = {"texts": len(texts), "rounds": rounds, "against": list(against), "backend": backend}
        yield machine.describe() | {"settings": settings, "peers": peers.versions(against)}
        for name in models:
            yield from _measured(name, texts, against, rounds, backend)


def _measured(
    name: str, texts: Sequence[str], against: Sequence[str], rounds: int, backend: str
) -> Iterator[dict[str, Any]]:
    lm = loaded(name, backend)
    sides = {peer: SIDES[peer](lm.model, lm.tokenizer) for peer in against}
    trial = texts[:: max(1, len(texts) // TRIAL)]
    for side in sides.values():
        if isinstance(side, MiniconsScorer):
            side.choose(trial)
    tried = lm.score(trial, progress=False)
    errors = {peer: _error(tried, side(trial)) for peer, side in sides.items()}
    times: dict[str, list[float]] = {peer: [] for peer in ["", *sides]}  # texts a second; ours under ""
    agreeing = [peer for peer in sides if errors[peer] <= FLOAT32_BOUND]
    for r in range(rounds if agreeing else 0):
        share = texts[r::rounds]
        order = ["", *agreeing]
        found: dict[str, Any] = {}
        for peer in order if r % 2 == 0 else order[::-1]:
            start = time.perf_counter()
            found[peer] = sides[peer](share) if peer else lm.score(share, progress=False)
            times[peer].append(len(share) / (time.perf_counter() - start))
        for peer in agreeing:  # all that was timed is checked, not only the trial
            errors[peer] = float(np.maximum(errors[peer], _error(found[""], found[peer])))  # a NaN stays one
    with backends.forced(None if backend == "auto" else backend):
        services = "+".join(sorted({service.backend for service in backends.report("cpu")}))
    for peer, side in sides.items():
        agrees = bool(errors[peer] <= FLOAT32_BOUND)
        row: dict[str, Any] = {"model": name, "peer": side.name, "texts": len(texts), "agrees": agrees}
        row |= {"error": errors[peer], "bound": FLOAT32_BOUND, "backend": services}
        row["peer_batch"] = getattr(side, "batch", 1)
        if agrees:
            row |= _rates(times[""], times[peer])
        yield row


def _error(ours: Sequence[mlmfast.Score], theirs: Sequence[float]) -> float:
    """The largest difference of two totals, each over the sum of its tokens' ``max(1, |log-probability|)``."""
    scale = [float(np.maximum(1, np.abs(score.logprobs)).sum()) for score in ours]
    return float(np.max([abs(score.total - total) / of for score, total, of in zip(ours, theirs, scale)]))


def _rates(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Texts a second of both sides, and their ratio, by rounds."""
    found: dict[str, Any] = {}
    ratios = [a / b for a, b in zip(ours, theirs)]
    for name, values in (("texts_per_second", ours), ("peer_texts_per_second", theirs), ("ratio", ratios)):
        quartiles = summary(values)
        found[name] = quartiles["median"]
        found[f"{name}_quartiles"] = (quartiles["q1"], quartiles["q3"])
        found[f"{name}_rounds"] = quartiles["all"]
    found["ratio"] = found["texts_per_second"] / found["peer_texts_per_second"]
    return found


def record(header: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``--output`` writes."""
    return {"header": header, "rows": list(rows)}
