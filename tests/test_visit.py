"""Whole distributions handed over while they pass: each token once, whatever happens on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS
from torch import Tensor
from truth import assert_near

from mlmfast import execution
from mlmfast.architectures.spec import Head
from mlmfast.errors import RequestError, TextError
from mlmfast.masking import TokenSequence
from mlmfast.model import MaskedLM


def sequences_of(lm: MaskedLM, texts: list[str]) -> list[TokenSequence]:
    found = []
    for text in texts:
        encoding = lm.tokenizer(text, return_special_tokens_mask=True)
        special = np.array(encoding["special_tokens_mask"], bool) & (
            np.array(encoding["input_ids"]) != lm.tokenizer.unk_token_id
        )
        found.append(TokenSequence(np.array(encoding["input_ids"]), special, ~special))
    return found


class Collected:
    """What was handed over, by sequence and position."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, owners: np.ndarray, positions: np.ndarray, logprobs: Tensor) -> None:
        assert len(owners) == len(positions) == len(logprobs) <= execution.CHUNK
        for key, row in zip(zip(owners.tolist(), positions.tolist()), logprobs.numpy().copy()):
            assert key not in self.rows, f"{key} came twice"
            self.rows[key] = row
        logprobs.zero_()  # a visitor's own

    def of(self, owner: int) -> np.ndarray:
        return np.array([row for (one, _), row in sorted(self.rows.items()) if one == owner])


@pytest.mark.parametrize("metric", ["original", "window", "unmasked"])
def test_each_token_once(lms: dict[str, MaskedLM], metric: str) -> None:
    """The same text twice shares copies, and a target's row with it."""
    for name, lm in lms.items():
        texts = [*TEXTS, TEXTS[0]]
        found, shares = Collected(), []
        lm.visit(sequences_of(lm, texts), found, metric=metric, temperature=0.5, advance=shares.append)
        wanted = lm.distributions(texts, metric=metric, temperature=0.5, top_k=None)
        for i, one in enumerate(wanted):
            assert_near(found.of(i), one.logprobs, 1e-5, f"{metric} of {name}")
        assert sum(shares) == pytest.approx(len(texts))


def test_out_of_memory(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose reading fails halfway is read again in halves, without the rows that were handed over."""
    lm, texts = lms["bert"], TEXTS * 3
    monkeypatch.setattr(execution, "CHUNK", 3)
    real, calls = Head.vocab_rows, []

    def failing(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        calls.append(len(hidden))
        if len(calls) in (3, 4, 7):
            raise MemoryError
        return real(self, hidden, temperature)

    monkeypatch.setattr(Head, "vocab_rows", failing)
    found = Collected()
    lm.visit(sequences_of(lm, texts), found)
    monkeypatch.undo()
    assert len(calls) > 7
    for i, one in enumerate(lm.distributions(texts, top_k=None)):
        assert_near(found.of(i), one.logprobs, 1e-5)


def test_windows_and_parts(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a few copies: a sequence comes in parts, and its rows are still its own."""
    lm = lms["esm"]
    monkeypatch.setattr(execution, "WINDOW_TOKENS", 40)
    found, shares = Collected(), []
    lm.visit(sequences_of(lm, TEXTS), found, advance=shares.append)
    for i, one in enumerate(lm.distributions(TEXTS, top_k=None)):
        assert_near(found.of(i), one.logprobs, 1e-5)
    assert sum(shares) == pytest.approx(len(TEXTS))


def test_refusals(lms: dict[str, MaskedLM]) -> None:
    lm = lms["bert"]
    sequences = sequences_of(lm, ["A cat.", "The cat watches. " * 60])

    def take(*_: Any) -> None:
        raise AssertionError("nothing should be computed")

    with pytest.raises(TextError, match="text 1 has .* holds 120"):
        lm.visit(sequences, take)
    with pytest.raises(RequestError, match="metric"):
        lm.visit(sequences[:1], take, metric="nothing")
    with pytest.raises(RequestError, match="temperature"):
        lm.visit(sequences[:1], take, temperature=0)


def test_not_finite(lms: dict[str, MaskedLM]) -> None:
    lm = lms["bert"]
    bias = lm.model.get_output_embeddings().bias
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[3] = float("nan")
        with pytest.raises(TextError, match="text 0 gets NaN"):
            lm.visit(sequences_of(lm, ["A cat."]), lambda *_: None)
    finally:
        with torch.no_grad():
            bias.copy_(before)
