"""Ranking with the prompt's states computed once: exact where it must be, approximate and said so elsewhere."""

from __future__ import annotations

from typing import Any

import checkpoints
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

import mlmfast
from mlmfast.model import MaskedLM

NAMES = ["bert", "deberta", "deberta, all of it"]
PROMPT = "The small cat watches every remarkable lighthouse, and no gardener"
OPTIONS = [" follow", " remembers the children", " repaint a lighthouse before breakfast", " watches no children", "!"]


def values(lm: MaskedLM, **options: Any) -> np.ndarray:
    return lm.rank(PROMPT, OPTIONS, **options).values


@pytest.mark.parametrize("metric", ["original", "within_word_l2r", "window", "global_l2r", "strided", "unmasked"])
@pytest.mark.parametrize("family", ["bert", "deberta", "convolution"])
def test_one_layer_has_nothing_to_approximate(
    family: str, metric: str, bert_tokenizer: PreTrainedTokenizerBase, deberta_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its keys and values are of the embeddings alone: a shifted row, place or bound would show."""
    if family == "bert":
        model, tokenizer = (
            checkpoints.small_bert(len(bert_tokenizer), num_hidden_layers=1, max_position_embeddings=99),
            bert_tokenizer,
        )
    else:
        options = {"conv_kernel_size": 3, "conv_act": "gelu"} if family == "convolution" else {}
        tokenizer = deberta_tokenizer
        model = checkpoints.small_deberta(len(tokenizer), num_hidden_layers=1, **options)
    lm = mlmfast.load(model, tokenizer)
    for normalize in (None, "tokens"):
        exact = values(lm, metric=metric, normalize=normalize)
        np.testing.assert_allclose(values(lm, metric=metric, normalize=normalize, cache="prefix"), exact, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_single_tokens_are_exact_and_longer_options_are_near(lms: dict[str, MaskedLM], name: str) -> None:
    lm = lms[name]
    exact, near = lm.rank(PROMPT, OPTIONS), lm.rank(PROMPT, OPTIONS, cache="prefix")
    single = [i for i, score in enumerate(exact.scores) if len(score) == 1]
    assert single and len(single) < len(OPTIONS)
    np.testing.assert_allclose(near.values[single], exact.values[single], atol=2e-4)
    assert not np.allclose(near.values, exact.values, atol=1e-3)  # or the name would be wrong
    assert "approximate" in repr(near) and "approximate" not in repr(exact)
    assert [s.tokens for s in near.scores] == [s.tokens for s in exact.scores]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slots", [1, 2, 100])
def test_options_do_not_see_each_other(
    lms: dict[str, MaskedLM], name: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms[name]
    together = values(lm, cache="prefix")
    monkeypatch.setattr("mlmfast.prefix.SLOTS", slots)
    np.testing.assert_allclose(values(lm, cache="prefix"), together, atol=2e-4)
    few = lm.rank(PROMPT, OPTIONS[::-1], cache="prefix").values[::-1]
    np.testing.assert_allclose(few, together, atol=2e-4)


def test_options_that_begin_alike_keep_the_prompts_end(lms: dict[str, MaskedLM]) -> None:
    """Their common beginning is scored, so it is no part of the prefix."""
    lm = lms["bert"]
    options = [" watches a cat", " watches a lighthouse"]
    ranking = lm.rank(PROMPT, options, cache="prefix", ranks=True, entropies=True)
    assert [len(score) for score in ranking.scores] == [len(score) for score in lm.rank(PROMPT, options).scores]
    assert all(score.ranks is not None and score.entropies is not None for score in ranking.scores)


def test_an_unknown_cache_is_refused(lms: dict[str, MaskedLM]) -> None:
    with pytest.raises(mlmfast.RequestError, match="cache='window' is not known"):
        lms["bert"].rank(PROMPT, OPTIONS, cache="window")
