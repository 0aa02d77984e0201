"""DeBERTa, v2 and v3 in every configuration, inside and well past its trained length, under both semantics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from appending import appending, loop
from checkpoints import SMALL_DEBERTAS, TEXTS, far_cases, long_text, perturb, save, small_deberta, small_deberta_v1
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
CONFIGURATIONS_V1: dict[str, dict[str, Any]] = {
    "base": {},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": ["p2c"]},
    "no position terms": {"pos_att_type": []},
    "no position terms named": {"pos_att_type": None},
    "written with a bar": {"pos_att_type": "p2c|c2p"},
    "a term twice": {"pos_att_type": "p2c|c2p|c2p"},  # which counts towards the scale
    "relative positions from max_position_embeddings": {"max_relative_positions": -1, "max_position_embeddings": 20},
    "absolute positions": {"relative_attention": False, "position_biased_input": True},
    "absolute positions only": {"relative_attention": False, "position_biased_input": True, "pos_att_type": []},
    "no positions": {"relative_attention": False},
    "both kinds of positions": {"position_biased_input": True},
    "one layer": {"num_hidden_layers": 1},
    "narrow embeddings": {"embedding_size": 24},
    "wide embeddings, token types, absolute positions": {
        "embedding_size": 40,
        "type_vocab_size": 2,
        "position_biased_input": True,
    },
    "new head": {"legacy": False},
    "token types": {"type_vocab_size": 2},
    "one head of 32": {"num_attention_heads": 1},
    "heads of 128": {"hidden_size": 256, "num_attention_heads": 2},
}
CASES = [("deberta-v2", name) for name in CONFIGURATIONS] + [("deberta", name) for name in CONFIGURATIONS_V1]


@dataclass(frozen=True)
class Case:
    """A checkpoint in one configuration."""

    family: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def equals_the_loop(self, lm: mlmfast.MaskedLM, semantics: str, metrics: list[str]) -> None:
        assert lm.semantics == semantics and lm.family == self.family
        cases = far_cases(self.tokenizer, lm.config)
        assert_equals_the_loop(lm, forward_of(self.model), self.tokenizer, cases, metrics)


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def case(
    request: pytest.FixtureRequest,
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    family, name = request.param
    tokenizer = deberta_tokenizers[family]
    options = CONFIGURATIONS[name] if family == "deberta-v2" else CONFIGURATIONS_V1[name]
    model = SMALL_DEBERTAS[family](len(tokenizer), **options)
    return Case(family, save(tmp_path_factory.mktemp("deberta"), model, tokenizer), model, tokenizer)


def test_upstream_equals_the_model_as_it_is(case: Case) -> None:
    lm = mlmfast.load(case.folder, semantics="upstream")
    case.equals_the_loop(lm, "upstream", ["original", "window", "unmasked"])


def test_trained_equals_the_model_with_clamped_distances(case: Case, clamped: None) -> None:
    case.equals_the_loop(mlmfast.load(case.folder), "trained", ["original", "global_l2r", "strided"])


def test_a_live_model_is_scored_as_it_is(case: Case) -> None:
    case.equals_the_loop(mlmfast.load(case.model, case.tokenizer), "upstream", ["within_word_l2r"])


@pytest.mark.parametrize(
    ("family", "options"), [("deberta-v2", {}), ("deberta-v2", {"position_buckets": -1}), ("deberta", {})], ids=str
)
def test_the_two_semantics_part_past_the_trained_length_only(
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    tokenizer = deberta_tokenizers[family]
    folder = save(tmp_path, SMALL_DEBERTAS[family](len(tokenizer), **options), tokenizer)
    upstream, trained = mlmfast.load(folder, semantics="upstream"), mlmfast.load(folder, semantics="trained")
    for length in (4, 8, 15, 16):  # the farthest distance is length - 1, and 15 was trained
        text = long_text(tokenizer, length)
        assert_near(upstream.score([text])[0].logprobs, trained.score([text])[0].logprobs, 1e-5, f"{length} tokens")
    for length in (18, 40, 80):
        text = long_text(tokenizer, length)
        assert np.abs(upstream.score([text])[0].logprobs - trained.score([text])[0].logprobs).max() > 1e-2


@pytest.mark.parametrize("family", SMALL_DEBERTAS)
@pytest.mark.parametrize("length", [17, 80])
def test_relative_positions_have_no_longest_text(
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase], family: str, length: int
) -> None:
    tokenizer = deberta_tokenizers[family]
    model = SMALL_DEBERTAS[family](len(tokenizer))
    lm = mlmfast.load(model, tokenizer)
    assert lm.max_length is None
    text = long_text(tokenizer, length) + " " + long_text(tokenizer, 40, seed=1)  # past max_position_embeddings too
    truth = reference_loop(forward_of(model), tokenizer, text, "strided")
    assert_score(lm.score([text], metric="strided")[0], truth)


@pytest.mark.parametrize("family", SMALL_DEBERTAS)
def test_absolute_positions_have_one(
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path, family: str
) -> None:
    tokenizer = deberta_tokenizers[family]
    model = SMALL_DEBERTAS[family](len(tokenizer), position_biased_input=True, max_position_embeddings=24)
    lm = mlmfast.load(save(tmp_path, model, tokenizer))
    assert lm.max_length == 24
    lm.score([long_text(tokenizer, 24)], metric="unmasked")
    with pytest.raises(TextError, match=r"25.*24"):
        lm.score([long_text(tokenizer, 25)])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("deberta-v2", options) for options in (
            {"attention_head_size": 12},
            {"conv_kernel_size": 3, "conv_act": "relu"},
            {"conv_kernel_size": 4, "conv_act": "gelu"},
            {"norm_rel_ebd": "layer_norm|none"},
            {"position_buckets": 7},
            {"position_buckets": 32},
        )),
        ("deberta", {"talking_head": True}),
        *(
            (family, options)
            for family in SMALL_DEBERTAS
            for options in (
                {"hidden_act": "relu"},
                {"hidden_act": "gelu_new"},
                {"hidden_act": "silu"},
                {"pos_att_type": ["c2p", "p2p"]},
                {"tie_word_embeddings": False},
                {"tie_word_embeddings": False, "legacy": False},
                {"layer_norm_eps": 0.3},
                {"pad_token_id": 3},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_an_uncommon_option_is_right_or_refused_by_name(
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    tokenizer = deberta_tokenizers[family]
    text = long_text(tokenizer, 40)
    try:
        model = SMALL_DEBERTAS[family](len(tokenizer), **options)
        forward = forward_of(model)
        truth = reference_loop(forward, tokenizer, text)
    except (RuntimeError, ValueError) as reason:
        pytest.skip(f"transformers itself cannot run it: {reason}")
    folder = save(tmp_path, model, tokenizer)
    try:
        lm = mlmfast.load(folder, semantics="upstream")
    except UnsupportedModelError as refusal:
        assert str(refusal).startswith(f"{family}: ") and any(name in str(refusal) for name in options)
        assert not {"tie_word_embeddings", "layer_norm_eps", "pad_token_id"} & set(options)
        return
    assert not {"talking_head", "pos_att_type"} & set(options)
    assert_score(lm.score([text])[0], truth, what=str(options))


@pytest.mark.parametrize("family", SMALL_DEBERTAS)
def test_a_live_model_may_be_scored_as_it_was_trained(
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase], family: str, clamped: None
) -> None:
    tokenizer = deberta_tokenizers[family]
    model = SMALL_DEBERTAS[family](len(tokenizer))
    lm = mlmfast.load(model, tokenizer, semantics="trained")
    assert_equals_the_loop(lm, forward_of(model), tokenizer, far_cases(tokenizer, lm.config), ["original"])


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        (
            "deberta-v2",
            ["rel_embeddings", "encoder.LayerNorm", "0.attention.self.key_proj", "1.attention.self.query_proj"],
        ),
        (
            "deberta",
            ["rel_embeddings", "0.attention.self.in_proj", "1.attention.self.in_proj", "pos_proj", "pos_q_proj"],
        ),
    ],
)
def test_training_a_live_model_moves_its_scores(
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase], family: str, weights: list[str]
) -> None:
    """Some weights are projected or copied ahead of time; a step on any of them must reach the scores."""
    tokenizer = deberta_tokenizers[family]
    model = SMALL_DEBERTAS[family](len(tokenizer))
    lm = mlmfast.load(model, tokenizer)
    for name in weights:
        before = lm.score([TEXTS[1]])[0].logprobs
        trained = [weight for weight_name, weight in model.named_parameters() if name in weight_name]
        assert trained, name
        optimiser = torch.optim.SGD(trained, lr=1.0)
        for weight in trained:
            weight.grad = 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        optimiser.step()
        after = lm.score([TEXTS[1]])[0]
        assert np.abs(after.logprobs - before).max() > 1e-3, name
        assert_score(after, reference_loop(forward_of(model), tokenizer, TEXTS[1]), what=name)


@pytest.mark.parametrize("options", [{}, {"cache": "window", "recompute": 100}, {"draft": "masks"}], ids=str)
@pytest.mark.parametrize("family", SMALL_DEBERTAS)
def test_generation_past_the_trained_length_is_the_plain_loop(
    deberta_tokenizers: dict[str, PreTrainedTokenizerBase], family: str, options: dict[str, Any]
) -> None:
    tokenizer = deberta_tokenizers[family]
    model = SMALL_DEBERTAS[family](len(tokenizer))
    lm, truth = mlmfast.load(model, tokenizer), appending(model, tokenizer)
    prompts = [long_text(tokenizer, length, length) for length in (5, 12, 40)]
    for prompt, found in zip(prompts, lm.generate(prompts, max_new_tokens=8, eos_token_id=[], **options)):
        tokens, logprobs = loop(truth, tokenizer(prompt, add_special_tokens=False)["input_ids"], 8)
        assert found.token_ids.tolist() == tokens
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)


def test_perturbed_weights_are_far_from_their_usual_values() -> None:
    """The suite's own assumption: no weight of a test model is at a value that would hide a missing term."""
    options = {"type_vocab_size": 2, "position_biased_input": True}
    for model in (small_deberta(99, conv_kernel_size=3, **options), small_deberta_v1(99, **options)):
        for name, weight in perturb(model).named_parameters():
            assert weight.std() > 0.05, name
