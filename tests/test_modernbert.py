"""ModernBERT: local and global layers, rotary positions of two kinds, gates, and biases that a config may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TEXTS, bert_tokenizer, long_text, save
from families import FAMILIES
from transformers import AutoModelForMaskedLM, ModernBertForMaskedLM, PreTrainedTokenizerBase
from truth import ALL_METRICS, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bert_tokenizer()


def small(tokenizer: PreTrainedTokenizerBase, **options: Any) -> ModernBertForMaskedLM:
    return FAMILIES["modernbert"].small(len(tokenizer), **options)  # type: ignore[return-value]


def assert_equals_the_loop(tokenizer: PreTrainedTokenizerBase, model: ModernBertForMaskedLM, texts: list[str]) -> None:
    lm, forward = mlmfast.load(model, tokenizer), forward_of(model)
    for metric in ALL_METRICS:
        for text, score in zip(texts, lm.score(texts, metric=metric)):
            assert_score(score, reference_loop(forward, tokenizer, text, metric), what=f"{metric} of {text!r}")


@pytest.mark.parametrize("window", [1, 2, 7, 30, 128])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_local_layers(tokenizer: PreTrainedTokenizerBase, window: int, every: int) -> None:
    """A window counts both sides: a layer sees half of it to either."""
    model = small(tokenizer, num_hidden_layers=4, local_attention=window, global_attn_every_n_layers=every)
    assert_equals_the_loop(tokenizer, model, [TEXTS[1], long_text(tokenizer, 70)])


@pytest.mark.parametrize("scheme", ["absolute", "sans_pos"])
def test_configs_as_they_are_published(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, scheme: str) -> None:
    """Before transformers 5: a number for the pattern and two thetas; Ettin's say sans_pos, without absolute ones."""
    model = small(tokenizer, num_hidden_layers=4)
    file = save(tmp_path, model, tokenizer) / "config.json"
    config = json.loads(file.read_text())
    for name in ("layer_types", "rope_parameters"):
        del config[name]
    config |= {"global_attn_every_n_layers": 2, "global_rope_theta": 500.0, "local_rope_theta": 40.0}
    file.write_text(json.dumps(config | {"position_embedding_type": scheme, "reference_compile": True}))
    lm, forward = mlmfast.load(tmp_path), forward_of(AutoModelForMaskedLM.from_pretrained(tmp_path))
    assert [layer.local_window for layer in lm.spec().layers] == [-1, 4, -1, 4]
    text = long_text(tokenizer, 40)
    assert_score(lm.score([text])[0], reference_loop(forward, tokenizer, text))
    assert np.abs(mlmfast.load(model, tokenizer).score([text])[0].logprobs - lm.score([text])[0].logprobs).max() > 0.01


def test_frequencies_for_wider_heads_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnsupportedModelError, match="modernbert.*head_dim of 16 in heads that are 8 wide"):
        mlmfast.load(small(tokenizer, head_dim=16), tokenizer)


@pytest.mark.parametrize("kinds", ["ssss", "ffff", "sffs"])
def test_patterns_by_layer(tokenizer: PreTrainedTokenizerBase, kinds: str) -> None:
    names = {"s": "sliding_attention", "f": "full_attention"}
    model = small(tokenizer, num_hidden_layers=4, layer_types=[names[kind] for kind in kinds])
    windows = [layer.local_window for layer in mlmfast.load(model, tokenizer).spec().layers]
    assert windows == [4 if kind == "s" else -1 for kind in kinds]
    assert_equals_the_loop(tokenizer, model, [TEXTS[0], long_text(tokenizer, 40)])


@pytest.mark.parametrize(
    "option", ["attention_bias", "mlp_bias", "norm_bias", "classifier_bias", "decoder_bias", "all"]
)
def test_biases(tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """The published ones have none but the decoder's."""
    biases = ["attention_bias", "mlp_bias", "norm_bias", "classifier_bias", "decoder_bias"]
    options = {name: option in (name, "all") for name in biases}
    assert_equals_the_loop(tokenizer, small(tokenizer, **options), TEXTS[:2])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_schemes(tokenizer: PreTrainedTokenizerBase, rope: dict[str, Any]) -> None:
    """Of local and global layers each their own; YaRN scales what it turns."""
    default = {"rope_type": "default", "rope_theta": 160000.0}
    for kinds in (("full_attention", "sliding_attention"), ("sliding_attention", "full_attention")):
        model = small(tokenizer, num_hidden_layers=3, rope_parameters={kinds[0]: dict(rope), kinds[1]: dict(default)})
        assert_equals_the_loop(tokenizer, model, [TEXTS[0], long_text(tokenizer, 40)])


def test_frequencies_that_follow_the_text_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = small(tokenizer, rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)})
    with pytest.raises(UnsupportedModelError, match="modernbert.*rope_type='dynamic'"):
        mlmfast.load(model, tokenizer)


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu"])
def test_another_gate_is_refused(tokenizer: PreTrainedTokenizerBase, act: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"modernbert.*hidden_activation='{act}'"):
        mlmfast.load(small(tokenizer, hidden_activation=act), tokenizer)
