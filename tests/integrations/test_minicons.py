"""The drop-in for minicons gives what minicons' own code gives, over its options, and right numbers where that fails.

minicons' wheel is made to run on transformers 5 by one line, in ``pair``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, long_text, sentences
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near, forward_of, reference_loop

from mlmfast.errors import RequestError, TextError
from mlmfast.integrations.minicons import MaskedLMScorer

minicons = pytest.importorskip("minicons.scorer", reason='pip install "mlmfast[minicons]"')

METRICS = ["original", "within_word_l2r"]
BATCH = [*TEXTS, *sentences(3)]
PREFIXES = ["The gardener", "", "No sparrows, unbelievably,"]
STIMULI = ["remembers every cat", "humming children", "has forgotten"]
SUFFIXES = ["before breakfast.", "in the rain", "!"]

Pair = tuple[Any, MaskedLMScorer]


@pytest.fixture(scope="module", params=["bert", "roberta", "deberta"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return request.getfixturevalue(f"{family}_model"), request.getfixturevalue(f"{family}_tokenizer")


@pytest.fixture(scope="module")
def pair(checkpoint: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Iterator[Pair]:
    """minicons' scorer and ours, of one model."""
    model, tokenizer = checkpoint
    with pytest.MonkeyPatch.context() as patch:
        # All that the wheel needs: transformers 5 has taken this name away, and calling the tokenizer does the same.
        patch.setattr(PreTrainedTokenizerBase, "batch_encode_plus", PreTrainedTokenizerBase.__call__, raising=False)
        yield minicons.MaskedLMScorer(model, "cpu", tokenizer=tokenizer), MaskedLMScorer(model, tokenizer=tokenizer)


def natural(values: Any, prob: bool = False, base_two: bool = False) -> np.ndarray:
    """Scores of any kind as natural logarithms, so that one bound holds for all."""
    found = np.asarray(values, np.float64)
    return np.log(found) if prob else found * np.log(2) if base_two else found


def assert_same(ours: Any, theirs: Any, **kind: bool) -> None:
    """Lists of numbers, or of lists of them, of the same types and within the bound a value."""
    assert type(ours) is type(theirs) is list
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert type(one) is type(other)
        assert_near(natural(one, **kind), natural(other, **kind))


def unlike(*options: str) -> list[dict[str, bool]]:
    """Every setting of some switches in which no two of surprisal or base_two and prob are on."""
    settings = [dict(zip(options, values)) for values in itertools.product([False, True], repeat=len(options))]
    return [one for one in settings if not (one.get("prob") and (one.get("base_two") or one.get("surprisal")))]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", unlike("prob", "base_two"))
