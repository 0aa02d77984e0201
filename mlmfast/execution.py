"""Plan -> values at its targets: batches through the encoder and a vocabulary op, smaller ones if memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlmfast.architectures.spec import EncoderSpec, Head
from mlmfast.encoder import encode, predict
from mlmfast.masking import MaskPlan
from mlmfast.ops.vocab_logprob import vocab_logprob
from mlmfast.ops.vocab_rows import vocab_rows
from mlmfast.ops.vocab_topk import vocab_topk
from mlmfast.packing import PackedBatch, halves, pack

# What is read at the scored rows: head, its hidden states [R, e], batch -> arrays with a row a target, [N, ...].
Reader = Callable[[Head, Tensor, PackedBatch], dict[str, Tensor]]

# Rows of whole distributions computed at once.
CHUNK = 64


def read_logprobs(temperature: float = 1.0, ranks: bool = False, entropies: bool = False) -> Reader:
    """Reads ``logprobs``, and on request ``ranks`` and ``entropies``."""

    def read(head: Head, hidden: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        logprobs, places, spread = vocab_logprob(
            hidden, head.vocabulary, head.bias, batch.targets, batch.target_rows, temperature, ranks, entropies
        )
        values = {"logprobs": logprobs}
        if ranks:
            values["ranks"] = places
        if entropies:
            values["entropies"] = spread[batch.target_rows]
        return values

    return read


def read_best(top_k: int, temperature: float = 1.0) -> Reader:
    """Reads the ``top_k`` best ``logprobs`` and their ``ids``."""

    def read(head: Head, hidden: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        logprobs, ids = vocab_topk(hidden, head.vocabulary, head.bias, top_k, temperature)
        return {"logprobs": logprobs[batch.target_rows], "ids": ids[batch.target_rows]}

    return read


def read_rows(temperature: float = 1.0) -> Reader:
    """Reads whole distributions, ``logprobs [N, V]``: here they are the result, so they are held once, on the CPU."""

    def read(head: Head, hidden: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        whole = [
            vocab_rows(hidden[start : start + CHUNK], head.vocabulary, head.bias, temperature).cpu()
            for start in range(0, len(hidden), CHUNK)
        ]
        return {"logprobs": torch.cat(whole)[batch.target_rows.cpu()]}

    return read


def run(
    spec: EncoderSpec,
    plan: MaskPlan,
    read: Reader,
    *,
    device: torch.device,
    batch_tokens: int,
    advance: Callable[[float], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Computes a plan.

    Args:
        spec: the model.
        plan: what to mask and what to score.
        read: what is wanted at each target.
        device: where the weights are.
        batch_tokens: most packed rows at once; a batch that runs out of memory is halved and retried.
        advance: told after each batch which share of the plan's work it was.

    Returns:
        Named arrays with a row a target, in the plan's order.
    """
    waiting = pack(plan, batch_tokens)[::-1]
    rows = sum(batch.tokens for batch in waiting)
    values: dict[str, np.ndarray] = {}
    while waiting:
        batch = waiting.pop()
        found = _attempt(spec, plan, read, batch, device)
        if found is None:
            waiting.extend(halves(batch)[::-1])
            continue
        for name, tensor in found.items():
            array = tensor.cpu().numpy()
            whole = values.setdefault(name, np.empty((len(plan.targets), *array.shape[1:]), array.dtype))
            whole[batch.order.numpy()] = array
        if advance is not None:
            advance(batch.tokens / rows)
    return values


def _attempt(
    spec: EncoderSpec, plan: MaskPlan, read: Reader, batch: PackedBatch, device: torch.device
) -> dict[str, Tensor] | None:
    """One batch; None if memory ran out and there are copies to part."""
    try:
        moved = batch.to(device)
        hidden = predict(spec, encode(spec, moved, plan.mask_token_id))
        return read(spec.head, hidden, moved)
    except RuntimeError as error:
        if batch.copies == 1 or not out_of_memory(error):
            raise
        return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator gave up: torch has a class for it on accelerators, and only messages on the CPU."""
    messages = ("can't allocate memory", "not enough memory")  # Linux and macOS; Windows
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
