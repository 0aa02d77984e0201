"""Bad input gets a clear error that names the culprit and the remedy, and costs nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TEXTS, long_text, small_bert
from transformers import (
    BertTokenizerLegacy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from truth import assert_near, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import (
    BackendError,
    CheckpointError,
    MLMFastError,
    RequestError,
    TextError,
)
from mlmfast.model import MaskedLM


@pytest.fixture(scope="module")
def lm(bert_folder: Path) -> MaskedLM:
    return mlmfast.load(bert_folder)


def test_an_error_of_a_text_goes_to_other_processes() -> None:
    error = pickle.loads(pickle.dumps(TextError(3, "is empty")))
    assert (error.index, error.reason, str(error)) == (3, "is empty", "text 3 is empty")


def test_what_encode_has_read_is_scored_as_it_was_read(lm: MaskedLM) -> None:
    texts = [TEXTS[0], "", TEXTS[1]]
    for encoded, found in zip(lm.score(lm.encode(texts), on_error="return"), lm.score(texts, on_error="return")):
        if isinstance(found, TextError):
            assert str(encoded) == str(found)
        else:
            assert encoded.logprobs.tolist() == found.logprobs.tolist()
    with pytest.raises(RequestError, match="no spans, no truncation"):
        lm.score(lm.encode(texts), truncation="right")
    with pytest.raises(RequestError, match="no spans, no truncation"):
        lm.score(lm.encode(texts[:1]), spans=[(0, 3)])
    with pytest.raises(RequestError, match="and not both"):
        lm.score([*lm.encode(texts[:1]), TEXTS[1]])


@pytest.mark.parametrize("bad", ["", "   ", "\n\t", "[SEP]", None, 3, b"The cat", ["The cat"], "lone \ud800 surrogate"])
@pytest.mark.parametrize("call", ["score", "distributions"])
def test_a_text_that_cannot_be_scored_is_named_and_the_others_are_scored(lm: MaskedLM, bad: Any, call: str) -> None:
    texts = [TEXTS[0], bad, TEXTS[1]]
    with pytest.raises(TextError, match="text 1") as caught:
        getattr(lm, call)(texts)
    assert caught.value.index == 1 and caught.value.reason
    first, error, last = getattr(lm, call)(texts, on_error="return")
    assert isinstance(error, TextError) and error.index == 1 and str(error) == str(caught.value)
    for result, alone in zip((first, last), getattr(lm, call)([TEXTS[0], TEXTS[1]])):
        assert_near(result.logprobs, alone.logprobs, 1e-5)


def test_all_texts_bad(lm: MaskedLM) -> None:
    errors = lm.score(["", " "], on_error="return")
    assert [error.index for error in errors] == [0, 1] and all(isinstance(error, TextError) for error in errors)


def test_no_texts_give_no_results(lm: MaskedLM) -> None:
    assert lm.score([]) == [] and lm.distributions([]) == [] and lm.score_continuations([]) == [] and lm.fill([]) == []
    assert lm.plan([]).copies == 0


def test_a_text_longer_than_the_model(lm: MaskedLM, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    text = long_text(bert_tokenizer, 61)
    with pytest.raises(TextError, match=r"text 1 .*61 tokens.*48.*truncation") as caught:
        lm.score(["The cat.", text])
    assert caught.value.index == 1
    fine, error = lm.score(["The cat.", text], on_error="return")
    assert len(fine) == 3 and isinstance(error, TextError)


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_scores_what_is_left(
    lm: MaskedLM,
    bert_model: PreTrainedModel,
    bert_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
) -> None:
    monkeypatch.setattr(bert_tokenizer, "truncation_side", side)
    text = long_text(bert_tokenizer, 61)
    for metric in ("original", "global_l2r"):
        cut, whole = lm.score([text, "The cat."], metric=metric, truncation=side)
        truth = reference_loop(forward_of(bert_model), bert_tokenizer, text, metric, max_length=48)
        assert_score(cut, truth, what=side)
        assert cut.truncated == 61 - 48 and whole.truncated == 0
        assert cut.text == text and cut.offsets is not None
        for token, (start, end) in zip(cut.tokens, cut.offsets):
            assert text[start:end].lower() == token.removeprefix("##")


def test_a_span_that_truncation_cuts_away(lm: MaskedLM, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    text = long_text(bert_tokenizer, 61)
    with pytest.raises(TextError, match="truncat"):
        lm.score([text], spans=[(len(text) - 1, len(text))], truncation="right")


def test_a_span_past_the_end_of_its_text(lm: MaskedLM) -> None:
    """It is of another text, or counts something else than characters."""
    spans = [None, (4, 9)]
    with pytest.raises(
        TextError, match=r"text 1 has 8 characters, and its span \(4, 9\) reaches past them; end it at 8"
    ):
        lm.score(["The cat.", "The cat."], spans=spans)
    whole, error = lm.score(["The cat.", "The cat."], spans=spans, on_error="return")
    assert len(whole) == 3 and isinstance(error, TextError) and error.index == 1
    to_end, open_end = lm.score(["The cat.", "The cat."], spans=[(4, 8), (4, None)])
    assert to_end.tokens == open_end.tokens == ["cat", "."]


@pytest.mark.parametrize("span", [(3, 4), (5, 5), (100, 200), (7, 2), (-3, -1)])
def test_a_span_without_tokens(lm: MaskedLM, span: tuple[int, int]) -> None:
    with pytest.raises((TextError, RequestError), match="0|span"):
        lm.score(["The cat."], spans=[span])


@pytest.mark.parametrize("pair", [("The cat", ""), ("The cat", " "), ("", "")])
def test_a_continuation_without_tokens(lm: MaskedLM, pair: tuple[str, str]) -> None:
    with pytest.raises(TextError, match="text 1"):
        lm.score_continuations([("The", " cat"), pair])


@pytest.mark.parametrize("text", ["The cat.", ""])
def test_fill_without_a_mask(lm: MaskedLM, text: str) -> None:
    with pytest.raises(TextError, match=r"mask|empty"):
        lm.fill(text)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda lm: lm.score("The cat."), "list"),
        (lambda lm: lm.distributions("The cat."), "list"),
        (lambda lm: lm.rank("The", " cat"), "list"),
        (lambda lm: lm.plan("The cat."), "list"),
        (lambda lm: lm.score(["The cat."], metric="origin"), "within_word_l2r"),
        (lambda lm: lm.rank("The", [" cat"], metric="best"), "within_word_l2r"),
        (lambda lm: lm.distributions(["The cat."], metric=""), "within_word_l2r"),
        (lambda lm: lm.score(["The cat."], metric="window", window=0), "window"),
        (lambda lm: lm.score(["The cat."], metric="strided", stride=0), "stride"),
        (lambda lm: lm.score(["The cat."], temperature=0.0), "temperature"),
        (lambda lm: lm.score(["The cat."], temperature=-1.0), "temperature"),
        (lambda lm: lm.score(["The cat."], temperature=float("nan")), "temperature"),
        (lambda lm: lm.score(["The cat."], spans=[(0, 3), (0, 3)]), "span"),
        (lambda lm: lm.score(["The cat."], spans=[]), "span"),
        (lambda lm: lm.score(["The cat."], truncation="middle"), "truncation"),
        (lambda lm: lm.score(["The cat."], truncation=True), "truncation"),
        (lambda lm: lm.score(["The cat."], on_error="ignore"), "on_error"),
        (lambda lm: lm.distributions(["The cat."], top_k=0), "top_k"),
        (lambda lm: lm.distributions(["The cat."], top_k=-1), "top_k"),
        (lambda lm: lm.distributions(["The cat."], top_k=10**6), "top_k"),
        (lambda lm: lm.fill("The [MASK].", top_k=0), "top_k"),
        (lambda lm: lm.fill("The [MASK].", temperature=0.0), "temperature"),
        (lambda lm: lm.rank("The", []), "option"),
        (lambda lm: lm.rank("The", [" cat"], normalize="words"), "unconditional"),
        (lambda lm: lm.score_continuations(["The cat"]), "pair"),
        (lambda lm: lm.score_continuations([("The", " cat", ".")]), "pair"),
        (lambda lm: lm.score_continuations([("The", 3)]), "pair"),
        (lambda lm: lm.score_continuations([5]), "pair"),
    ],
)
def test_a_wrong_request_is_refused(lm: MaskedLM, call: Callable[[MaskedLM], object], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        call(lm)
    assert len(lm.score(["The cat."])[0]) == 3  # and nothing is lost


@pytest.mark.parametrize("spans", [[3], [(0, 1, 2)], [("a", "b")], [(None, 2)]])
def test_spans_that_are_no_spans(lm: MaskedLM, spans: Any) -> None:
    with pytest.raises(MLMFastError, match="span"):
        lm.score(["The cat."], spans=spans)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"semantics": "other"}, RequestError, "trained"),
        ({"dtype": "float17"}, RequestError, "float32"),
        ({"batch_tokens": 0}, RequestError, "batch_tokens"),
        ({"backend": "abacus"}, BackendError, "reference"),
    ],
)
def test_loading_with_a_wrong_argument(bert_folder: Path, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mlmfast.load(bert_folder, **options)


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2)])
def test_loading_something_else(thing: Any) -> None:
    with pytest.raises(RequestError):
        mlmfast.load(thing)


@pytest.fixture
def slow_tokenizer(bert_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> PreTrainedTokenizerBase:
    """The same pieces from pure Python code, which tells neither words nor offsets."""
    pieces = sorted(bert_tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")
    tokenizer = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not tokenizer.is_fast
    return tokenizer


def test_a_slow_tokenizer_scores(
    slow_tokenizer: PreTrainedTokenizerBase, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = mlmfast.load(bert_model, slow_tokenizer)
    for metric in ("original", "window", "global_l2r", "unmasked", "strided"):
        for text, score in zip(TEXTS, lm.score(TEXTS, metric=metric)):
            assert_score(score, reference_loop(forward_of(bert_model), bert_tokenizer, text, metric))
            assert score.offsets is None


def test_a_slow_tokenizer_cannot_serve_words_or_places(
    slow_tokenizer: PreTrainedTokenizerBase, bert_model: PreTrainedModel
) -> None:
    lm = mlmfast.load(bert_model, slow_tokenizer)
    with pytest.raises(RequestError, match="within_word_l2r.*slow tokenizer"):
        lm.score(["The cat."], metric="within_word_l2r")
    with pytest.raises(RequestError, match="slow tokenizer"):
        lm.score(["The cat."], spans=[(0, 3)])
    with pytest.raises(RequestError, match="slow tokenizer"):
        lm.score_continuations([("The", " cat.")])
    assert len(lm.score(["The cat."], spans=[None])[0]) == 3


def test_no_mask_token(bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(bert_tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(CheckpointError, match="mask token"):
        mlmfast.load(bert_model, tokenizer)


def test_a_tokenizer_with_more_pieces_than_the_model(
    bert_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A token added without ``resize_token_embeddings`` has no row; only texts that use it are refused."""
    tokenizer = copy.deepcopy(bert_tokenizer)
    tokenizer.add_tokens(["snowman"])
    lm = mlmfast.load(small_bert(len(bert_tokenizer)), tokenizer)
    fine, error = lm.score(["The cat.", "The snowman."], on_error="return")
    assert len(fine) == 3
    assert isinstance(error, TextError) and "snowman" in str(error)


def test_a_model_with_more_rows_than_pieces(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    """Embedding tables are often padded; ids without a piece still count in the softmax and print as something."""
    model = small_bert(len(bert_tokenizer) + 9)
    lm = mlmfast.load(model, bert_tokenizer)
    text = "The cat."
    assert_score(lm.score([text])[0], reference_loop(forward_of(model), bert_tokenizer, text))
    every = lm.distributions([text], top_k=lm.vocab_size)[0]
    assert every.candidates is not None and all(isinstance(piece, str) for row in every.candidates for piece in row)
    assert str(every)
    assert len(lm.fill("The [MASK].", top_k=lm.vocab_size)[0]) == len(bert_tokenizer) + 9
