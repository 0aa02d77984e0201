"""DeBERTa-v2/v3 in every configuration, inside and well past its trained length, under both semantics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, far_cases, long_text, perturb, save, small_deberta
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_equals_the_loop, assert_near, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import TextError, UnsupportedModelError

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "v3": {},
    "own position projections": {"share_att_key": False},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": ["p2c"]},
    "c2p own projections": {"pos_att_type": ["c2p"], "share_att_key": False},
    "p2c own projections": {"pos_att_type": ["p2c"], "share_att_key": False},
    "no position terms": {"pos_att_type": []},
    "written with a bar": {"pos_att_type": "p2c|c2p"},
    "no buckets": {"position_buckets": -1},
    "no buckets, own projections": {"position_buckets": -1, "share_att_key": False},
    "odd buckets": {"position_buckets": 6, "max_relative_positions": 21},
    "relative positions from max_position_embeddings": {"max_relative_positions": -1, "max_position_embeddings": 20},
    "absolute positions": {"relative_attention": False, "position_biased_input": True},
    "absolute positions, p2c and c2p named": {
        "relative_attention": False,
        "position_biased_input": True,
        "pos_att_type": ["p2c", "c2p"],  # no effect but on the scale of the attention scores
    },
    "absolute positions only": {"relative_attention": False, "position_biased_input": True, "pos_att_type": []},
    "both kinds of positions": {"position_biased_input": True},
    "conv gelu": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "conv tanh by default": {"conv_kernel_size": 3},
    "conv tanh": {"conv_kernel_size": 3, "conv_act": "tanh", "num_hidden_layers": 3},
    "conv groups": {"conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 4},
    "conv wide": {"conv_kernel_size": 5, "conv_act": "gelu"},
    "conv, one layer": {"conv_kernel_size": 3, "conv_act": "gelu", "num_hidden_layers": 1},
    "one layer": {"num_hidden_layers": 1},
    "one layer, own projections": {"num_hidden_layers": 1, "share_att_key": False},
    "narrow embeddings": {"embedding_size": 24},
    "wide embeddings, token types, absolute positions": {
        "embedding_size": 40,
        "type_vocab_size": 2,
        "position_biased_input": True,
    },
    "norm_rel_ebd none": {"norm_rel_ebd": "none"},
    "norm_rel_ebd none, own projections": {"norm_rel_ebd": "none", "share_att_key": False},
    "new head": {"legacy": False},
    "new head, conv, own projections": {"legacy": False, "conv_kernel_size": 3, "share_att_key": False},
    "token types": {"type_vocab_size": 2},
    "one head": {"num_attention_heads": 1},
}


@pytest.fixture(scope="module")
def tokenizer(deberta_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return deberta_tokenizer


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def checkpoint(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel]:
    model = small_deberta(len(tokenizer), **CONFIGURATIONS[request.param])
    return save(tmp_path_factory.mktemp("deberta"), model, tokenizer), model


def test_upstream_equals_the_model_as_it_is(
    checkpoint: tuple[Path, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    folder, model = checkpoint
    lm = mlmfast.load(folder, semantics="upstream")
    assert lm.semantics == "upstream" and lm.family == "deberta-v2"
    assert_equals_the_loop(
        lm, forward_of(model), tokenizer, far_cases(tokenizer, lm.config), ["original", "window", "unmasked"]
    )


def test_trained_equals_the_model_with_clamped_distances(
    checkpoint: tuple[Path, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, clamped: None
) -> None:
    folder, model = checkpoint
    lm = mlmfast.load(folder)
    assert lm.semantics == "trained"
    assert_equals_the_loop(
        lm, forward_of(model), tokenizer, far_cases(tokenizer, lm.config), ["original", "global_l2r", "strided"]
    )


def test_a_live_model_is_scored_as_it_is(
    checkpoint: tuple[Path, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    _, model = checkpoint
    lm = mlmfast.load(model, tokenizer)
    assert lm.semantics == "upstream"
    assert_equals_the_loop(lm, forward_of(model), tokenizer, far_cases(tokenizer, lm.config), ["within_word_l2r"])


@pytest.mark.parametrize("options", [{}, {"position_buckets": -1}], ids=["buckets", "no buckets"])
def test_the_two_semantics_part_past_the_trained_length_only(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = save(tmp_path, small_deberta(len(tokenizer), **options), tokenizer)
    upstream, trained = mlmfast.load(folder, semantics="upstream"), mlmfast.load(folder, semantics="trained")
    for length in (4, 8, 15, 16):  # the farthest distance is length - 1, and 15 was trained
        text = long_text(tokenizer, length)
        assert_near(upstream.score([text])[0].logprobs, trained.score([text])[0].logprobs, 1e-5, f"{length} tokens")
    for length in (18, 40, 80):
        text = long_text(tokenizer, length)
        assert np.abs(upstream.score([text])[0].logprobs - trained.score([text])[0].logprobs).max() > 1e-2


@pytest.mark.parametrize("length", [17, 80])
def test_relative_positions_have_no_longest_text(
    deberta_folder: Path, deberta_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    lm = mlmfast.load(deberta_folder, semantics="upstream")
    assert lm.max_length is None
    text = long_text(tokenizer, length) + " " + long_text(tokenizer, 40, seed=1)  # past max_position_embeddings too
    truth = reference_loop(forward_of(deberta_model), tokenizer, text, "strided")
    assert_score(lm.score([text], metric="strided")[0], truth)


def test_absolute_positions_have_one(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = small_deberta(len(tokenizer), position_biased_input=True, max_position_embeddings=24)
    lm = mlmfast.load(save(tmp_path, model, tokenizer))
    assert lm.max_length == 24
    lm.score([long_text(tokenizer, 24)], metric="unmasked")
    with pytest.raises(TextError, match=r"25.*24"):
        lm.score([long_text(tokenizer, 25)])


@pytest.mark.parametrize(
    "options",
    [
        {"attention_head_size": 12},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"tie_word_embeddings": False},
        {"layer_norm_eps": 0.3},
        {"conv_kernel_size": 3, "conv_act": "relu"},
        {"conv_kernel_size": 4, "conv_act": "gelu"},
        {"norm_rel_ebd": "layer_norm|none"},
        {"position_buckets": 7},
        {"position_buckets": 32},
        {"pad_token_id": 3},
    ],
    ids=str,
)
def test_an_uncommon_option_is_right_or_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, options: dict[str, Any]
) -> None:
    text = long_text(tokenizer, 40)
    try:
        model = small_deberta(len(tokenizer), **options)
        forward = forward_of(model)
        truth = reference_loop(forward, tokenizer, text)
    except (RuntimeError, ValueError) as reason:
        pytest.skip(f"transformers itself cannot run it: {reason}")
    folder = save(tmp_path, model, tokenizer)
    try:
        lm = mlmfast.load(folder, semantics="upstream")
    except UnsupportedModelError as refusal:
        assert any(name in str(refusal) for name in options)
        return
    assert_score(lm.score([text])[0], truth, what=str(options))


def test_a_live_model_may_be_scored_as_it_was_trained(
    tokenizer: PreTrainedTokenizerBase, deberta_model: PreTrainedModel, clamped: None
) -> None:
    lm = mlmfast.load(deberta_model, tokenizer, semantics="trained")
    assert_equals_the_loop(lm, forward_of(deberta_model), tokenizer, far_cases(tokenizer, lm.config), ["original"])


def test_training_a_live_model_moves_its_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    """Position tables are projected ahead of time; a step on any weight they come from must reach the scores."""
    model = small_deberta(len(tokenizer))
    lm = mlmfast.load(model, tokenizer)
    for name in [
        "rel_embeddings",
        "encoder.LayerNorm",
        "layer.0.attention.self.key_proj",
        "layer.1.attention.self.query",
    ]:
        before = lm.score([TEXTS[1]])[0].logprobs
        with torch.no_grad():
            for weight_name, weight in model.named_parameters():
                if name in weight_name:
                    weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        after = lm.score([TEXTS[1]])[0]
        assert np.abs(after.logprobs - before).max() > 1e-3, name
        assert_score(after, reference_loop(forward_of(model), tokenizer, TEXTS[1]), what=name)


def test_perturbed_weights_are_far_from_their_usual_values(tokenizer: PreTrainedTokenizerBase) -> None:
    """The suite's own assumption: no weight of a test model is at a value that would hide a missing term."""
    model = perturb(small_deberta(len(tokenizer), conv_kernel_size=3, type_vocab_size=2, position_biased_input=True))
    for name, weight in model.named_parameters():
        assert weight.std() > 0.05, name
