"""Sequences or a plan -> values at their targets: batches through the encoder and a vocabulary op.

Memory is bounded on both ends: copies are planned a window at a time, and a batch that does not fit is halved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlmfast.architectures.spec import Head
from mlmfast.budget import make_room, out_of_memory
from mlmfast.encoder import encode, predict
from mlmfast.generic import GenericSpec, LogitsHead, Spec
from mlmfast.graphs import Graphs
from mlmfast.masking import MaskPlan, TokenSequence, copies_of, make_plan, parted
from mlmfast.packing import PackedBatch, halves, pack
from mlmfast.reference import accumulation
from mlmfast.staging import transferred

# What is read at the scored rows: head, its hidden states [R, e], targets -> arrays with a row a target, [N, ...].
Reader = Callable[[Head | LogitsHead, Tensor, "Targets"], dict[str, Tensor]]

# Takes whole distributions while they pass: some scored tokens' sequences, int64 [n], their positions there, int64
# [n], and the log-probabilities [n, V] on the weights' device.
Visitor = Callable[[np.ndarray, np.ndarray, Tensor], None]

# Rows of copies planned at once. Identical copies are found within such a window of sequences.
WINDOW_TOKENS = 1 << 21
# Scored rows that are read together, from as many batches as it takes: a vocabulary is hundreds of megabytes, and the
# few scored rows of one batch of short texts would not pay for bringing it from memory.
READ_ROWS = 512
# Most bytes that wait for that: a generic model's rows are as wide as its vocabulary.
READ_BYTES = 64 << 20
# Rows of whole distributions computed at once.
CHUNK = 64
# Bytes of what was read that may wait on a device before it is fetched; a CPU's results are where they should be.
PATIENCE = {"cpu": 0}
USUAL_PATIENCE = 1 << 24


@dataclass(frozen=True)
class Targets:
    """What is predicted at some scored rows.

    Attributes:
        ids: int64 ``[N]``, token ids.
        rows: int64 ``[N]``, the row of the hidden states ``[R, e]`` that each is read from.
        order: int64 ``[N]`` on the host, the place of each in its plan; None without a plan.
    """

    ids: Tensor
    rows: Tensor
    order: np.ndarray | None = None

    @classmethod
    def of(cls, batches: Sequence[PackedBatch], device: torch.device) -> Targets:
        """Those of batches whose scored rows stand one after another, brought to a device."""
        starts = accumulate([len(batch.scored_rows) for batch in batches], initial=0)
        ids = torch.cat([batch.targets for batch in batches])
        rows = torch.cat([batch.target_rows + start for batch, start in zip(batches, starts)])
        order = np.concatenate([batch.order.numpy() for batch in batches])
        ids, rows = transferred([ids, rows], device)
        return cls(ids, rows, order)


class Values:
    """What was read at a plan's targets, put in the plan's order on the host.

    Fetching from an accelerator waits for everything that was launched, so what was read stays there while it is small,
    and the next batches are launched meanwhile.
    """

    def __init__(self, targets: int, patience: int) -> None:
        """``targets``: number of the plan's; ``patience``: bytes that may wait to be fetched."""
        self._targets = targets
        self._patience = patience
        self._arrays: dict[str, np.ndarray] = {}
        self._waiting: list[tuple[np.ndarray, dict[str, Tensor]]] = []
        self._bytes = 0

    def add(self, order: np.ndarray, found: dict[str, Tensor]) -> None:
        """Takes named values ``[n, ...]`` of the targets at the places ``order`` int64 ``[n]`` of the plan."""
        self._waiting.append((order, found))
        self._bytes += sum(tensor.nbytes for tensor in found.values())
        if self._bytes > self._patience:
            self._fetch()

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, ``[targets, ...]`` a name."""
        self._fetch()
        return self._arrays

    def _fetch(self) -> None:
        for order, found in self._waiting:
            for name, tensor in found.items():
                array = tensor.cpu().numpy()
                if name not in self._arrays:
                    self._arrays[name] = np.empty((self._targets, *array.shape[1:]), array.dtype)
                self._arrays[name][order] = array
        self._waiting.clear()
        self._bytes = 0


def read_logprobs(temperature: float = 1.0, ranks: bool = False, entropies: bool = False) -> Reader:
    """Reads ``logprobs``, and on request ``ranks`` and ``entropies``."""

    def read(head: Head | LogitsHead, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        logprobs, places, spread = head.vocab_logprob(hidden, targets.ids, targets.rows, temperature, ranks, entropies)
        values = {"logprobs": logprobs}
        if ranks:
            values["ranks"] = places
        if entropies:
            values["entropies"] = spread[targets.rows]
        return values

    return read


def read_best(top_k: int, temperature: float = 1.0) -> Reader:
    """Reads the ``top_k`` best ``logprobs`` and their ``ids``."""

    def read(head: Head | LogitsHead, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        logprobs, ids = head.vocab_topk(hidden, top_k, temperature)
        return {"logprobs": logprobs[targets.rows], "ids": ids[targets.rows]}

    return read


def read_rows(temperature: float = 1.0) -> Reader:
    """Reads whole distributions, ``logprobs [N, V]``: here they are the result, so they are held, on the CPU."""

    def read(head: Head | LogitsHead, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        whole = torch.empty(len(targets.ids), head.vocab_size, dtype=accumulation(hidden.dtype))
        for start in range(0, len(targets.ids), CHUNK):
            rows = hidden[targets.rows[start : start + CHUNK]]
            whole[start : start + CHUNK] = head.vocab_rows(rows, temperature)
        return {"logprobs": whole}

    return read


def read_logits() -> Reader:
    """Reads whole distributions as :func:`read_rows` does, and ``shifts [N]``: a logit less its log-probability."""
    rows = read_rows()

    def read(head: Head | LogitsHead, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        logprobs = rows(head, hidden, targets)["logprobs"]
        return {"logprobs": logprobs, "shifts": head.first_logits(hidden[targets.rows]).cpu() - logprobs[:, 0]}

    return read


def read_past(take: Callable[[np.ndarray, Tensor], None], targets: int, temperature: float = 1.0) -> Reader:
    """Reads nothing: hands whole distributions to ``take``, :data:`CHUNK` targets at a time, so that none is held.

    Args:
        take: called with some targets' places in the plan, int64 ``[n]``, and log-probabilities ``[n, V]``, which it
            may overwrite. Each target comes once, also where a batch runs out of memory on the way and is read again.
        targets: of the plan.
    """
    taken = np.zeros(targets, bool)

    def read(head: Head | LogitsHead, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        assert targets.order is not None
        rows = targets.rows.cpu().numpy()
        left = np.flatnonzero(~taken[targets.order])
        left = left[np.argsort(rows[left], kind="stable")]  # targets of one row are neighbours: it is computed once
        for start in range(0, len(left), CHUNK):
            places = targets.order[left[start : start + CHUNK]]
            own, which = np.unique(rows[left[start : start + CHUNK]], return_inverse=True)
            logprobs = head.vocab_rows(hidden[torch.from_numpy(own).to(hidden.device)], temperature)
            take(places, logprobs if len(own) == len(places) else logprobs[torch.from_numpy(which).to(hidden.device)])
            taken[places] = True
        return {}

    return read


def compute(
    spec: Spec,
    sequences: Sequence[TokenSequence],
    mask_token_id: int,
    masking: dict[str, Any],
    read: Reader,
    *,
    device: torch.device,
    batch_tokens: int,
    graphs: Graphs[PackedBatch] | None = None,
    advance: Callable[[float], Any],
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """Plans and computes sequences, a window of copies at a time.

    Args:
        spec, read, device, batch_tokens, graphs: as in :func:`run`.
        sequences: what to score.
        mask_token_id, masking: of :func:`mlmfast.masking.make_plan`.
        advance: told how many sequences have been computed since it was told last, in fractions.

    Yields:
        Each sequence's place in the order given, its scored positions int64 ``[n]``, and what was read there.
    """
    parts = _parts(sequences, masking)
    awaited = Counter(i for i, _ in parts)
    found: list[dict[str, np.ndarray]] = []
    for places, plan, step in _plans(parts, mask_token_id, masking, advance):
        values = run(spec, plan, read, device=device, batch_tokens=batch_tokens, graphs=graphs, advance=step)
        values["positions"] = plan.score_positions
        for n, i in enumerate(places):
            mine = slice(plan.score_offsets[n], plan.score_offsets[n + 1])
            found.append({name: array[mine] for name, array in values.items()})
            if len(found) == awaited[i]:  # the parts of a sequence are neighbours
                own = {name: np.concatenate([part[name] for part in found]) for name in values}
                found = []
                yield i, own.pop("positions"), own


def visit(
    spec: Spec,
    sequences: Sequence[TokenSequence],
    mask_token_id: int,
    masking: dict[str, Any],
    take: Visitor,
    temperature: float = 1.0,
    *,
    device: torch.device,
    batch_tokens: int,
    graphs: Graphs[PackedBatch] | None = None,
    advance: Callable[[float], Any],
) -> None:
    """Plans and computes sequences as :func:`compute` does, and hands whole distributions over while they pass.

    Args:
        take: see :data:`Visitor`; each scored token comes once, in no order, as :func:`read_past` says.
        temperature: divides the logits.
    """
    for places, plan, step in _plans(_parts(sequences, masking), mask_token_id, masking, advance):
        owners = np.repeat(np.array(places, np.int64), np.diff(plan.score_offsets))
        read = read_past(partial(_hand_over, take, owners, plan.score_positions), len(owners), temperature)
        run(spec, plan, read, device=device, batch_tokens=batch_tokens, graphs=graphs, advance=step)


def _hand_over(take: Visitor, owners: np.ndarray, positions: np.ndarray, places: np.ndarray, logprobs: Tensor) -> None:
    take(owners[places], positions[places], logprobs)


def _parts(sequences: Sequence[TokenSequence], masking: dict[str, Any]) -> list[tuple[int, TokenSequence]]:
    """Sequences and their places; a long one is computed in parts, so that a window stays bounded."""
    return [(i, part) for i, s in enumerate(sequences) for part in parted(s, masking["metric"], WINDOW_TOKENS)]


def _plans(
    parts: Sequence[tuple[int, TokenSequence]],
    mask_token_id: int,
    masking: dict[str, Any],
    advance: Callable[[float], Any],
) -> Iterator[tuple[list[int], MaskPlan, Callable[[float], Any]]]:
    """A window at a time: the places of its sequences, their plan, and what is to be told how far that has come."""
    awaited = Counter(i for i, _ in parts)
    for window in _windows(parts, masking):
        plan = make_plan([part for _, part in window], mask_token_id, **masking)
        share = sum(1 / awaited[i] for i, _ in window)
        yield [i for i, _ in window], plan, partial(_scaled, advance, share)


def _scaled(advance: Callable[[float], Any], factor: float, share: float) -> None:
    advance(factor * share)


def _windows(
    parts: Sequence[tuple[int, TokenSequence]], masking: dict[str, Any]
) -> Iterator[list[tuple[int, TokenSequence]]]:
    """Sequences in groups whose copies together stay within :data:`WINDOW_TOKENS` rows, or single ones beyond it."""
    window: list[tuple[int, TokenSequence]] = []
    rows = 0
    for i, part in parts:
        own = len(part) * copies_of(part, masking["metric"], masking.get("stride", 8))
        if window and rows + own > WINDOW_TOKENS:
            yield window
            window, rows = [], 0
        window.append((i, part))
        rows += own
    if window:
        yield window


def run(
    spec: Spec,
    plan: MaskPlan,
    read: Reader,
    *,
    device: torch.device,
    batch_tokens: int,
    graphs: Graphs[PackedBatch] | None = None,
    advance: Callable[[float], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Computes a plan.

    Args:
        spec: the model.
        plan: what to mask and what to score.
        read: what is wanted at each target.
        device: where the weights are.
        batch_tokens: most packed rows at once; a batch that runs out of memory is halved and retried.
        graphs: replays small batches whose shape returns, made with :func:`head_states`; None for none of that.
        advance: told after each batch which share of the plan's work it was (on an accelerator: when it was launched).

    Returns:
        Named arrays with a row a target, in the plan's order.
    """
    waiting = pack(plan, batch_tokens)[::-1]
    rows = sum(batch.tokens for batch in waiting)
    values = Values(len(plan.targets), PATIENCE.get(device.type, USUAL_PATIENCE))
    if graphs is None or isinstance(spec, GenericSpec):  # whose own code may wait for the device
        states = _plain(spec, plan, device)
    else:
        states = graphs.over(spec, plan.mask_token_id, device)
    encoded: list[tuple[PackedBatch, Tensor]] = []  # not read yet, with the head's hidden states [R, e]
    while waiting:
        batch = waiting.pop()
        try:
            encoded.append((batch, states(batch)))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            forgotten = graphs is not None and graphs.forget()  # what they held may be what was missing
            make_room(device)
            if forgotten:
                waiting.append(batch)
            elif batch.copies > 1:
                waiting.extend(halves(batch)[::-1])
            else:
                raise
            continue
        rows_read, bytes_read = (sum(count) for count in zip(*((len(hidden), hidden.nbytes) for _, hidden in encoded)))
        if not waiting or rows_read >= READ_ROWS or bytes_read >= READ_BYTES:
            for order, found in _read(spec.head, encoded, read):
                values.add(order, found)
            encoded.clear()
        if advance is not None:
            advance(batch.tokens / rows)
    return values.arrays()


