"""rank, distributions and fill against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import Forward, Truth, assert_near, assert_score, continuation_loop, forward_of, reference_loop

import mlmfast
from mlmfast.model import MaskedLM

PROMPT = "The hungry gardener"
OPTIONS = [" follow", " remembers the quiet cat", " are humming to", " follow!", " follow"]


@pytest.fixture(scope="module")
def tokenizer(deberta_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return deberta_tokenizer


@pytest.fixture(scope="module")
def forward(deberta_model: PreTrainedModel) -> Forward:
    return forward_of(deberta_model)


@pytest.fixture(scope="module")
def lm(deberta_folder: Path) -> MaskedLM:
    return mlmfast.load(deberta_folder, semantics="upstream")


def option_truths(
    forward: Forward, tokenizer: PreTrainedTokenizerBase, prompt: str, metric: str, window: int = 3
) -> list[Truth]:
    return [continuation_loop(forward, tokenizer, prompt, option, metric, window=window) for option in OPTIONS]


@pytest.mark.parametrize("metric", ["original", "window", "within_word_l2r", "global_l2r"])
@pytest.mark.parametrize("normalize", [None, "tokens", "unconditional"])
def test_rank(
    lm: MaskedLM, forward: Forward, tokenizer: PreTrainedTokenizerBase, metric: str, normalize: str | None
) -> None:
    unconditional = {"unconditional_prompt": "Some cat"} if normalize == "unconditional" else {}
    ranking = lm.rank(PROMPT, OPTIONS, metric=metric, normalize=normalize, **unconditional)
    truths = option_truths(forward, tokenizer, PROMPT, metric)
    values = np.array([truth.logprobs.sum() for truth in truths])
    if normalize == "tokens":
        values = values / [len(truth.token_ids) for truth in truths]
    if normalize == "unconditional":
        values = values - [t.logprobs.sum() for t in option_truths(forward, tokenizer, "Some cat", metric)]
    for score, truth in zip(ranking.scores, truths):
        assert_score(score, truth)
    # a total adds the errors of its tokens, a difference those of both sides
    assert_near(ranking.values, values, 1e-4 * 2 * max(len(truth.token_ids) for truth in truths))
    assert ranking.order == sorted(range(len(OPTIONS)), key=lambda i: (-ranking.values[i], i))
    assert ranking.best == OPTIONS[int(np.argmax(values))]
    assert ranking.prompt == PROMPT and ranking.options == OPTIONS and ranking.normalize == normalize
    assert ranking.values[0] == ranking.values[4]  # the same option twice


def test_rank_defaults_to_the_window_of_three(
    lm: MaskedLM, forward: Forward, tokenizer: PreTrainedTokenizerBase
) -> None:
    ranking = lm.rank(PROMPT, OPTIONS)
    truths = option_truths(forward, tokenizer, PROMPT, "window", window=3)
    assert_near(ranking.values, np.array([truth.logprobs.sum() for truth in truths]), 1e-3)
    assert ranking.probabilities.sum() == pytest.approx(1.0)


def test_unconditional_prompt_defaults_to_nothing(
    lm: MaskedLM, forward: Forward, tokenizer: PreTrainedTokenizerBase
) -> None:
    ranking = lm.rank(PROMPT, OPTIONS[:3], normalize="unconditional")
    given = option_truths(forward, tokenizer, PROMPT, "window")[:3]
    alone = option_truths(forward, tokenizer, "", "window")[:3]
    wanted = [a.logprobs.sum() - b.logprobs.sum() for a, b in zip(given, alone)]
    assert_near(ranking.values, np.array(wanted), 1e-3)


@pytest.mark.parametrize("metric", ["original", "window", "global_l2r", "unmasked"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_distributions(
    lm: MaskedLM, forward: Forward, tokenizer: PreTrainedTokenizerBase, metric: str, temperature: float
) -> None:
    texts = ["The cat remembers.", "No ☃!"]
    rows = lm.distributions(texts, metric=metric, top_k=None, temperature=temperature)
    best = lm.distributions(texts, metric=metric, top_k=7, temperature=temperature)
    for text, whole, few in zip(texts, rows, best):
        truth = reference_loop(forward, tokenizer, text, metric, temperature=temperature)
        assert list(whole.token_ids) == list(few.token_ids) == truth.token_ids
        assert whole.candidate_ids is None and whole.candidates is None
        assert whole.logprobs.dtype == np.float32
        assert_near(whole.logprobs, truth.rows, what="whole rows")
        assert_near(np.exp(whole.logprobs.astype(np.float64)).sum(1), np.ones(len(whole)), 1e-5)
        assert few.candidate_ids is not None and few.candidates is not None
        assert few.logprobs.shape == few.candidate_ids.shape == (len(few), 7)
        assert_near(few.logprobs, -np.sort(-truth.rows, axis=1)[:, :7], what="top 7")
        assert_near(few.logprobs, np.take_along_axis(truth.rows, few.candidate_ids, axis=1), what="ids of the top 7")
        assert few.candidates == [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in few.candidate_ids]


def test_distributions_of_spans_and_the_whole_vocabulary(
    lm: MaskedLM, forward: Forward, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "The cat remembers."
    vocabulary = lm.distributions([text], spans=[(4, 7)], top_k=lm.vocab_size)[0]
    truth = reference_loop(forward, tokenizer, text, span=(4, 7))
    assert list(vocabulary.token_ids) == truth.token_ids
    assert_near(vocabulary.logprobs, -np.sort(-truth.rows, axis=1))
    assert lm.vocab_size == truth.rows.shape[1]


@pytest.mark.parametrize("top_k", [1, 5])
@pytest.mark.parametrize("text", ["The [MASK] watches.", "[MASK] cat [MASK][MASK] the rain [MASK]"])
def test_fill(lm: MaskedLM, forward: Forward, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int) -> None:
    ids = list(tokenizer(text)["input_ids"])
    logprobs = torch.log_softmax(forward(ids), dim=-1).numpy()
    fills = lm.fill(text, top_k=top_k)
    positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    assert [fill.position for fill in fills] == positions
    for fill, position in zip(fills, positions):
        row = logprobs[position]
        assert len(fill) == top_k and fill.text == text
        assert_near(fill.logprobs, -np.sort(-row)[:top_k])
        assert_near(fill.logprobs, row[fill.token_ids])
        assert fill.tokens == tokenizer.convert_ids_to_tokens(fill.token_ids.tolist())


def test_fill_of_a_list_is_a_list_of_lists(lm: MaskedLM) -> None:
    texts = ["The [MASK] watches.", "[MASK] [MASK]!"]
    together = lm.fill(texts, top_k=3, temperature=0.5)
    assert [len(fills) for fills in together] == [1, 2]
    for text, fills in zip(texts, together):
        for alone, fill in zip(lm.fill(text, top_k=3, temperature=0.5), fills):
            assert alone.token_ids.tolist() == fill.token_ids.tolist()
            assert_near(alone.logprobs, fill.logprobs, 1e-5)
