"""RoBERTa and XLM-R: positions start after the padding id, so the longest text is shorter than the position table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TEXTS, long_text, save, small_roberta, small_xlm_roberta
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import ALL_METRICS, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import TextError, UnsupportedModelError

Family = tuple[str, Callable[..., PreTrainedModel], PreTrainedTokenizerBase]


@pytest.fixture(params=["roberta", "xlm_roberta"])
def family(request: pytest.FixtureRequest) -> Family:
    make = {"roberta": small_roberta, "xlm_roberta": small_xlm_roberta}[request.param]
    return request.param.replace("_", "-"), make, request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.mark.parametrize("options", [{}, {"num_hidden_layers": 1}, {"type_vocab_size": 2}], ids=str)
def test_folder_and_live_model_equal_the_loop(family: Family, tmp_path: Path, options: dict[str, Any]) -> None:
    name, make, tokenizer = family
    model = make(len(tokenizer), **options)
    forward = forward_of(model)
    for lm in (mlmfast.load(save(tmp_path, model, tokenizer)), mlmfast.load(model, tokenizer)):
        assert lm.family == name
        for metric in ("original", "within_word_l2r", "strided"):
            for text, score in zip(TEXTS, lm.score(TEXTS, metric=metric)):
                assert_score(score, reference_loop(forward, tokenizer, text, metric), what=f"{metric} of {text!r}")


@pytest.mark.parametrize("tokens", [4, 31, 47, 48])
def test_every_length_up_to_the_last_position(family: Family, tmp_path: Path, tokens: int) -> None:
    _, make, tokenizer = family
    model = make(len(tokenizer))
    lm = mlmfast.load(save(tmp_path, model, tokenizer))
    assert lm.max_length == 50 - 1 - 1  # the table's 50 rows less the padding row and the row before it
    text = long_text(tokenizer, tokens)
    assert_score(lm.score([text])[0], reference_loop(forward_of(model), tokenizer, text), what=f"{tokens} tokens")


def test_one_token_too_many_is_refused(family: Family) -> None:
    _, make, tokenizer = family
    with pytest.raises(TextError, match="49.*48"):
        mlmfast.load(make(len(tokenizer)), tokenizer).score([long_text(tokenizer, 49)])


@pytest.mark.parametrize("which", [0, 1])
def test_the_padding_id_moves_the_positions(family: Family, which: int) -> None:
    """Another padding id in the configuration starts the positions elsewhere, and holds fewer tokens."""
    _, make, tokenizer = family
    text = "Some quiet cat."
    absent = [i for i in range(5, 30) if i not in tokenizer(text)["input_ids"]]
    padding = (absent[0], absent[-1])[which]
    model = make(len(tokenizer), pad_token_id=padding)
    lm = mlmfast.load(model, tokenizer)
    assert lm.max_length == 50 - padding - 1
    assert_score(lm.score([text])[0], reference_loop(forward_of(model), tokenizer, text))


@pytest.mark.parametrize("metric", ALL_METRICS)
def test_a_padding_token_written_in_the_text(family: Family, metric: str) -> None:
    """transformers gives it the padding row, and counts the positions of the rest as if it weren't there."""
    _, make, tokenizer = family
    model = make(len(tokenizer))
    text = f"The cat{tokenizer.pad_token} watches"
    assert tokenizer.pad_token_id in tokenizer(text)["input_ids"]
    try:
        score = mlmfast.load(model, tokenizer).score([text], metric=metric)[0]
    except TextError as refusal:
        assert tokenizer.pad_token in str(refusal) or "pad" in str(refusal)
        return
    assert_score(score, reference_loop(forward_of(model), tokenizer, text, metric))


@pytest.mark.parametrize("options", [{"hidden_act": "relu"}, {"tie_word_embeddings": False}], ids=str)
def test_an_uncommon_option_is_right_or_refused_by_name(
    family: Family, tmp_path: Path, options: dict[str, Any]
) -> None:
    _, make, tokenizer = family
    model = make(len(tokenizer), **options)
    try:
        lm = mlmfast.load(save(tmp_path, model, tokenizer))
    except UnsupportedModelError as refusal:
        assert any(name in str(refusal) for name in options)
        return
    assert_score(lm.score([TEXTS[1]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[1]), what=str(options))
