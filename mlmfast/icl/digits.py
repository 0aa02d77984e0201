"""Digits only: the rule that generation follows in the needle test, as objects of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from mlmfast.errors import RequestError


def digit_counts(tokenizer: Any) -> Tensor:
    """How many digits each token stands for, int64 ``[V]``; 0 for every token that is not digits alone.

    A token is digits alone if ``str.isdigit()`` holds of what it decodes to, so one that begins with a space is none
    (Samuel 2024); WordPiece's later pieces (``##12``) are taken for what they add to a word.

    Raises:
        RequestError: no token is.
    """
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    counts = torch.zeros(max(ids) + 1, dtype=torch.long)
    for i, text, piece in zip(ids, texts, pieces):
        if piece is not None and piece.startswith("##"):
            text = piece[2:]
        if text.isdigit():
            counts[i] = len(text)
    if not counts.any():
        raise RequestError("the tokenizer has no token of digits alone, so no number can be generated")
    return counts


class DigitsOnly(LogitsProcessor):
    """Forbids every token that is not digits alone.

    Args:
        counts: of :func:`digit_counts`.
    """

    def __init__(self, counts: Tensor) -> None:
        self.allowed = counts > 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        width = min(len(allowed), len(self.allowed))  # the model may have more rows than the tokenizer tokens, or fewer
        allowed[:width] = self.allowed[:width]
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


class DigitsWritten(StoppingCriteria):
    """Ends a continuation that has so many digits: what would follow is not looked at.

    Args:
        counts: of :func:`digit_counts`.
        digits: so many, after a prompt that does not itself end with a digit.
    """

    def __init__(self, counts: Tensor, digits: int) -> None:
        self.counts = counts
        self.digits = digits

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """Of each row of ``input_ids``, ``[n, length]``, whether it has ended; bool ``[n]``."""
        last = input_ids[:, -self.digits :].cpu()
        counts = torch.where(last < len(self.counts), self.counts[last.clamp(max=len(self.counts) - 1)], 0).flip(1)
        unbroken = (counts > 0).cumprod(1)
        return ((counts * unbroken).sum(1) >= self.digits).to(input_ids.device)
