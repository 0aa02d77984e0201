"""Mask-append generation (Samuel 2024, arXiv 2406.04823, section 2.1).

A step reads ``[CLS] prompt generated [MASK] * num_masks [SEP]`` and predicts the first mask; further masks keep the
model from taking the next token for the last one. Two ways to compute it:

- :class:`ExactSteps`: a whole pass each time, of a plan like every other, so that prompts of any lengths, beams and
  drafts share packed batches.
- :class:`WindowSteps`, **approximate**: a pass over the last tokens and the masks, beside the cached keys and values of
  the rest (:mod:`mlmfast.cache`).

What is chosen from the predictions is up to :mod:`mlmfast.searches`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mlmfast.architectures.spec import EncoderSpec
from mlmfast.budget import make_room, out_of_memory
from mlmfast.cache import Cache, Line, StepBatch, step_batch
from mlmfast.execution import Reader, Targets
from mlmfast.graphs import Graphs
from mlmfast.masking import MaskPlan
from mlmfast.ops.mask_append_step import mask_append_step
from mlmfast.searches import Ask, BeamSearch, Found, GreedySearch

Search = GreedySearch | BeamSearch

# Continuations that are computed at once; the others wait until one has ended.
CONTINUATIONS = 64
# Steps whose longest sequences fall into the same bucket of this many keys replay one recording.
BUCKET = 64


@dataclass(frozen=True)
class Frame:
    """What stands around a continuation.

    Attributes:
        before: special tokens before the prompt.
        masks: how many are appended.
        after: special tokens after the masks.
        mask_token_id: the mask's id.
        lookback: how many positions left of a mask its prediction is read.
    """

    before: tuple[int, ...]
    masks: int
    after: tuple[int, ...]
    mask_token_id: int
    lookback: int = 0

    @property
    def tokens(self) -> int:
        """How many it adds to a continuation."""
        return len(self.before) + self.masks + len(self.after)

    def around(self, token_ids: Sequence[int]) -> np.ndarray:
        """The whole sequence, int64 ``[L]``."""
        return np.array([*self.before, *token_ids, *[self.mask_token_id] * self.masks, *self.after], np.int64)

    def masked(self, token_ids: Sequence[int]) -> range:
        """Where its masks stand."""
        first = len(self.before) + len(token_ids)
        return range(first, first + self.masks)


class Steps(Protocol):
    """How a step is computed: for continuations in slots, what stands at the masks that they ask for."""

    slots: int

    def __call__(self, asks: Sequence[Ask]) -> Found: ...

    def copy(self, moves: Sequence[tuple[int, int]], asks: Sequence[Ask]) -> None:
        """Before the asks are computed: slots ``target`` take over what ``source`` held, for ``(source, target)``."""

    def release(self, slot: int) -> None:
        """The slot is free for another search."""


class ExactSteps:
    """Whole passes.

    Args:
        frame: what stands around.
        compute: a plan -> what was read at its targets, as :func:`mlmfast.execution.run` gives it.
        slots: continuations at once.
    """

    def __init__(self, frame: Frame, compute: Callable[[MaskPlan], dict[str, np.ndarray]], slots: int) -> None:
        self.slots = slots
        self._frame = frame
        self._compute = compute

    def __call__(self, asks: Sequence[Ask]) -> Found:
        return found_in(self._compute(plan_of(self._frame, asks)))

    def copy(self, moves: Sequence[tuple[int, int]], asks: Sequence[Ask]) -> None:
        pass  # nothing is kept

    def release(self, slot: int) -> None:
        pass


def plan_of(frame: Frame, asks: Sequence[Ask]) -> MaskPlan:
    """The copies of a step: one a continuation, all its masks masked, the first of them scored."""
    masked = [frame.masked(ask.token_ids) for ask in asks]
    counts = np.array([ask.masks for ask in asks], np.int64)
    copies = np.arange(len(asks))
    return MaskPlan(
        sequences=[frame.around(ask.token_ids) for ask in asks],
        mask_token_id=frame.mask_token_id,
        copy_sequences=copies,
        mask_offsets=np.arange(len(asks) + 1) * frame.masks,
        masked_positions=np.concatenate([np.array(places, np.int64) for places in masked]),
        score_offsets=np.concatenate([[0], np.cumsum(counts)]),
        score_copies=np.repeat(copies, counts),
        score_positions=np.concatenate([np.array(places[: ask.masks], np.int64) for places, ask in zip(masked, asks)]),
        targets=np.zeros(counts.sum(), np.int64),  # whichever: what is read does not depend on them
        lookback=frame.lookback,
    )


def found_in(values: dict[str, np.ndarray]) -> Found:
    """What a reader gave: of the best tokens, or whole rows with the shift from log-probabilities to logits."""
    if "ids" in values:
        return Found(values["ids"], values["logprobs"])
    return Found(None, values["logprobs"], values["shifts"])


class WindowSteps:
    """**Approximate**: the last tokens, the masks and what follows them; everything anew now and then.

    Args:
        spec: the model.
        frame: what stands around.
        read: what is wanted at each mask.
        cache: where earlier rows' keys and values are kept.
        device: where the weights are.
        batch_tokens: most rows computed at once.
        recompute: how many of the last tokens are computed in a step, the new one among them.
        refresh: after how many steps all of them are; None for never.
        record: replay steps as CUDA graphs.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        frame: Frame,
        read: Reader,
        cache: Cache,
        *,
        device: torch.device,
        batch_tokens: int,
        recompute: int,
        refresh: int | None,
        record: bool = False,
    ) -> None:
        self.slots = cache.slots
        self._spec = spec
        self._frame = frame
        self._read = read
        self._cache = cache
        self._device = device
        self._batch_tokens = batch_tokens
        self._recompute = recompute
        self._refresh = refresh
        # Of each slot: tokens that it has rows of, and steps since all of them were computed.
        self._held = [0] * cache.slots
        self._age = [0] * cache.slots
        self._granularity = BUCKET if record else 1
        step = partial(mask_append_step, cache=cache)
        self._graphs: Graphs[StepBatch] | None = Graphs(step) if record else None
        self._states: Callable[[StepBatch], Tensor]
        if self._graphs is not None:
            self._states = self._graphs.over(spec, frame.mask_token_id, device)
        else:
            self._states = lambda batch: step(spec, batch.to(device), frame.mask_token_id)

    def __call__(self, asks: Sequence[Ask]) -> Found:
        order = sorted(range(len(asks)), key=lambda i: asks[i].slot)
        lines = [self._line(asks[i]) for i in order]
        parts = [part for some in self._chunks(lines) for part in self._computed(some)]
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        # A row a mask that was read, in the order of slots; back to the order of the asks.
        starts = np.cumsum([0, *(asks[i].masks for i in order)])
        place = {i: range(starts[n], starts[n + 1]) for n, i in enumerate(order)}
        back = [row for i in range(len(asks)) for row in place[i]]
        return found_in({name: array[back] for name, array in values.items()})

    def copy(self, moves: Sequence[tuple[int, int]], asks: Sequence[Ask]) -> None:
        longest = max((len(ask.token_ids) for ask in asks), default=0) + self._frame.tokens
        sources, targets = [s for s, _ in moves], [t for _, t in moves]
        self._cache.copy(sources, targets, min(longest, self._cache.capacity))
        held, age = list(self._held), list(self._age)
        for source, target in moves:
            self._held[target], self._age[target] = held[source], age[source]

    def release(self, slot: int) -> None:
        self._held[slot] = 0

    def _line(self, ask: Ask) -> Line:
        tokens = len(ask.token_ids)
        before = len(self._frame.before)
        held, self._age[ask.slot] = self._held[ask.slot], self._age[ask.slot] + 1
        if held == 0 or (self._refresh is not None and self._age[ask.slot] >= self._refresh):
            start, self._age[ask.slot] = 0, 0
        else:
            start = max(0, min(held, tokens - self._recompute))
            start += before if start else 0  # a window over all tokens holds what stands before them, too
        self._held[ask.slot] = tokens
        masked = self._frame.masked(ask.token_ids)
        # No row further left than the last token's is read, and that one is always computed.
        read = range(masked.start - self._frame.lookback, masked.start - self._frame.lookback + ask.masks)
        return Line(ask.slot, self._frame.around(ask.token_ids), start, masked, read)

    def _chunks(self, lines: Sequence[Line]) -> Iterator[list[Line]]:
        """Neighbouring lines of at most ``batch_tokens`` rows together, or single ones beyond."""
        chunk: list[Line] = []
        for line in lines:
            if chunk and sum(one.rows for one in chunk) + line.rows > self._batch_tokens:
                yield chunk
                chunk = []
            chunk.append(line)
        yield chunk

    def _computed(self, lines: list[Line]) -> list[dict[str, np.ndarray]]:
        """What was read of some lines, of half of them at a time if memory runs out."""
        batch = step_batch(self._spec.embedding, lines, self._cache, self._granularity)
        try:
            hidden = self._states(batch)
            rows = torch.arange(len(hidden), device=hidden.device)
            found = self._read(self._spec.head, hidden, Targets(torch.zeros_like(rows), rows))
            return [{name: tensor.cpu().numpy() for name, tensor in found.items()}]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            forgotten = self._graphs is not None and self._graphs.forget()  # what they held may be what was missing
            make_room(self._device)
            if len(lines) == 1 and not forgotten:
                raise
        if forgotten:
            return self._computed(lines)
        half = len(lines) // 2
        return self._computed(lines[:half]) + self._computed(lines[half:])


