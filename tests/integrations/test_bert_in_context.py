"""bert-in-context's ``score()`` against a plain loop in the paper's convention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
from tool_loops import window_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near

import mlmfast
from mlmfast.errors import RequestError, TextError
from mlmfast.integrations.bert_in_context import score

TEXTS = ["The cat watches every remarkable lighthouse.", "Children humming,  yellowish gardeners repainted!", "A"]


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
@pytest.mark.parametrize("words", [1, 3, 50])
def test_score(family: str, words: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"{family}_model")
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    lm = mlmfast.load(model, tokenizer)
    for text in TEXTS:
        wanted = window_score(model, tokenizer, text, words)
        for found in (
            score(model, text, words, tokenizer, "cpu", 8),  # as the scripts call it
            score(lm, text, words),
        ):
            assert type(found) is float
            assert_near([found], [wanted])
        assert score(lm, text, 0) == 0.0


def test_words_are_the_tokenizers(deberta_model: PreTrainedModel, deberta_tokenizer: PreTrainedTokenizerBase) -> None:
    """DeBERTa-v2's are parted by white space: a full stop belongs to the word before it."""
    lm = mlmfast.load(deberta_model, deberta_tokenizer)
    text = "The cat watches. Unbelievable!"
    span = lm.score([text], metric="window", spans=[(text.index(" Unbelievable"), None)])[0]
    assert_near([score(lm, text, 1)], [span.total])


def test_by_name_it_is_the_model_as_trained(
    tmp_path: Path, deberta_tokenizer: PreTrainedTokenizerBase, clamped: None
) -> None:
    """Beyond the trained length, where the fixed checkpoints differ from transformers' DeBERTa."""
    model = checkpoints.small_deberta(len(deberta_tokenizer))
    folder = checkpoints.save(tmp_path, model, deberta_tokenizer)
    text = checkpoints.long_text(deberta_tokenizer, 40)
    assert_near([score(mlmfast.load(folder), text, 2)], [window_score(model, deberta_tokenizer, text, 2)])


def test_requests_that_cannot_be_served(bert_model: PreTrainedModel, bert_tokenizer: Any) -> None:
    lm = mlmfast.load(bert_model, bert_tokenizer)
    with pytest.raises(RequestError, match="negative"):
        score(lm, "A cat.", -1)
    with pytest.raises(TextError, match="49 tokens.*48"):
        score(lm, checkpoints.long_text(bert_tokenizer, 49), 1)
    with pytest.raises(RequestError, match="needs its tokenizer"):
        score(bert_model, "A cat.", 1)
