"""Every family that a row of ``families.py`` makes: every metric equals the loop over transformers."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from appending import appending, loop
from checkpoints import TEXTS, long_text, perturb, save
from families import FAMILIES, HOLDS
from safetensors.torch import load_file, save_file
from transformers import (
    DistilBertForMaskedLM,
    ElectraForPreTraining,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from truth import ALL_METRICS, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import CheckpointError, TextError, UnsupportedModelError

NARROW = [name for name, family in FAMILIES.items() if family.narrow]
ENDING = [name for name, family in FAMILIES.items() if family.holds]


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    return FAMILIES[family].tokenizer()


def small(family: str, **options: Any) -> PreTrainedModel:
    return FAMILIES[family].small(len(tokenizer_of(family)), **options)


def assert_equals_the_loop(
    family: str,
    model: PreTrainedModel,
    folder: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Both as a folder and alive, under every metric."""
    tokenizer = tokenizer or tokenizer_of(family)
    lms = (mlmfast.load(save(folder, model, tokenizer)), mlmfast.load(model, tokenizer))
    forward = forward_of(model)
    for metric in ALL_METRICS:
        truths = [reference_loop(forward, tokenizer, text, metric) for text in texts]
        for lm in lms:
            assert lm.family == family and lm.max_length == FAMILIES[family].holds and lm.vocab_size == len(tokenizer)
            for text, truth, score in zip(texts, truths, lm.score(texts, metric=metric)):
                assert_score(score, truth, what=f"{metric} of {text!r}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_metric_equals_the_loop(family: str, tmp_path: Path) -> None:
    assert_equals_the_loop(family, small(family), tmp_path, TEXTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "size",
    [
        {"layers": 1},
        {"layers": 3},
        {"heads": 1},  # of 32
        {"hidden": 64, "heads": 2},
        {"hidden": 256, "heads": 2},  # of 128
        {"hidden": 36, "heads": 3},  # of 12
    ],
    ids=str,
)
def test_sizes(family: str, tmp_path: Path, size: dict[str, int]) -> None:
    assert_equals_the_loop(family, small(family, **FAMILIES[family].sized(**size)), tmp_path, TEXTS[1:3])


@pytest.mark.parametrize("family", NARROW)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_another_width(family: str, tmp_path: Path, tied: bool) -> None:
    model = small(family, **FAMILIES[family].narrow, tie_word_embeddings=tied)
    assert model.get_input_embeddings().weight.shape[1] == 20 and model.config.hidden_size == 32
    assert_equals_the_loop(family, model, tmp_path, TEXTS)


@pytest.mark.parametrize("family", NARROW)
def test_embeddings_wider_than_the_layers(family: str, tmp_path: Path) -> None:
    model = small(family, **dict.fromkeys(FAMILIES[family].narrow, 40))
    assert_equals_the_loop(family, model, tmp_path, TEXTS[1:3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_tied_or_of_its_own(family: str, tmp_path: Path, tied: bool) -> None:
    model = small(family, tie_word_embeddings=tied)
    ties = tied and family != "rembert"  # whose decoder is never tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == ties
    assert_equals_the_loop(family, model, tmp_path, TEXTS[1:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_uncommon_activation_and_epsilon(family: str, tmp_path: Path) -> None:
    """The heads of ELECTRA and RoBERTa keep their GELU."""
    for act in ("relu", "gelu_new"):
        names = {FAMILIES[family].activation: act, FAMILIES[family].epsilon: 0.5}
        options: dict[str, Any] = {name: value for name, value in names.items() if name is not None}
        assert_equals_the_loop(family, small(family, **options), tmp_path / act, TEXTS[1:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_added_to_the_vocabulary(family: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer_of(family))
    model = small(family, **FAMILIES[family].narrow)
    assert tokenizer.add_tokens(["snowman", "windmill", "teapot"]) == 3
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if family == "esm":  # whose bias transformers forgets
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    perturb(model)
    text = "The snowman watches a quiet windmill."
    assert len(tokenizer_of(family)) in tokenizer(text)["input_ids"]
    assert_equals_the_loop(family, model, tmp_path, [text, TEXTS[2]], tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 4, "num_hidden_groups": 2},
        {"num_hidden_layers": 5, "num_hidden_groups": 3},
        {"num_hidden_layers": 3, "num_hidden_groups": 3},
        {"num_hidden_layers": 2, "inner_group_num": 2},
        {"num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 12},
        {"num_hidden_layers": 18, "num_hidden_groups": 14},  # where step 9 falls into group 6: 9 / (18 / 14) < 7
    ],
    ids=str,
)
def test_albert_shares_its_layers_in_groups(tmp_path: Path, options: dict[str, int]) -> None:
    model = small("albert", **options)
    lm = mlmfast.load(model, tokenizer_of("albert"))
    assert len(lm.spec().layers) == options["num_hidden_layers"] * options.get("inner_group_num", 1)
    assert_equals_the_loop("albert", model, tmp_path, TEXTS[1:3])


@pytest.mark.parametrize("options", [{"use_task_id": True, "task_type_vocab_size": 3}, {"use_task_id": False}], ids=str)
def test_ernie_with_and_without_tasks(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_equals_the_loop("ernie", small("ernie", **options), tmp_path, TEXTS)


def test_distilbert_with_sinusoidal_positions(tmp_path: Path) -> None:
    model = small("distilbert", sinusoidal_pos_embds=True)
    sinusoids = DistilBertForMaskedLM(model.config).distilbert.embeddings.position_embeddings.weight
    with torch.no_grad():
        model.distilbert.embeddings.position_embeddings.weight.copy_(sinusoids)
    assert_equals_the_loop("distilbert", model, tmp_path, TEXTS[1:3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [4, 31, HOLDS - 1, HOLDS])
def test_every_length_up_to_the_last_position(family: str, tokens: int) -> None:
    tokenizer, model = tokenizer_of(family), small(family, **FAMILIES[family].narrow)
    text = long_text(tokenizer, tokens)
    score = mlmfast.load(model, tokenizer).score([text])[0]
    assert_score(score, reference_loop(forward_of(model), tokenizer, text), what=f"{tokens} tokens")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ENDING])
@pytest.mark.parametrize("tokens", [HOLDS + 1, 131])
def test_relative_positions_go_beyond_what_the_config_names(family: str, tokens: int) -> None:
    tokenizer, model = tokenizer_of(family), small(family)
    assert model.config.max_position_embeddings == HOLDS
    text = long_text(tokenizer, tokens)
    spans = [(0, 9), (len(text) // 2, len(text) // 2 + 2), (len(text) - 8, len(text))]
    for metric in ("original", "global_l2r", "unmasked"):
        for span, score in zip(spans, mlmfast.load(model, tokenizer).score([text] * 3, metric=metric, spans=spans)):
            assert_score(score, reference_loop(forward_of(model), tokenizer, text, metric, span=span), what=str(span))


@pytest.mark.parametrize("family", ENDING)
def test_one_token_too_many_is_refused(family: str) -> None:
    tokenizer = tokenizer_of(family)
    with pytest.raises(TextError, match=f"{HOLDS + 1}.*{HOLDS}"):
        mlmfast.load(small(family), tokenizer).score([long_text(tokenizer, HOLDS + 1)])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_plain_loop(family: str) -> None:
    tokenizer, model = tokenizer_of(family), small(family, **FAMILIES[family].narrow)
    lm, truth = mlmfast.load(model, tokenizer), appending(model, tokenizer)
    prompts = [*(long_text(tokenizer, length, length) for length in (4, 9, 30)), "a"]
    for prompt, found in zip(prompts, lm.generate(prompts, max_new_tokens=8, eos_token_id=[])):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens, logprobs = loop(truth, ids, 8)
        assert found.token_ids.tolist() == tokens
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"cache": "window", "recompute": 100}, {"draft": "masks"}], ids=str)
def test_a_window_over_everything_and_drafts_are_exact(family: str, options: dict[str, Any]) -> None:
    """Layers that share weights keep keys and values of their own."""
    tokenizer = tokenizer_of(family)
    lm = mlmfast.load(small(family, **(FAMILIES[family].sized(layers=3) | FAMILIES[family].narrow)), tokenizer)
    prompts = [long_text(tokenizer, length, length) for length in (4, 9, 30)]
    exact = lm.generate(prompts, max_new_tokens=8, eos_token_id=[])
    for one, other in zip(lm.generate(prompts, max_new_tokens=8, eos_token_id=[], **options), exact):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str) -> None:
    """The bound of CONTRIBUTING.md: twice plain torch's own error, plus 1e-3."""
    tokenizer, model = tokenizer_of(family), small(family, **FAMILIES[family].narrow).to(torch.bfloat16)
    score = mlmfast.load(model, tokenizer).score([TEXTS[1]])[0]
    truth = reference_loop(forward_of(model), tokenizer, TEXTS[1])
    with torch.no_grad():
        rows = [
            model(torch.tensor([list(ids)])).logits[0, position].float().log_softmax(-1)[target]
            for ids, position, target in zip(truth.copies, truth.positions, truth.token_ids)
        ]
    own_error = np.abs(torch.stack(rows).numpy() - truth.logprobs).max()
    assert np.abs(score.logprobs - truth.logprobs).max() <= 2 * own_error + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_head_is_refused(family: str, tmp_path: Path) -> None:
    tokenizer, model = tokenizer_of(family), small(family)
    save(tmp_path / "encoder", model.base_model, tokenizer)
    with pytest.raises(CheckpointError, match="noise.*masked-LM head"):
        mlmfast.load(tmp_path / "encoder")
    save(tmp_path / "part", model, tokenizer)
    weights = load_file(tmp_path / "part" / "model.safetensors")
    head = [name for name in weights if not name.startswith(model.base_model_prefix)]
    assert len(head) >= 3  # product, norm, and a bias of the vocabulary
    for name in head:
        save_file(
            {key: weights[key] for key in weights if key != name},
            tmp_path / "part" / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(CheckpointError, match="noise.*masked-LM head"):
            mlmfast.load(tmp_path / "part")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_shared_not_copied(family: str) -> None:
    """Scores follow each of the model's parameters, those that derived tensors are made of too."""
    tasks = {"use_task_id": True} if family == "ernie" else {}
    tokenizer, model = tokenizer_of(family), small(family, **FAMILIES[family].narrow, **tasks)
    lm = mlmfast.load(model, tokenizer)
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "contact_head" in name:  # ESM's, which predicts no tokens
            continue
        before = lm.score([TEXTS[1]])[0].logprobs
        with torch.no_grad():
            weight.mul_(0.5).add_(0.1 * torch.randn(weight.shape, generator=generator))
        moved = np.abs(lm.score([TEXTS[1]])[0].logprobs - before).max()
        # a bias on the keys shifts every score of a query alike, so softmax drops it
        assert moved > 1e-5 or name.endswith(("key.bias", "k_lin.bias", "attn.k.bias")), name
    assert_score(lm.score([TEXTS[1]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("option", "value"),
    [("is_decoder", True), ("add_cross_attention", True), ("position_embedding_type", "relative_key")],
)
def test_an_option_that_nobody_implemented_is_refused_by_name(
    family: str, tmp_path: Path, option: str, value: Any
) -> None:
    """Some of these transformers drops in silence today, but a checkpoint that was trained with them says so."""
    model = small(family)
    setattr(model.config, option, value)
    with pytest.raises(UnsupportedModelError, match=f"{family}.*{option}={value!r}"):
        mlmfast.load(model, tokenizer_of(family))
    if option == "position_embedding_type":  # the others transformers cannot build in every family
        with pytest.raises(UnsupportedModelError, match=f"{family}.*{option}"):
            mlmfast.load(save(tmp_path, model, tokenizer_of(family)))


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.activation])
def test_an_unknown_activation_is_refused_by_name(family: str, tmp_path: Path) -> None:
    option = FAMILIES[family].activation
    model = small(family, **{str(option): "quick_gelu"})
    with pytest.raises(UnsupportedModelError, match=f"{family}.*{option}='quick_gelu'"):
        mlmfast.load(save(tmp_path, model, tokenizer_of(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    """What transformers makes up in its place knows no word."""
    model = small(family)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer"):
        mlmfast.load(tmp_path)
    score = mlmfast.load(tmp_path, tokenizer_of(family)).score([TEXTS[1]])[0]
    assert_score(score, reference_loop(forward_of(model), tokenizer_of(family), TEXTS[1]))


def test_electras_discriminator_is_refused(tmp_path: Path) -> None:
    """It tells which tokens were replaced, and has no head that predicts any."""
    model = small("electra")
    save(tmp_path, ElectraForPreTraining(model.config), tokenizer_of("electra"))
    with pytest.raises(CheckpointError, match="generator_.*masked-LM head"):
        mlmfast.load(tmp_path)
    with pytest.raises(CheckpointError, match="ElectraForMaskedLM is needed"):
        mlmfast.load(ElectraForPreTraining(model.config), tokenizer_of("electra"))
