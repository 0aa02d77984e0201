"""The truth that every score is compared with: a plain loop over the Hugging Face model, one mask at a time.

Written from the definitions, not from the package: nothing here imports mlmfast. The model runs in float64, alone with
one copy, and every row of every copy is projected, so that nothing the package saves is saved here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL_METRICS = ["original", "within_word_l2r", "window", "global_l2r", "unmasked", "strided"]

Forward = Callable[[list[int]], Tensor]
"""Token ids of one copy -> float64 logits ``[L, V]``."""


@dataclass
class Truth:
    """What the loop found for one text: a row a scored token, in text order."""

    positions: list[int]
    token_ids: list[int]
    copies: list[tuple[int, ...]]
    """The masked ids that each token was read from."""
    rows: np.ndarray
    """float64 ``[n, V]`` log-probabilities."""

    @property
    def logprobs(self) -> np.ndarray:
        return self.rows[np.arange(len(self.token_ids)), self.token_ids]

    @property
    def ranks(self) -> np.ndarray:
        return 1 + (self.rows > self.logprobs[:, None]).sum(1)

    @property
    def entropies(self) -> np.ndarray:
        return -(np.exp(self.rows) * self.rows).sum(1)


def forward_of(model: PreTrainedModel) -> Forward:
    """The model as it is, in float64."""
    model = copy.deepcopy(model).double().eval()

    @torch.no_grad()
    def forward(ids: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]

    return forward


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that are never masked and never scored; an unknown piece is scored like any other."""
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def masks_of_target(
    target: int, length: int, special: set[int], word_ids: Sequence[int | None], metric: str, window: int
) -> set[int]:
    """Positions masked where ``target`` is scored, by each one-target metric's definition."""
    if metric == "unmasked":
        return set()
    masked = {target}
    for other in range(target + 1, length):
        if metric == "within_word_l2r" and word_ids[other] == word_ids[target]:
            masked.add(other)
        if metric == "window" and other < target + window:
            masked.add(other)
        if metric == "global_l2r":
            masked.add(other)
    return masked - special


def scored_positions(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], offsets: list[tuple[int, int]], span: tuple[int, int] | None
) -> list[int]:
    """Every token but the special ones; with a span in characters, those that reach into it."""
    special = special_ids(tokenizer)
    positions = [i for i, token in enumerate(ids) if token not in special]
    if span is None:
        return positions
    return [i for i in positions if offsets[i][1] > span[0] and offsets[i][0] < span[1]]


def reference_loop(
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    metric: str = "original",
    *,
    window: int = 3,
    stride: int = 8,
    span: tuple[int, int] | None = None,
    temperature: float = 1.0,
    max_length: int | None = None,
    shift: int = 0,
) -> Truth:
    """Scores one text, one copy after the other; with ``max_length`` the text as the tokenizer itself truncates it.

    ``shift``: how far left of a token the row stands that predicts it.
    """
    encoding = tokenizer(text, return_offsets_mapping=True, truncation=max_length is not None, max_length=max_length)
    ids: list[int] = list(encoding["input_ids"])
    special = {i for i, token in enumerate(ids) if token in special_ids(tokenizer)}
    positions = scored_positions(tokenizer, ids, encoding["offset_mapping"], span)
    rows, copies = [], []
    for place, target in enumerate(positions):
        if metric == "strided":
            masked = set(positions[place % stride :: stride])
        else:
            masked = masks_of_target(target, len(ids), special, encoding.word_ids(), metric, window)
        masked_ids = [tokenizer.mask_token_id if i in masked else token for i, token in enumerate(ids)]
        copies.append(tuple(masked_ids))
        rows.append(torch.log_softmax(forward(masked_ids)[target - shift].double() / temperature, dim=-1).numpy())
    return Truth(positions, [ids[i] for i in positions], copies, np.array(rows))


def continuation_loop(
    forward: Forward, tokenizer: PreTrainedTokenizerBase, prefix: str, continuation: str, metric: str, **options: Any
) -> Truth:
    """Scores a continuation in its context: the tokens whose end lies beyond the prefix."""
    # Beyond the prefix up to any end, so that white space at the text's end counts; after nothing, every token.
    span = (len(prefix), 10**9) if prefix else None
    return reference_loop(forward, tokenizer, prefix + continuation, metric, span=span, **options)


def assert_near(got: np.ndarray, wanted: np.ndarray, bound: float = 1e-4, what: str = "") -> None:
    """``|got - wanted| <= bound * max(1, |wanted|)`` in every element; NaN and a wrong shape fail."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, f"{what}: shape {got.shape}, wanted {wanted.shape}"
    excess = np.nan_to_num(np.abs(got - wanted) / np.maximum(1.0, np.abs(wanted)), nan=np.inf)
    if excess.size and excess.max() > bound:
        worst = int(excess.argmax())
        raise AssertionError(
            f"{what}: off by {excess.flat[worst]:.3g} (bound {bound:g}) at {worst} of {excess.size}: "
            f"{got.flat[worst]:.7g}, wanted {wanted.flat[worst]:.7g}"
        )


def assert_score(score: Any, truth: Truth, bound: float = 1e-4, what: str = "") -> None:
    """A :class:`mlmfast.results.Score` has the truth's tokens and, within the bound, its log-probabilities."""
    assert list(score.token_ids) == truth.token_ids, what
    assert score.logprobs.dtype == np.float32
    assert_near(score.logprobs, truth.logprobs, bound, what)


def assert_equals_the_loop(
    lm: Any,
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[tuple[str, tuple[int, int] | None]],
    metrics: Sequence[str],
) -> None:
    """A :class:`mlmfast.model.MaskedLM` scores texts with their spans, all in one request, as the loop does."""
    for metric in metrics:
        scores = lm.score([text for text, _ in cases], metric=metric, spans=[span for _, span in cases])
        for (text, span), score in zip(cases, scores):
            truth = reference_loop(forward, tokenizer, text, metric, span=span)
            assert_score(score, truth, what=f"{metric} of {span or 'all'} of {text!r}")
