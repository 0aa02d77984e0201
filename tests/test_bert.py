"""BERT from a folder and alive: token types, lengths up to the last position, weights shared with a trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, long_text, save, small_bert
from transformers import PreTrainedTokenizerBase
from truth import assert_near, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import RequestError, TextError, UnsupportedModelError

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "one layer": {"num_hidden_layers": 1},
    "three layers": {"num_hidden_layers": 3},
    "one token type": {"type_vocab_size": 1},
    "one head": {"num_attention_heads": 1},
    "eps that shows": {"layer_norm_eps": 0.5},
}


@pytest.fixture(scope="module")
def tokenizer(bert_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return bert_tokenizer


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_folder_and_live_model_equal_the_loop(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str) -> None:
    model = small_bert(len(tokenizer), **CONFIGURATIONS[name])
    forward = forward_of(model)
    for lm in (mlmfast.load(save(tmp_path, model, tokenizer)), mlmfast.load(model, tokenizer)):
        assert lm.family == "bert" and lm.max_length == 48 and lm.vocab_size == len(tokenizer)
        for metric in ("original", "window", "global_l2r"):
            for text, score in zip(TEXTS, lm.score(TEXTS, metric=metric)):
                assert_score(score, reference_loop(forward, tokenizer, text, metric), what=f"{metric} of {text!r}")


def test_both_semantics_are_one(bert_folder: Path) -> None:
    trained, upstream = mlmfast.load(bert_folder), mlmfast.load(bert_folder, semantics="upstream")
    assert trained.semantics == "trained" and upstream.semantics == "upstream"
    for a, b in zip(trained.score(TEXTS), upstream.score(TEXTS)):
        assert_near(a.logprobs, b.logprobs, 1e-6)


@pytest.mark.parametrize("tokens", [3, 17, 47, 48])
def test_every_length_up_to_the_last_position(
    tokenizer: PreTrainedTokenizerBase, bert_folder: Path, tokens: int
) -> None:
    text = long_text(tokenizer, tokens)
    lm = mlmfast.load(bert_folder)
    truth = reference_loop(forward_of(small_bert(len(tokenizer))), tokenizer, text)
    assert_score(lm.score([text])[0], truth, what=f"{tokens} tokens")


def test_one_token_too_many_is_refused(tokenizer: PreTrainedTokenizerBase, bert_folder: Path) -> None:
    with pytest.raises(TextError, match="49.*48"):
        mlmfast.load(bert_folder).score([long_text(tokenizer, 49)])


@pytest.mark.parametrize(
    "options",
    [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"tie_word_embeddings": False}, {"is_decoder": True}],
    ids=str,
)
def test_an_uncommon_option_is_right_or_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = small_bert(len(tokenizer), **options)
    folder = save(tmp_path, model, tokenizer)
    try:
        lm = mlmfast.load(folder)
    except UnsupportedModelError as refusal:
        assert any(name in str(refusal) for name in options)
        return
    assert_score(lm.score([TEXTS[1]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[1]), what=str(options))


def test_a_live_model_needs_its_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        mlmfast.load(small_bert(len(tokenizer)))


def test_the_weights_are_shared_not_copied(tokenizer: PreTrainedTokenizerBase) -> None:
    """Scores follow the model's storage, whichever tensor is written, and nothing of the model is changed."""
    model = small_bert(len(tokenizer))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    lm = mlmfast.load(model, tokenizer)
    lm.score(TEXTS)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.requires_grad, name
    for name, weight in model.named_parameters():
        if "pooler" in name or "token_type" in name:
            continue
        score = lm.score([TEXTS[1]])[0].logprobs
        with torch.no_grad():
            weight.mul_(0.5).add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
        moved = np.abs(lm.score([TEXTS[1]])[0].logprobs - score).max()
        # a bias on the keys shifts every score of a query alike, so softmax drops it
        assert moved > 1e-5 or name.endswith("key.bias"), name
    assert_score(lm.score([TEXTS[1]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[1]))


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW, partial(torch.optim.AdamW, fused=True)])
def test_scores_follow_an_optimiser(tokenizer: PreTrainedTokenizerBase, optimiser: Any) -> None:
    model = small_bert(len(tokenizer))
    lm = mlmfast.load(model, tokenizer)
    first = lm.score([TEXTS[1]])[0]
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    steps = optimiser(model.parameters(), lr=0.05)
    for _ in range(2):
        steps.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        steps.step()
        score = lm.score([TEXTS[1]])[0]
        assert np.abs(score.logprobs - first.logprobs).max() > 1e-3
        assert_score(score, reference_loop(forward_of(model), tokenizer, TEXTS[1]))


def test_a_weight_replaced_as_a_whole_is_noticed(tokenizer: PreTrainedTokenizerBase) -> None:
    """``load_state_dict(assign=True)`` and ``weight.data = ...`` put new storage under the same name."""
    model, other = small_bert(len(tokenizer), seed=0), small_bert(len(tokenizer), seed=9)
    lm = mlmfast.load(model, tokenizer)
    lm.score([TEXTS[1]])
    for weight, new in zip(model.parameters(), other.parameters()):
        weight.data = new.data.clone()
    assert_score(lm.score([TEXTS[1]])[0], reference_loop(forward_of(other), tokenizer, TEXTS[1]))


def test_a_model_in_training_mode_is_scored_without_dropout_and_left_in_it(tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_bert(len(tokenizer)).train()
    score = mlmfast.load(model, tokenizer).score([TEXTS[1]])[0]
    assert model.training
    assert_score(score, reference_loop(forward_of(model), tokenizer, TEXTS[1]))


def test_a_live_model_keeps_its_dtype(tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_bert(len(tokenizer)).to(torch.bfloat16)
    lm = mlmfast.load(model, tokenizer)
    assert lm.dtype == torch.bfloat16
    score = lm.score([TEXTS[1]])[0]
    truth = reference_loop(forward_of(model), tokenizer, TEXTS[1])
    assert score.logprobs.dtype == np.float32
    with torch.no_grad():  # the bound of CONTRIBUTING.md for half precision: twice plain torch's own error, plus 1e-3
        plain = []
        for ids, position, target in zip(truth.copies, truth.positions, truth.token_ids):
            row = model(torch.tensor([list(ids)])).logits[0, position].float()
            plain.append(float(torch.log_softmax(row, -1)[target]))
    own_error = np.abs(np.array(plain) - truth.logprobs).max()
    assert np.abs(score.logprobs - truth.logprobs).max() <= 2 * own_error + 1e-3


def test_float64_is_a_tighter_truth(tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_bert(len(tokenizer)).double()
    lm = mlmfast.load(model, tokenizer)
    score = lm.score([TEXTS[1]])[0]
    assert_near(score.logprobs, reference_loop(forward_of(model), tokenizer, TEXTS[1]).logprobs, 1e-6)
