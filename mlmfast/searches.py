"""Which token comes next: greedy search, sampling, beam search, and greedy search with drafts.

A search is one prompt's. It says which continuations it wants to know more of, is given what the model predicts there,
and chooses; it knows nothing of models, packing or caches. The rules are those of transformers, and so are the objects:
``GenerationConfig``, logits processors, stopping criteria (:mod:`mlmfast.rules`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from mlmfast.rules import Rules

NOTHING = -1e9  # the score of a hypothesis that must not be chosen, as in transformers


@dataclass(frozen=True)
class Ask:
    """A continuation that a search wants to know more of.

    Attributes:
        token_ids: the prompt's and what was generated, no special tokens around them.
        slot: of the search's own, from 0: a cache keeps what it has computed by slot.
        masks: how many of the appended masks are read; the first ones.
    """

    token_ids: list[int]
    slot: int = 0
    masks: int = 1


@dataclass(frozen=True)
class Found:
    """What the model predicts at the masks that a search asked for, ``n`` of them, in order.

    Attributes:
        ids: int64 ``[n, k]``, the best tokens, best first; None where whole rows were asked for.
        logprobs: float32 ``[n, k]`` of those, or ``[n, V]``, natural logarithms.
        shifts: float32 ``[n]``, a logit less its log-probability; None where only the best were asked for.
    """

    ids: np.ndarray | None
    logprobs: np.ndarray
    shifts: np.ndarray | None = None

    def at(self, rows: slice) -> Found:
        """What was found at some masks."""
        ids, shifts = (None if array is None else array[rows] for array in (self.ids, self.shifts))
        return Found(ids, self.logprobs[rows], shifts)


@dataclass
class Hypothesis:
    """A prompt with some generated tokens.

    Attributes:
        token_ids: the prompt's, then the generated ones.
        logprobs: of the generated ones under the model, in nats.
        score: what beams are compared by.
        finished: why it ended; None while it has not. ``"not finite"``: the model's numbers are no numbers.
    """

    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    score: float = 0.0
    finished: str | None = None

    def extended(self, token: int, logprob: float, score: float = 0.0) -> Hypothesis:
        return Hypothesis([*self.token_ids, token], [*self.logprobs, logprob], score)


class GreedySearch:
    """The best token each time, or a sampled one.

    Args:
        prompt: token ids, without special ones.
        rules: what may be chosen and when to stop.
        generator: randomness of this search alone, where tokens are sampled.
    """

    slots = 1

    def __init__(self, prompt: Sequence[int], rules: Rules, generator: torch.Generator | None = None) -> None:
        self.line = Hypothesis(list(prompt))
        self.rules = rules
        self.processors = rules.processors()
        self.generator = generator
        self.best = None if self.processors or rules.sample else 1  # how many of the best tokens it reads; None: all

    @property
    def done(self) -> bool:
        return self.line.finished is not None

    def asks(self) -> list[Ask]:
        return [Ask(list(self.line.token_ids))]

    def moves(self) -> list[tuple[int, int]]:
        """Slots whose content another slot takes over before the next step, ``(source, target)``."""
        return []

    def take(self, found: Found) -> None:
        self._append(*self._choice(found, 0))

    def results(self) -> list[Hypothesis]:
        """What stands, best first; unfinished if it was interrupted."""
        return [self.line]

    def _choice(self, found: Found, row: int) -> tuple[int, float]:
        """The token chosen in a row of what was found, and its log-probability under the model."""
        if found.ids is not None:
            return int(found.ids[row, 0]), float(found.logprobs[row, 0])
        if not np.isfinite(found.logprobs[row]).any():
            return 0, math.nan
        assert found.shifts is not None
        scores = torch.from_numpy(found.logprobs[row : row + 1] + found.shifts[row])
        scores = processed(self.processors, [self.line.token_ids], scores)
        if self.rules.sample:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        else:
            token = int(scores.argmax(-1))
        return token, float(found.logprobs[row, token])

    def _append(self, token: int, logprob: float) -> None:
        self.line.token_ids.append(token)
        self.line.logprobs.append(logprob)
        finite = math.isfinite(logprob)
        self.line.finished = self.rules.stopped(self.line.token_ids) if finite else "not finite"


class DraftedSearch(GreedySearch):
    """Greedy search, several tokens a pass, and the same tokens up to rounding.

    The masks after the first predict tokens, too: the draft. The next pass computes the prompt with none, one, two ...
    of them appended, each with masks of its own, as plain search would. The first of these copies always counts, and
    each further one where the copy before it chose what was drafted.

    Args:
        masks: how many stand at the end of each copy.
    """

    def __init__(self, prompt: Sequence[int], rules: Rules, masks: int) -> None:
        super().__init__(prompt, rules)
        self.masks = self.slots = masks  # as many copies as it asks for at most
        self.draft: list[int] = []

    def asks(self) -> list[Ask]:
        ids = self.line.token_ids
        return [Ask(ids + self.draft[:n], masks=self.masks) for n in range(len(self.draft) + 1)]

    def take(self, found: Found) -> None:
        draft, self.draft = self.draft, []
        for copy in range(len(draft) + 1):
            token, logprob = self._choice(found, copy * self.masks)
            self._append(token, logprob)
            if self.done:
                return
            # Of the copy that was right last, what its further masks say: the first of them follows this token.
            further = slice(copy * self.masks + 1, (copy + 1) * self.masks)
            best = found.logprobs[further].argmax(1) if found.ids is None else found.ids[further, 0]
            self.draft = [int(one) for one in best][: self.rules.most - len(self.line.logprobs) - 1]
            if copy == len(draft) or token != draft[copy]:
                return


class BeamSearch:
    """Beam search with transformers' candidates, length penalty and early stopping.

    Args:
        prompt: token ids, without special ones.
        rules: what may be chosen and when to stop.
    """

    def __init__(self, prompt: Sequence[int], rules: Rules) -> None:
        self.rules = rules
        self.processors = rules.processors()
        self.slots = rules.beams
        # Enough that as many go on as there are beams, should the best end.
        self.candidates = max(2, 1 + len(rules.stop_ids)) * rules.beams
        self.best = None if self.processors else self.candidates
        self.running = [Hypothesis(list(prompt))]  # all beams are the same at first
        self.finished: list[Hypothesis] = []  # best first
        self.improvable = True
        self.done = False
        self._moves: list[tuple[int, int]] = []

    def asks(self) -> list[Ask]:
        return [Ask(list(line.token_ids), slot) for slot, line in enumerate(self.running)]

    def moves(self) -> list[tuple[int, int]]:
        return self._moves

    def take(self, found: Found) -> None:
        beams, rules = self.rules.beams, self.rules
        if np.isnan(found.logprobs).any():
            self.finished = [Hypothesis([*self.running[0].token_ids, 0], [math.nan], math.nan, "not finite")]
            self.done = True
            return
        before = np.array([line.score for line in self.running], np.float32)
        if found.ids is not None:
            ids, logprobs, scores = found.ids, found.logprobs, found.logprobs.astype(np.float32)
        else:
            prefixes = [line.token_ids for line in self.running]
            scores = processed(self.processors, prefixes, torch.from_numpy(found.logprobs.astype(np.float32))).numpy()
            logprobs = found.logprobs
            ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        scores = scores + before[:, None]
        order = _best(scores.reshape(-1), self.candidates)
        chosen: list[tuple[Hypothesis, int]] = []  # with the slot that each comes from
        for flat in order:
            parent, column = divmod(int(flat), scores.shape[1])
            logprob = float(logprobs[parent, column])
            line = self.running[parent].extended(int(ids[parent, column]), logprob, float(scores[parent, column]))
            line.finished = rules.stopped(line.token_ids)
            chosen.append((line, parent))

        full = len(self.finished) == beams
        if self.improvable and not (full and rules.early_stopping is True):
            for line, _ in chosen[:beams]:
                if line.finished is not None:
                    ended = Hypothesis(line.token_ids, line.logprobs, self._penalised(line), line.finished)
                    self.finished.append(ended)
            self.finished.sort(key=lambda line: -line.score)  # stable: what ended earlier stays before its equals
            del self.finished[beams:]

        going = [(line, parent) for line, parent in chosen if line.finished is None][:beams]
        self.running = [line for line, _ in going]
        self._moves = [(parent, slot) for slot, (_, parent) in enumerate(going)]
        if not going:
            self.done = True
            return
        hoped = self._hoped(self.running[0])
        worst = self.finished[-1].score if len(self.finished) == beams else NOTHING
        self.improvable = self.improvable and hoped > worst
        full = len(self.finished) == beams
        self.done = not self.improvable or (full and rules.early_stopping is True)

    def results(self) -> list[Hypothesis]:
        found = list(self.finished)
        if not self.done:  # interrupted: what was under way counts as it stands
            under_way = [line for line in self.running if line.logprobs]
            found += [Hypothesis(line.token_ids, line.logprobs, self._penalised(line)) for line in under_way]
            found.sort(key=lambda line: -line.score)
        return (found or self.running)[: self.rules.returned]

    def _penalised(self, line: Hypothesis) -> float:
        return line.score / len(line.logprobs) ** self.rules.length_penalty

    def _hoped(self, line: Hypothesis) -> float:
        """The best score that a running hypothesis may end with, as transformers guesses it."""
        length = len(line.logprobs)
        if self.rules.early_stopping == "never" and self.rules.length_penalty > 0:
            length = self.rules.most
        return line.score / length**self.rules.length_penalty


def processed(processors: LogitsProcessorList, prefixes: list[list[int]], scores: Tensor) -> Tensor:
    """What transformers' processors make of ``scores [n, V]`` after as many prefixes of one length."""
    return processors(cast(torch.LongTensor, torch.tensor(prefixes, dtype=torch.long)), cast(Any, scores))


def _best(scores: np.ndarray, count: int) -> Tensor:
    """Places of the greatest of ``scores [n]``, greatest first."""
    return torch.topk(torch.from_numpy(scores), min(count, len(scores))).indices