class Decoder:
    """Runs searches until all have ended, as many at a time as there are slots.

    Attributes:
        searches: in the order given, their results there after each step.
    """

    def __init__(self, searches: Sequence[Search], steps: Steps) -> None:
        self.searches = searches
        self._steps = steps

    def run(self) -> Iterator[list[int]]:
        """After each step, yields the searches that took part."""
        waiting = deque(range(len(self.searches)))
        slots: dict[int, list[int]] = {}  # of each active search
        free = list(range(self._steps.slots))[::-1]
        while waiting or slots:
            while waiting and (self.searches[waiting[0]].slots <= len(free) or not slots):
                search = waiting.popleft()
                slots[search] = [free.pop() for _ in range(self.searches[search].slots)]
            asks: list[Ask] = []
            rows: dict[int, slice] = {}  # of what is found
            moves: list[tuple[int, int]] = []
            for search, own in slots.items():
                moves += [(own[source], own[target]) for source, target in self.searches[search].moves()]
                begin = sum(ask.masks for ask in asks)
                asks += [Ask(ask.token_ids, own[ask.slot], ask.masks) for ask in self.searches[search].asks()]
                rows[search] = slice(begin, sum(ask.masks for ask in asks))
            self._steps.copy(moves, asks)
            found = self._steps(asks)
            for search in list(slots):
                self.searches[search].take(found.at(rows[search]))
                if self.searches[search].done:
                    for slot in slots.pop(search):
                        self._steps.release(slot)
                        free.append(slot)
            yield list(rows)
