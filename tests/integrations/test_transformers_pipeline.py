"""transformers' pipeline "pseudo-log-likelihood": what MaskedLM gives, as dicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import TEXTS, sentences
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near, forward_of, reference_loop

import mlmfast
from mlmfast.errors import RequestError, TextError
from mlmfast.integrations.transformers import register


@pytest.fixture
def scorer(bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase) -> Any:
    register()
    register()  # is heard once
    return transformers.pipeline("pseudo-log-likelihood", model=bert_model, tokenizer=bert_tokenizer, device=-1)


def test_a_text_and_a_list(scorer: Any, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    found = scorer(TEXTS)
    assert [one["text"] for one in found] == TEXTS
    for text, one in zip(TEXTS, found):
        truth = reference_loop(forward_of(bert_model), bert_tokenizer, text)
        assert one["tokens"] == bert_tokenizer.convert_ids_to_tokens(truth.token_ids)
        assert_near(one["logprobs"], truth.logprobs)
        assert one["score"] == pytest.approx(sum(one["logprobs"]))
        assert set(one) == {"text", "score", "perplexity", "tokens", "logprobs"}
    json.dumps(found)
    alone = scorer(TEXTS[0])
    assert alone["score"] == pytest.approx(found[0]["score"], rel=1e-5)


def test_from_a_folder(scorer: Any, bert_folder: Path) -> None:
    stored = transformers.pipeline("pseudo-log-likelihood", model=str(bert_folder), device=-1)
    assert_near([one["score"] for one in stored(TEXTS)], [one["score"] for one in scorer(TEXTS)], 1e-5)


def test_options_when_made_and_when_called(
    scorer: Any, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = mlmfast.load(bert_model, bert_tokenizer)
    windows = transformers.pipeline(
        "pseudo-log-likelihood", model=bert_model, tokenizer=bert_tokenizer, device=-1, metric="window", window=2
    )
    wanted = {window: [s.total for s in lm.score(TEXTS, metric="window", window=window)] for window in (2, 4)}
    assert [one["score"] for one in windows(TEXTS)] == wanted[2]
    assert [one["score"] for one in windows(TEXTS, window=4)] == wanted[4]
    assert [one["score"] for one in windows(TEXTS)] == wanted[2]
    ranks = scorer(TEXTS[:1], ranks=True, entropies=True)[0]
    assert len(ranks["ranks"]) == len(ranks["entropies"]) == len(ranks["tokens"])
    with pytest.raises(RequestError, match="top_k; it takes metric"):
        scorer(TEXTS, top_k=5)


def test_a_stream_is_scored_a_window_at_a_time(scorer: Any) -> None:
    texts, taken = sentences(7), []

    def stream() -> Any:
        for text in texts:
            taken.append(text)
            yield text

    found = scorer(stream(), batch_size=3)
    assert not taken
    assert next(found)["text"] == texts[0]
    assert taken == texts[:3]
    assert [one["text"] for one in found] == texts[1:]


@pytest.mark.parametrize("given", [{"text": "The cat."}, None, 3])
def test_what_is_no_text(scorer: Any, given: Any) -> None:
    with pytest.raises(RequestError, match="takes a text, or texts, not a"):
        scorer(given)


def test_a_text_that_cannot_be_scored(scorer: Any) -> None:
    texts = [TEXTS[0], "", TEXTS[1]]
    with pytest.raises(TextError):
        scorer(texts)
    found = scorer(texts, on_error="return")
    assert set(found[1]) == {"text", "error"}
    assert found[2]["score"] < 0
