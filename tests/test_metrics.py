"""Every metric, on every tokenizer, equals a loop over the Hugging Face model; so do spans and continuations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import (
    ALL_METRICS,
    Forward,
    assert_near,
    assert_score,
    continuation_loop,
    forward_of,
    reference_loop,
)

import mlmfast
from mlmfast.errors import TextError
from mlmfast.masking import METRICS

FAMILIES = ["bert", "roberta", "xlm_roberta", "deberta"]


class Case:
    """One family: the package's model and the truth's."""

    def __init__(self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.lm = mlmfast.load(folder, semantics="upstream")
        self.forward: Forward = forward_of(model)
        self.tokenizer = tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    family = request.param
    return Case(
        request.getfixturevalue(f"{family}_folder"),
        request.getfixturevalue(f"{family}_model"),
        request.getfixturevalue(f"{family}_tokenizer"),
    )


def test_the_metrics_are_those_of_the_design() -> None:
    assert list(METRICS) == ALL_METRICS


@pytest.mark.parametrize("metric", ALL_METRICS)
def test_metric_equals_the_loop(case: Case, metric: str) -> None:
    scores = case.lm.score(TEXTS, metric=metric)
    assert [score.text for score in scores] == TEXTS
    for text, score in zip(TEXTS, scores):
        assert score.metric == metric
        assert_score(score, reference_loop(case.forward, case.tokenizer, text, metric), what=f"{metric} of {text!r}")


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("window", {"window": 1}),
        ("window", {"window": 2}),
        ("window", {"window": 100}),
        ("strided", {"stride": 1}),
        ("strided", {"stride": 3}),
        ("strided", {"stride": 100}),
    ],
)
def test_window_and_stride(case: Case, metric: str, options: dict[str, int]) -> None:
    for text in TEXTS[1:]:
        score = case.lm.score([text], metric=metric, **options)[0]
        assert_score(score, reference_loop(case.forward, case.tokenizer, text, metric, **options), what=f"{options}")


def test_a_window_of_one_is_original_and_a_wide_one_is_left_to_right(case: Case) -> None:
    original, narrow = case.lm.score(TEXTS[:1]), case.lm.score(TEXTS[:1], metric="window", window=1)
    assert_near(narrow[0].logprobs, original[0].logprobs, 1e-5)
    l2r, wide = case.lm.score(TEXTS[:1], metric="global_l2r"), case.lm.score(TEXTS[:1], metric="window", window=999)
    assert_near(wide[0].logprobs, l2r[0].logprobs, 1e-5)
    assert np.abs(l2r[0].logprobs - original[0].logprobs).max() > 0.1


@pytest.mark.parametrize("metric", ALL_METRICS)
def test_span(case: Case, metric: str) -> None:
    text = TEXTS[0]
    spans = [(0, 3), (text.index("cat"), text.index("cat") + 3), (text.index("remark"), len(text)), (0, len(text))]
    scores = case.lm.score([text] * len(spans), metric=metric, spans=spans, stride=3)
    for span, score in zip(spans, scores):
        truth = reference_loop(case.forward, case.tokenizer, text, metric, span=span, stride=3)
        assert_score(score, truth, what=f"{metric}, characters {span}")
        assert 0 < len(score) <= len(case.lm.score([text])[0])


def test_no_span_among_spans_means_the_whole_text(case: Case) -> None:
    some, whole = case.lm.score([TEXTS[0], TEXTS[1]], spans=[(0, 3), None])
    assert_score(some, reference_loop(case.forward, case.tokenizer, TEXTS[0], span=(0, 3)))
    assert_score(whole, reference_loop(case.forward, case.tokenizer, TEXTS[1]))


def test_a_span_inside_a_word_scores_the_pieces_it_touches(case: Case) -> None:
    text = "Every unbelievable ☃ repainted."
    for start in range(len(text)):
        span = (start, start + 1)
        if text[start] == " ":
            continue
        score = case.lm.score([text], spans=[span])[0]
        assert_score(score, reference_loop(case.forward, case.tokenizer, text, span=span), what=f"character {start}")


@pytest.mark.parametrize("metric", ALL_METRICS)
def test_continuations(case: Case, metric: str) -> None:
    pairs = [
        ("The cat watches", " every lighthouse."),
        ("The cat watches ", "every lighthouse."),
        ("The hungry gard", "ener follows"),
        ("", "No sparrows."),
        ("No", " ☃"),
        ("The cat", "!"),
        ("The cat", " follow "),
        (" ", "The cat"),
        ("The cat\n", "\tfollow"),
    ]
    scores = case.lm.score_continuations(pairs, metric=metric)
    for (prefix, continuation), score in zip(pairs, scores):
        truth = continuation_loop(case.forward, case.tokenizer, prefix, continuation, metric)
        assert score.text == prefix + continuation
        assert_score(score, truth, what=f"{metric} of {continuation!r} after {prefix!r}")


def test_leading_white_space_belongs_to_the_continuation(case: Case) -> None:
    tight, loose = case.lm.score_continuations([("The cat", " follow"), ("The cat ", "follow")])
    assert tight.tokens == loose.tokens
    assert_near(tight.logprobs, loose.logprobs, 1e-5)


def test_prefix_and_continuation_tokens_make_up_the_text(case: Case) -> None:
    prefix, continuation = "Every gardener", " remembers the rain."
    whole = case.lm.score([prefix + continuation])[0]
    rest = case.lm.score_continuations([(prefix, continuation)])[0]
    before = case.lm.score([prefix + continuation], spans=[(0, len(prefix))])[0]
    assert before.tokens + rest.tokens == whole.tokens
    assert_near(np.concatenate([before.logprobs, rest.logprobs]), whole.logprobs, 1e-5)


def test_special_tokens_in_the_text_are_neither_masked_nor_scored(case: Case) -> None:
    mask, sep = case.tokenizer.mask_token, case.tokenizer.sep_token
    text = f"The {mask} cat {sep} watches"
    for metric in ALL_METRICS:
        score = case.lm.score([text], metric=metric)[0]
        assert not {case.tokenizer.mask_token_id, case.tokenizer.sep_token_id} & set(score.token_ids.tolist())
        assert_score(score, reference_loop(case.forward, case.tokenizer, text, metric), what=metric)


def test_unknown_pieces_are_scored(case: Case) -> None:
    score = case.lm.score(["No ☃ sparrows."])[0]
    encoded = case.tokenizer("No ☃ sparrows.", add_special_tokens=False)["input_ids"]
    assert list(score.token_ids) == encoded
    if case.tokenizer.convert_tokens_to_ids("â") in (None, case.tokenizer.unk_token_id):  # every byte is known to BPE
        assert case.tokenizer.unk_token_id in score.token_ids


def test_what_a_score_holds(case: Case) -> None:
    text = TEXTS[0]
    score = case.lm.score([text])[0]
    encoding = case.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assert score.tokens == case.tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    assert [tuple(offset) for offset in score.offsets or []] == [tuple(o) for o in encoding["offset_mapping"]]
    assert score.total == pytest.approx(float(score.logprobs.astype(np.float64).sum()), abs=1e-9)
    assert score.perplexity == pytest.approx(np.exp(-score.total / len(score)))
    assert score.ranks is None and score.entropies is None and score.truncated == 0


# White space of all sorts, marks that combine, letters of one and several bytes, and pieces of words.
characters = st.one_of(
    st.sampled_from(list("  \n\taetcTh.'é\u0301ß☃漢ﬁ\u200d\u00a0\u200b🙂\u0007")),
    st.characters(exclude_categories=["Cs"]),
)
fragments = st.lists(st.one_of(st.sampled_from(["The cat", " follow", "gard", "ener"]), characters), max_size=6).map(
    "".join
)


@given(prefix=fragments, continuation=fragments, metric=st.sampled_from(ALL_METRICS))
@settings(max_examples=40)
def test_any_text_scores_like_the_loop_or_is_refused(case: Case, prefix: str, continuation: str, metric: str) -> None:
    truth = continuation_loop(case.forward, case.tokenizer, prefix, continuation, metric)
    score = case.lm.score_continuations([(prefix, continuation)], metric=metric, on_error="return")[0]
    if not truth.positions:
        assert isinstance(score, TextError)
    else:
        assert_score(score, truth, what=f"{metric} of {continuation!r} after {prefix!r}")
        assert score.text == prefix + continuation


@pytest.mark.parametrize("metric", ["original", "window", "unmasked", "strided"])
def test_ranks_and_entropies(case: Case, metric: str) -> None:
    for text, score in zip(TEXTS, case.lm.score(TEXTS, metric=metric, ranks=True, entropies=True)):
        truth = reference_loop(case.forward, case.tokenizer, text, metric)
        assert_score(score, truth)
        assert_near(score.entropies, truth.entropies, what="entropies")
        # float32 may swap neighbours that are closer than its own error: the rank is right if the truth's ties allow it
        gap = 1e-4 * np.maximum(1.0, np.abs(truth.logprobs))
        best = 1 + (truth.rows > truth.logprobs[:, None] + gap[:, None]).sum(1)
        worst = (truth.rows >= truth.logprobs[:, None] - gap[:, None]).sum(1)
        assert score.ranks is not None and score.ranks.dtype == np.int64
        assert np.all((best <= score.ranks) & (score.ranks <= worst))
        assert (score.ranks == truth.ranks).mean() > 0.9


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(case: Case, temperature: float) -> None:
    score = case.lm.score(TEXTS[:1], temperature=temperature, entropies=True)[0]
    truth = reference_loop(case.forward, case.tokenizer, TEXTS[0], temperature=temperature)
    assert_score(score, truth, what="temperature")
    assert_near(score.entropies, truth.entropies, what="entropies")


def test_unmasked_probabilities_of_one_pass(case: Case) -> None:
    """The whole row of the plain pass, not only its target: ESM's wild-type marginals read other columns."""
    distribution = case.lm.distributions(TEXTS[:1], metric="unmasked", top_k=None)[0]
    assert_near(distribution.logprobs, reference_loop(case.forward, case.tokenizer, TEXTS[0], "unmasked").rows)
