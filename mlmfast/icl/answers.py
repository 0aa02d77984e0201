"""Every answer that a model has given, kept in a file: what an interrupted evaluation continues from.

lm_eval's own cache is not used. Its key is the request alone, so two models (or metrics) that share a file would share
answers, and its values are pickles, which may hold anything when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from mlmfast.icl.last_word import KIND, last_words
from mlmfast.ledger import Ledger, Record

# What is computed and kept together. Few characters for long prompts, so that little is lost; many requests where they
# are short, so that batches are full.
REQUESTS, CHARACTERS = 512, 1 << 18


class Answers(Ledger):
    """A ledger whose records are groups of requests computed together: name of a request -> answer.

    After an interruption the same requests are computed in the same groups as without it, and what a batch does to last
    digits is the same.

    Args:
        path: the file, made if it is not there.
        identity: all that the answers depend on besides the requests: weights, metric, dtype ...
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._known: dict[str, Any] = {}
        super().__init__(path, identity)

    def take(self, records: Sequence[Record]) -> None:
        for group in records:
            self._known |= group

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]


class Answering(LM):
    """A model of lm_eval's that asks another one only what has not been answered yet.

    Args:
        lm: the model.
        answers: where its answers are kept.
        lengths: requests of one kind -> the tokens of each; for ``prepare``.
        limit: tokens that the model holds; None: any number.
        prepare: is told the longest request, in tokens, of each group before it is computed.
        progress: is told how many requests were answered.

    Attributes:
        asked: requests, each counted as often as it came.
        computed: those that reached the model.
        cut: of all that came, those too long for the model, whose contexts lost their beginnings.
    """

    def __init__(
        self,
        lm: Any,
        answers: Answers,
        lengths: Callable[[str, Sequence[Instance]], list[int]],
        limit: int | None,
        prepare: Callable[[int], None] = lambda longest: None,
        progress: Callable[[int], None] = lambda number: None,
    ) -> None:
        super().__init__()
        self.asked = self.computed = self.cut = 0
        self._lm = lm
        self._answers = answers
        self._lengths = lengths
        self._limit = limit
        self._prepare = prepare
        self._progress = progress

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return [(value[0], value[1]) for value in self._answered("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return self._answered("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._answered("generate_until", requests)

    def last_word(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The GPT-2 paper's filtered LAMBADA: :mod:`mlmfast.icl.last_word`."""
        return [(value[0], value[1]) for value in self._answered(KIND, requests)]

    @property
    def tokenizer_name(self) -> str:
        return str(self._lm.tokenizer_name)

    def _answered(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        keys = [key_of(kind, request.args) for request in requests]
        distinct = dict(zip(keys, requests))
        new = [(key, request) for key, request in distinct.items() if key not in self._answers]
        self._progress(len(distinct) - len(new))
        for group in groups(new, kind):
            members = [request for _, request in group]
            lengths = self._lengths_of(kind, members)
            self._prepare(max(lengths))
            with seeded(group[0][0]) if samples(kind, members[0]) else nullcontext():
                found = (
                    last_words(self._lm, members)
                    if kind == KIND
                    else getattr(self._lm, kind)(members, disable_tqdm=True)
                )
            cut = [self._limit is not None and length > self._limit for length in lengths]
            self._answers.add([{key: [answer, over] for (key, _), answer, over in zip(group, found, cut)}])
            self.computed += len(group)
            self._progress(len(group))
        self.asked += len(requests)
        self.cut += sum(self._answers[key][1] for key in keys)
        return [self._answers[key][0] for key in keys]

    def _lengths_of(self, kind: str, requests: Sequence[Instance]) -> list[int]:
        """Tokens of each request; of a text that is read in windows those of a window."""
        if kind == "loglikelihood_rolling":
            return [self._limit or 0] * len(requests)
        return self._lengths(kind, requests)


def key_of(kind: str, arguments: Sequence[Any]) -> str:
    """A request's name in the file."""
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()


def samples(kind: str, request: Instance) -> bool:
    """Whether the answer's tokens are drawn."""
    return kind == "generate_until" and bool(request.args[1].get("do_sample"))


@contextmanager
def seeded(key: str) -> Iterator[None]:
    """Random numbers that a request's name alone decides, so a run that goes on, or asks for more, draws the same."""
    with torch.random.fork_rng():
        torch.manual_seed(int(key[:15], 16))
        yield


def groups(requests: Sequence[tuple[str, Instance]], kind: str) -> Iterator[list[tuple[str, Instance]]]:
    """Consecutive requests that are computed together; one whose tokens are drawn is alone."""
    group: list[tuple[str, Instance]] = []
    size = 0
    for key, request in requests:
        if samples(kind, request):
            yield [(key, request)]
            continue
        group.append((key, request))
        size += sum(len(part) for part in request.args if isinstance(part, str))
        if len(group) == REQUESTS or size >= CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