def head_states(spec: Spec, batch: PackedBatch, mask_token_id: int) -> Tensor:
    """The whole pass up to the vocabulary: the head's hidden states ``[R, e]`` of a batch on the weights' device.

    A generic model's own code goes farther: what its head reads are logits ``[R, V]``.
    """
    if isinstance(spec, GenericSpec):
        return spec.scored_logits(batch, mask_token_id)
    return predict(spec, encode(spec, batch, mask_token_id))


def _plain(spec: Spec, plan: MaskPlan, device: torch.device) -> Callable[[PackedBatch], Tensor]:
    return lambda batch: head_states(spec, batch.to(device), plan.mask_token_id)


def _read(
    head: Head | LogitsHead, encoded: Sequence[tuple[PackedBatch, Tensor]], read: Reader
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """What is read at the scored rows of some batches together, or of half of them at a time if memory runs out.

    Yields the places of the targets in the plan, and what was found there.
    """
    batches = [batch for batch, _ in encoded]
    try:
        targets = Targets.of(batches, encoded[0][1].device)
        found = read(head, torch.cat([hidden for _, hidden in encoded]), targets)
    except (RuntimeError, MemoryError) as error:
        if (len(encoded) == 1 and encoded[0][0].copies == 1) or not out_of_memory(error):
            raise
        make_room(encoded[0][1].device)
    else:
        assert targets.order is not None
        yield targets.order, found
        return
    if len(encoded) == 1:
        batch, hidden = encoded[0]
        first, second = halves(batch)
        encoded = [(first, hidden[: len(first.scored_rows)]), (second, hidden[len(first.scored_rows) :])]
    yield from _read(head, encoded[: len(encoded) // 2], read)
    yield from _read(head, encoded[len(encoded) // 2 :], read)
