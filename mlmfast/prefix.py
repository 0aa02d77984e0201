"""Many copies of texts that begin alike: their common prefix computed once. **Approximate.**

In a bidirectional model the prefix's states depend on what follows. Here they are those of one pass in which what
follows is masked, so that they have not seen any answer; each copy then computes only the rows after the prefix, beside
the prefix's cached keys and values (:mod:`mlmfast.cache`). There is such a pass for every length that texts have, for
the number of masks matters: where a single token follows, that pass is the copy itself and nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mlmfast.architectures.spec import EncoderSpec
from mlmfast.budget import free_memory
from mlmfast.cache import Cache, Line, cache_slots, step_batch
from mlmfast.execution import Reader, Targets
from mlmfast.graphs import Graphs
from mlmfast.masking import MaskPlan, TokenSequence, make_plan
from mlmfast.ops.mask_append_step import mask_append_step
from mlmfast.packing import PackedBatch, distinct_copies

# Copies that are computed at once. Each needs a copy of the prefix's keys and values, which costs about what computing
# a few rows does, so more pay only where there are many copies a slot.
SLOTS = 16


def common_prefix(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens all sequences begin with, none of them scored in any."""
    first = min(int(np.flatnonzero(s.scored & ~s.special)[0]) for s in sequences)
    for s in sequences[1:]:
        same = s.token_ids[:first] == sequences[0].token_ids[:first]
        first = first if same.all() else int(np.argmin(same))
    return first


def compute_after_prefix(
    spec: EncoderSpec,
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
    """:func:`mlmfast.execution.compute`, approximately: sequences that begin alike share their beginning's states.

    A pass is over the rows after the prefix of :data:`SLOTS` copies, or of as many as memory and ``batch_tokens``
    allow. ``graphs`` are not used.
    """
    if not sequences:
        return
    prefix = common_prefix(sequences)
    for length in sorted({len(sequence) for sequence in sequences}):
        places = [i for i, sequence in enumerate(sequences) if len(sequence) == length]
        plan = make_plan([sequences[i] for i in places], mask_token_id, **masking)
        values = _run(spec, plan, sequences[places[0]].special, prefix, read, device, batch_tokens)
        advance(len(places))
        for n, place in enumerate(places):
            mine = slice(plan.score_offsets[n], plan.score_offsets[n + 1])
            yield place, plan.score_positions[mine], {name: array[mine] for name, array in values.items()}


def _run(
    spec: EncoderSpec,
    plan: MaskPlan,
    special: np.ndarray,
    prefix: int,
    read: Reader,
    device: torch.device,
    batch_tokens: int,
) -> dict[str, np.ndarray]:
    """What is read at a plan's targets, named arrays with a row a target in the plan's order.

    All its sequences are as long as ``special`` bool ``[L]``, which says where one of them has special tokens.
    """
    start = max(0, prefix - plan.lookback)  # the row before the first scored token may be one that is read
    first, which = distinct_copies(plan)
    free = free_memory(device) if device.type == "cuda" else None
    slots = cache_slots(spec, len(special), min(SLOTS, len(first)), 1, free)
    cache = Cache(spec, max(1, min(slots, batch_tokens // (len(special) - start))), len(special))
    # Nothing of any answer: a mask at each token after the prefix.
    hidden = np.flatnonzero(~special & (np.arange(len(special)) >= prefix))
    ids = plan.sequences[0].copy()
    ids[hidden] = plan.mask_token_id
    blank = Line(0, ids, 0, hidden.tolist(), hidden[:1].tolist())
    mask_append_step(spec, step_batch(spec.embedding, [blank], cache).to(device), plan.mask_token_id, cache)
    cache.copy([0] * cache.slots, range(cache.slots), start)

    kinds = which[plan.score_copies]
    values: dict[str, np.ndarray] = {}
    for begin in range(0, len(first), cache.slots):
        lines: list[Line] = []
        targets: list[np.ndarray] = []  # in the plan, of each line
        rows: list[np.ndarray] = []  # of the hidden states, that each target is read from
        scored = 0
        for slot, kind in enumerate(range(begin, min(begin + cache.slots, len(first)))):
            copy = first[kind]
            masked = plan.masked_positions[plan.mask_offsets[copy] : plan.mask_offsets[copy + 1]]
            mine = np.flatnonzero(kinds == kind)
            places, row = np.unique(plan.read_positions(mine), return_inverse=True)
            lines.append(Line(slot, plan.sequences[plan.copy_sequences[copy]], start, masked.tolist(), places.tolist()))
            targets.append(mine)
            rows.append(row.reshape(-1) + scored)
            scored += len(places)
        order = np.concatenate(targets)
        batch = step_batch(spec.embedding, lines, cache).to(device)
        states = mask_append_step(spec, batch, plan.mask_token_id, cache)
        wanted = Targets(
            torch.from_numpy(plan.targets[order]).to(device), torch.from_numpy(np.concatenate(rows)).to(device)
        )
        for name, tensor in read(spec.head, states, wanted).items():
            array = tensor.cpu().numpy()
            values.setdefault(name, np.empty((len(plan.targets), *array.shape[1:]), array.dtype))[order] = array
    return values
