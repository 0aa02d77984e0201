"""Rows that a tool has masked itself -> what a model predicts there.

Tools expand a text to padded rows, one a scored token. These are unpadded, equal ones are dropped, and all go through
the packed pass; what was masked, and so what is computed, stays the tool's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import mlmfast
from mlmfast.errors import TextError
from mlmfast.execution import WINDOW_TOKENS, Reader
from mlmfast.masking import OBJECTIVES, plan_of_copies
from mlmfast.model import MaskedLM


class MaskedRows(NamedTuple):
    """One text's rows, in the order in which minicons passes them around.

    Attributes:
        token_ids: int64 ``[T, L]``, masks in place.
        attention_mask: int64 ``[T, L]``, 0 at padding.
        targets: int64 ``[T]``, the token that each row predicts.
        positions: int64 ``[T]``, where in the row the prediction is read.
    """

    token_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    positions: Tensor


@lru_cache(maxsize=1)
def loaded(model: Any, tokenizer: Any) -> MaskedLM:
    """What functions that are given a live model at every call compute with; the last model is remembered.

    Loading looks at every weight, which is more work than scoring a sentence.
    """
    return model if isinstance(model, MaskedLM) else mlmfast.load(model, tokenizer)


def read_rows_of(lm: MaskedLM, texts: Iterable[Iterable[Any]], reader: Reader) -> Iterator[dict[str, np.ndarray]]:
    """What a reader finds at each text's rows, text by text in the order given.

    Args:
        lm: the model.
        texts: each a :class:`MaskedRows` or as many tensors. They are taken a window at a time, so a generator is
            never held whole.
        reader: of :mod:`mlmfast.execution`.

    Yields:
        Named arrays with a row a row of the text; none for a text without rows.

    Raises:
        TextError: a text is longer than the model holds.
    """
    waiting: list[_Copies] = []
    size = 0
    for index, text in enumerate(texts):
        copies = _unpadded(MaskedRows(*text))
        longest = max(map(len, copies.token_ids), default=0)
        if lm.max_length is not None and longest > lm.max_length:
            raise TextError(index, f"has {longest} tokens; {lm.name} holds {lm.max_length}: shorten or split it")
        waiting.append(copies)
        size += sum(map(len, copies.token_ids))
        if size >= WINDOW_TOKENS:
            yield from _computed(lm, waiting, reader)
            waiting, size = [], 0
    yield from _computed(lm, waiting, reader)


class _Copies(NamedTuple):
    """One text's rows without padding."""

    token_ids: list[np.ndarray]
    targets: np.ndarray
    positions: np.ndarray


def _unpadded(rows: MaskedRows) -> _Copies:
    token_ids, attention, targets, positions = (_array(tensor) for tensor in rows)
    seen = attention != 0
    before = np.cumsum(seen, 1) - seen  # [T, L] tokens to the left, padding not counted
    return _Copies(
        [row[mask] for row, mask in zip(token_ids, seen)],
        targets,
        before[np.arange(len(positions)), positions],
    )


def _array(values: Any) -> np.ndarray:
    return torch.as_tensor(values).cpu().numpy().astype(np.int64, copy=False)


def _computed(lm: MaskedLM, texts: list[_Copies], reader: Reader) -> Iterator[dict[str, np.ndarray]]:
    if not texts:
        return
    plan = plan_of_copies(
        [copy for text in texts for copy in text.token_ids],
        np.concatenate([text.positions for text in texts]),
        np.concatenate([text.targets for text in texts]),
        lm.tokenizer.mask_token_id,
        lookback=OBJECTIVES[lm.objective],
    )
    values = lm.read(plan, reader)
    for start, end in pairwise(accumulate([len(text.targets) for text in texts], initial=0)):
        yield {name: array[start:end] for name, array in values.items()}