def test_sequence_score(pair: Pair, metric: str, kind: dict[str, bool]) -> None:
    theirs, ours = pair
    for batch in (BATCH, BATCH[0]):
        assert_same(
            ours.sequence_score(batch, PLL_metric=metric, **kind),
            theirs.sequence_score(batch, PLL_metric=metric, **kind),
            **kind,
        )

    def total(x: torch.Tensor) -> float:
        assert x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 1
        return x.sum(0).item()

    assert_same(
        ours.sequence_score(BATCH, reduction=total, PLL_metric=metric, **kind),
        theirs.sequence_score(BATCH, reduction=total, PLL_metric=metric, **kind),
        **kind,
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", unlike("surprisal", "prob", "base_two"))
@pytest.mark.parametrize("rank", [False, True])
def test_token_score(pair: Pair, metric: str, kind: dict[str, bool], rank: bool) -> None:
    theirs, ours = (side.token_score(BATCH, PLL_metric=metric, rank=rank, **kind) for side in pair)
    scale = {name: on for name, on in kind.items() if name != "surprisal"}
    assert len(ours) == len(theirs) == len(BATCH)
    for one, other in zip(ours, theirs):
        assert [(type(row), [type(part) for part in row]) for row in one] == [
            (type(row), [type(part) for part in row]) for row in other
        ]
        assert [row[0] for row in one] == [row[0] for row in other]
        assert_near(natural([row[1] for row in one], **scale), natural([row[1] for row in other], **scale))
        assert [row[2:] for row in one] == [row[2:] for row in other]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", unlike("prob", "base_two"))
@pytest.mark.parametrize("suffix", [None, SUFFIXES])
def test_conditional_score(pair: Pair, metric: str, kind: dict[str, bool], suffix: list[str] | None) -> None:
    theirs, ours = (
        side.conditional_score(PREFIXES, STIMULI, suffix, PLL_metric=metric, **kind) for side in pair
    )  # fmt: skip
    assert_same(ours, theirs, **kind)
    theirs, ours = (
        side.conditional_score(PREFIXES, STIMULI, suffix, separator=", ", reduction=lambda x: x.max().item())
        for side in pair
    )
    assert_same(ours, theirs)


def test_conditional_score_of_strings(pair: Pair) -> None:
    theirs, ours = pair
    assert_same(ours.conditional_score("A cat", "watches"), theirs.conditional_score("A cat", "watches"))
    joined = ("The children", ", slowly.")
    theirs_joined = theirs.conditional_score(*joined, separator="")
    assert_same(ours.conditional_score(*joined, separator=""), theirs_joined)
    with pytest.warns(DeprecationWarning, match="conditional_score"):
        assert_same(ours.partial_score(*joined, separator=""), theirs_joined)
    # A single suffix makes minicons fail; it is one of a list of one.
    alone, listed = ours.conditional_score("A", "cat", "watches"), ours.conditional_score(["A"], ["cat"], ["watches"])
    assert alone == listed


@pytest.mark.parametrize("metric", METRICS)
def test_compute_stats_takes_what_either_prepares(pair: Pair, metric: str) -> None:
    theirs, ours = pair
    for make in (
        lambda side: side.prepare_text(BATCH, PLL_metric=metric),
        lambda side: side.prime_text(PREFIXES, STIMULI, SUFFIXES, PLL_metric=metric),
        lambda side: side.prepare_text(side.tokenizer(BATCH[:2], padding=True), PLL_metric=metric),
    ):
        wanted, wanted_ranks = theirs.compute_stats(make(theirs), rank=True)
        for preparing in (theirs, ours):
            scores, ranks = ours.compute_stats(make(preparing), rank=True)
            assert_same(scores, wanted)
            assert ranks == wanted_ranks
        for mine, other in zip(make(ours), make(theirs), strict=True):
            for a, b in zip(mine, other, strict=True):
                assert torch.equal(a, torch.as_tensor(b))
    tensors = ours.compute_stats(make(ours), return_tensors=True)
    assert all(isinstance(one, torch.Tensor) for one in tensors)
    assert ours.compute_stats(iter(())) == []


CLOZE = [
    ("The cat watches the lighthouse before breakfast.", "lighthouse"),
    ("Some dogs follow a quiet pianist in the rain!", "pianist"),
]


@pytest.mark.parametrize("metric", [None, *METRICS])
@pytest.mark.parametrize("probs", [False, True])
def test_cloze(pair: Pair, family: str, metric: str | None, probs: bool) -> None:
    theirs, ours = pair
    # A byte-level tokenizer's words begin with their space.
    queries = [(sentence, f" {word}" if family == "roberta" else word) for sentence, word in CLOZE]
    wanted = theirs.cloze(queries, PLL_metric=metric, probs=probs)
    assert_same(ours.cloze(queries, PLL_metric=metric, probs=probs), wanted, prob=probs)
    assert_same(ours.cloze(queries[0], PLL_metric=metric, probs=probs), wanted[:1], prob=probs)


def test_cloze_of_a_word_after_a_space(pair: Pair, family: str) -> None:
    """minicons does not find a byte-level tokenizer's words without the space before them."""
    theirs, ours = pair
    sentence = CLOZE[0][0]
    for metric in METRICS:
        if family == "roberta":
            with pytest.raises((IndexError, ValueError)):
                theirs.cloze([(sentence, "the")], PLL_metric=metric)
        wanted = theirs.cloze([(sentence, " the" if family == "roberta" else "the")], PLL_metric=metric)
        assert_same(ours.cloze([(sentence, "the")], PLL_metric=metric), wanted)


def test_cloze_of_a_word_that_stands_twice(pair: Pair) -> None:
    """minicons takes the second place for the next sentence's."""
    _, ours = pair
    twice = ("The cat follows the cat.", "cat")
    alone = [ours.cloze([one])[0] for one in (twice, CLOZE[0])]
    assert_near(np.array(ours.cloze([twice, CLOZE[0]])), np.array(alone))
    with pytest.raises(RequestError, match="sentence 1.*'sparrows'"):
        ours.cloze([CLOZE[0], ("The cat.", "sparrows")])


def test_distributions(pair: Pair, checkpoint: tuple[PreTrainedModel, PreTrainedTokenizerBase], family: str) -> None:
    theirs, ours = pair
    model, tokenizer = checkpoint
    queries = [("The cat watches a blank .", "blank"), ("blank dogs follow the pianist", "blank")]
    found = ours.cloze_distribution(queries)
    assert found.shape == (2, len(tokenizer))
    forward = forward_of(model)
    for row, (text, blank) in zip(found, queries):
        ids = tokenizer(text.replace(blank, tokenizer.mask_token))["input_ids"]
        assert_near(row.numpy(), forward(ids)[ids.index(tokenizer.mask_token_id)].log_softmax(0).numpy())
    if family == "bert":  # elsewhere minicons reads beside the mask
        assert_near(found.numpy(), theirs.cloze_distribution(queries).numpy())
        for base_two in (False, True):
            assert_near(ours.entropy(queries, base_two=base_two).numpy(), theirs.entropy(queries, base_two=base_two))
        space = [["a", "the"], ["the", "a"]]
        assert_near(ours.entropy(queries, space).numpy(), theirs.entropy(queries, space).numpy())
        assert_near(ours.entropy(queries[0], space[0]).numpy(), theirs.entropy(queries[0], space[0]).numpy())
        assert float(ours.entropy(queries[0], space[0])) > 0.01
        with pytest.raises(RequestError, match="1 queries, and there are 2"):
            ours.entropy(queries, space[0])
    # These two fail in minicons.
    rows = ours.distribution(ours.prepare_text(BATCH[1]))
    (scores,) = ours.compute_stats(ours.prepare_text(BATCH[1]))
    (prepared,) = ours.prepare_text(BATCH[1])
    own = rows.gather(1, prepared.targets[:, None])
    assert_near(own[:, 0].numpy(), np.array(scores))
    with pytest.warns(DeprecationWarning, match="compute_stats"):
        ((logprobs, tokens, ranks),) = ours.logprobs(ours.prepare_text(BATCH[1]), rank=True)
    assert_near(logprobs.numpy(), np.array(scores))
    assert tokens == tokenizer.convert_ids_to_tokens(prepared.targets.tolist())
    assert ((rows > own).sum(1) + 1).tolist() == ranks.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_the_constructors_metric_holds(
    pair: Pair, checkpoint: tuple[PreTrainedModel, PreTrainedTokenizerBase], metric: str
) -> None:
    """minicons keeps it from sequence_score and token_score."""
    theirs, _ = pair
    model, tokenizer = checkpoint
    ours = MaskedLMScorer(model, tokenizer=tokenizer, PLL_metric=metric)
    assert_same(ours.sequence_score(BATCH), theirs.sequence_score(BATCH, PLL_metric=metric))
    assert_same(
        [[score for _, score in row] for row in ours.token_score(BATCH)],
        [[score for _, score in row] for row in theirs.token_score(BATCH, PLL_metric=metric)],
    )
    assert_same(
        ours.conditional_score(PREFIXES, STIMULI), theirs.conditional_score(PREFIXES, STIMULI, PLL_metric=metric)
    )
    # minicons asks for the last whole word only where the call itself names the metric.
    same = minicons.MaskedLMScorer(model, "cpu", tokenizer=tokenizer, PLL_metric=metric)
    space = " " if model.config.model_type == "roberta" else ""  # else minicons does not find a word after a space
    for sentence, word in (("The cat and the cat sleep.", "cat"), ("The small cat watches.", "small cat")):
        assert_same(ours.cloze([(sentence, space + word)]), same.cloze([(sentence, space + word)]))


def test_word_score(pair: Pair, checkpoint: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """minicons' raises a TypeError."""
    theirs, ours = pair
    model, tokenizer = checkpoint
    with pytest.raises(TypeError):
        theirs.word_score(BATCH)
    assert ours.word_score([]) == []
    text = "Unbelievable gardeners: repainted, 'yellow'?  "
    words = ["Unbelievable", "gardeners", ":", "repainted", ",", "'yellow'", "?"]
    bounds = [(text.index(word), text.index(word) + len(word)) for word in words]
    truth = reference_loop(forward_of(model), tokenizer, text)
    totals = np.zeros(len(words))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for position, logprob in zip(truth.positions, truth.logprobs):
        inside = [i for i, (_, end) in enumerate(bounds) if end >= offsets[position][1]]
        totals[inside[0] if inside else -1] += logprob
    for row, sign in ((ours.word_score(text)[0], 1), (ours.word_score([text], surprisal=True)[0], -1)):
        assert [word for word, _ in row] == words
        assert_near(sign * np.array([value for _, value in row]), totals)
    assert_near(np.log([value for _, value in ours.word_score(text, prob=True)[0]]), totals)
    assert ours.word_score("") == [[]]


def test_empty_texts(pair: Pair) -> None:
    """One of them makes minicons fail, whatever is beside it."""
    theirs, ours = pair
    with pytest.raises(Exception):  # noqa: B017 - which error depends on the batch
        theirs.sequence_score(["", ""])
    assert ours.token_score(["", "A", ""])[::2] == [[], []]
    (row,), (wanted,) = ours.token_score(["", "A"])[1:], theirs.token_score(["A"])
    assert [token for token, _ in row] == [token for token, _ in wanted]
    assert_near([score for _, score in row], [score for _, score in wanted])
    found = ours.sequence_score(["", BATCH[0]])
    assert np.isnan(found[0])
    assert_same(found[1:], theirs.sequence_score([BATCH[0]]))
    assert ours.sequence_score([""], reduction=lambda x: x.sum(0).item()) == [0.0]
    assert ours.token_score([""], rank=True) == [[]]
    assert ours.sequence_score([]) == ours.cloze([]) == ours.conditional_score([], []) == []
    assert ours.distribution(ours.prepare_text("")).shape == (0, ours.lm.vocab_size)


def test_masks_that_stand_in_a_text_are_scored(pair: Pair) -> None:
    text = f"The {pair[1].tokenizer.mask_token} watches {pair[1].tokenizer.mask_token}."
    for metric in METRICS:
        theirs, ours = (side.sequence_score(text, PLL_metric=metric) for side in pair)
        assert_same(ours, theirs)


def test_requests_that_cannot_be_served(pair: Pair) -> None:
    _, ours = pair
    if ours.lm.max_length is not None:
        texts = ["A cat.", long_text(ours.tokenizer, ours.lm.max_length + 1)]
        with pytest.raises(TextError, match=f"text 1 has {ours.lm.max_length + 1} tokens.*{ours.lm.max_length}"):
            ours.sequence_score(texts)
        with pytest.raises(TextError, match="text 1"):
            ours.token_score(texts)
    for call in (
        lambda: ours.sequence_score("A", PLL_metric="global"),
        lambda: MaskedLMScorer(ours.model, tokenizer=ours.tokenizer, PLL_metric="mean"),
        lambda: ours.token_score("A", prob=True, base_two=True),
        lambda: ours.token_score("A", prob=True, surprisal=True),
        lambda: ours.word_score("A", prob=True, base_two=True),
        lambda: ours.conditional_score(["A", "B"], ["cat"]),
        lambda: MaskedLMScorer(ours.model),  # no tokenizer
        lambda: MaskedLMScorer(ours.model, tokenizer=ours.tokenizer, cache_dir="here"),
    ):
        with pytest.raises(RequestError):
            call()


def test_by_name(bert_folder: Path, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    wanted = MaskedLMScorer(bert_model, tokenizer=bert_tokenizer).sequence_score(BATCH)
    for scorer in (
        MaskedLMScorer(str(bert_folder), "cpu", torch_dtype=torch.float32),
        MaskedLMScorer(bert_folder, tokenizer=str(bert_folder), batch_tokens=64),
        MaskedLMScorer(bert_model.train(), tokenizer=str(bert_folder)),
    ):
        assert scorer.lm.semantics == "upstream"
        assert not scorer.model.training
        assert_same(scorer.sequence_score(BATCH), wanted)


def test_the_wheel_alone_fails_on_transformers_5(
    bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version("minicons") != "0.3.39":
        pytest.skip("another release of minicons")
    monkeypatch.delattr(PreTrainedTokenizerBase, "batch_encode_plus", raising=False)  # of another test's pair
    with pytest.raises(AttributeError, match="batch_encode_plus"):
        minicons.MaskedLMScorer(bert_model, "cpu", tokenizer=bert_tokenizer).sequence_score(["A cat."])
    assert MaskedLMScorer(bert_model, "cpu", tokenizer=bert_tokenizer).sequence_score(["A cat."])
