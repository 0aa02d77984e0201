"""The drop-in for lm-pub-quiz gives what its own evaluator gives, for every metric, mask and reduction."""

from __future__ import annotations

import builtins
import importlib
import sys
from typing import Any

import pytest
from checkpoints import TEXTS
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near

lm_pub_quiz = pytest.importorskip("lm_pub_quiz", reason='pip install "mlmfast[lm-pub-quiz]"')

METRICS = ["original", "within_word_l2r", "sentence_l2r", "answer_l2r+word_l2r"]
QUESTIONS: list[dict[str, Any]] = [
    {
        "template": "[X] watches [Y] before breakfast.",
        "subject": "the unbelievable gardener",
        "answers": ["cats", "the lighthouse", "humming pianists"],
    },
    {"template": "[Y] remembers [X]", "subject": "sparrows", "answers": ["a grandmother", "nobody", "repainted dogs"]},
]


@pytest.fixture(scope="module", params=["bert", "roberta", "deberta"])
def checkpoint(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return request.getfixturevalue(f"{request.param}_model"), request.getfixturevalue(f"{request.param}_tokenizer")


def evaluators(checkpoint: tuple[PreTrainedModel, PreTrainedTokenizerBase], **options: Any) -> tuple[Any, Any]:
    """lm-pub-quiz's and ours, made by the same call."""
    from mlmfast.integrations.lm_pub_quiz import MaskedLMEvaluator

    model, tokenizer = checkpoint
    kinds = (lm_pub_quiz.MaskedLMEvaluator, MaskedLMEvaluator)
    theirs, ours = (kind.from_model(model, tokenizer=tokenizer, device="cpu", **options) for kind in kinds)
    assert isinstance(ours, lm_pub_quiz.MaskedLMEvaluator)
    return theirs, ours


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", None])
def test_answers(
    checkpoint: tuple[PreTrainedModel, PreTrainedTokenizerBase], metric: str, conditional: bool, reduction: str | None
) -> None:
    theirs, ours = evaluators(checkpoint, pll_metric=metric, conditional_score=conditional)
    for question in QUESTIONS:
        wanted, found = (
            side.evaluate_instance(**question, reduction=reduction, batch_size=7) for side in (theirs, ours)
        )
        assert type(found) is type(wanted) is list
        if reduction is not None:
            assert_near(found, wanted)
            continue
        for (tokens, roles), (their_tokens, their_roles) in zip(found, wanted, strict=True):
            assert roles == their_roles
            assert [token for token, _ in tokens] == [token for token, _ in their_tokens]
            assert all(type(score) is float for _, score in tokens)
            assert_near([score for _, score in tokens], [score for _, score in their_tokens])


@pytest.mark.parametrize("metric", METRICS[:3])
def test_statements(checkpoint: tuple[PreTrainedModel, PreTrainedTokenizerBase], metric: str) -> None:
    """Without masks all but special tokens are scored; with them what they say, nothing for a statement among it."""
    theirs, ours = evaluators(checkpoint, pll_metric=metric)
    encode = {"return_special_tokens_mask": True, "return_length": True, "padding": True, "return_tensors": "pt"}
    batch = theirs.tokenizer(TEXTS, **encode)
    masks = [[False, *row[1:]] for row in theirs.default_scoring_mask(batch)]
    masks[1] = [False] * len(masks[1])
    masks[0][3] = False
    for options in ({}, {"scoring_masks": masks}):
        wanted = theirs.score_statements(batch, **options, batch_size=5)
        found = ours.score_statements(batch, **options)
        assert [len(row) for row in found] == [len(row) for row in wanted]
        for row, other in zip(found, wanted):
            assert_near(row, other)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "lm_pub_quiz":
            raise ImportError(name)
        return honest(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "mlmfast.integrations.lm_pub_quiz", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"mlmfast\[lm-pub-quiz\]"):
        importlib.import_module("mlmfast.integrations.lm_pub_quiz")
