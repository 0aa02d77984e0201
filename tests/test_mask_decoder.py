"""The original DeBERTa checkpoints: the enhanced mask decoder, and a head that their configuration does not tell of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SMALL_DEBERTAS, TEXTS, add_position_table, far_cases, long_text, save
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import Forward, assert_equals_the_loop, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import CheckpointError


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * norm.weight + norm.bias


@dataclass(frozen=True)
class Products:
    """What one attention makes of hidden states, ``[L, d] -> [L, H * D]``."""

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    position_key: Callable[[Tensor], Tensor]
    position_query: Callable[[Tensor], Tensor]


def products_of(attention: nn.Module) -> Products:
    """Of a DeBERTa-v2's attention, or of the first DeBERTa's, whose one product is grouped by head."""
    if hasattr(attention, "in_proj"):
        heads, width = attention.num_attention_heads, attention.attention_head_size

        def part(which: int, bias: Tensor | int) -> Callable[[Tensor], Tensor]:
            def rows(x: Tensor) -> Tensor:
                by_head = linear(attention.in_proj, x).view(len(x), heads, 3 * width)
                return by_head[:, :, which * width : (which + 1) * width].reshape(len(x), -1) + bias

            return rows

        return Products(
            part(0, attention.q_bias),
            part(1, 0),
            part(2, attention.v_bias),
            lambda x: linear(attention.pos_proj, x),
            lambda x: linear(attention.pos_q_proj, x),
        )
    share = attention.share_att_key
    return Products(
        lambda x: linear(attention.query_proj, x),
        lambda x: linear(attention.key_proj, x),
        lambda x: linear(attention.value_proj, x),
        lambda x: linear(attention.key_proj if share else attention.pos_key_proj, x),
        lambda x: linear(attention.query_proj if share else attention.pos_query_proj, x),
    )


def clamped_bucket(distance: int, buckets: int, longest: int) -> int:
    """The bucket of a distance clamped to ``longest - 1``: itself up to the middle, then logarithmic."""
    distance = max(-(longest - 1), min(longest - 1, distance))
    middle = buckets // 2
    if buckets <= 0 or abs(distance) <= middle:
        return distance
    far = np.ceil(np.float32(np.log(abs(distance) / middle) / np.log((longest - 1) / middle) * (middle - 1)) - 1e-6)
    return int(np.sign(distance)) * (int(far) + middle)


def enhanced_decoder(model: PreTrainedModel, position_table: Tensor) -> Forward:
    """The original mask decoder, written out: the last layer twice over the second-last hidden states.

    Queries start from those states plus the absolute positions, keys and values stay the states themselves. The model's
    own code computes nothing here but the layers before the last and the head. Needs distances clamped in those layers.
    """
    model = model.double()
    layer, encoder, config = model.deberta.encoder.layer[-1], model.deberta.encoder, model.config
    attention = layer.attention.self
    products, buckets = products_of(attention), getattr(config, "position_buckets", -1)
    span = len(encoder.rel_embeddings.weight) // 2
    heads, width = attention.num_attention_heads, attention.attention_head_size

    def per_head(x: Tensor) -> Tensor:  # [L, H * D] -> [H, L, D]
        return x.view(len(x), heads, width).transpose(0, 1)

    def decoder_step(keys_of: Tensor, queries_of: Tensor) -> Tensor:
        relative = encoder.rel_embeddings.weight
        if "layer_norm" in getattr(config, "norm_rel_ebd", "none"):
            relative = layer_norm(encoder.LayerNorm, relative)
        queries, keys = per_head(products.query(queries_of)), per_head(products.key(keys_of))
        length = len(keys_of)
        bucket = torch.tensor(
            [[clamped_bucket(i - j, buckets, attention.max_relative_positions) for j in range(length)]
             for i in range(length)]
        )  # fmt: skip
        terms, count = queries @ keys.transpose(1, 2), 1
        if "c2p" in config.pos_att_type:
            table = per_head(products.position_key(relative))
            terms = terms + torch.einsum("hid,hijd->hij", queries, table[:, bucket + span])
            count += 1
        if "p2c" in config.pos_att_type:
            table = per_head(products.position_query(relative))
            terms = terms + torch.einsum("hjd,hijd->hij", keys, table[:, bucket + span])
            count += 1
        weights = torch.softmax(terms / (width * count) ** 0.5, dim=-1)
        mixed = weights @ per_head(products.value(keys_of))
        mixed = mixed.transpose(0, 1).reshape(length, heads * width)
        output = layer.attention.output
        attended = layer_norm(output.LayerNorm, linear(output.dense, mixed) + queries_of)
        inner = nn.functional.gelu(linear(layer.intermediate.dense, attended))
        return layer_norm(layer.output.LayerNorm, linear(layer.output.dense, inner) + attended)

    @torch.no_grad()
    def forward(ids: list[int]) -> Tensor:
        states = model.deberta(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]  # [L, d]
        positions = torch.arange(len(ids)).clamp(max=len(position_table) - 1)
        hidden = position_table.double()[positions] + states
        for _ in range(2):
            hidden = decoder_step(states, hidden)
        if config.legacy:
            return model.cls(hidden)
        return model.lm_predictions(hidden, model.deberta.embeddings.word_embeddings)

    return forward


DECODERS: dict[str, dict[str, Any]] = {
    "v3": {},
    "own projections, new head": {"share_att_key": False, "legacy": False},
    "c2p, no buckets": {"pos_att_type": ["c2p"], "position_buckets": -1},
    "p2c, norm none": {"pos_att_type": ["p2c"], "norm_rel_ebd": "none"},
    "conv": {"conv_kernel_size": 3, "conv_act": "gelu", "num_hidden_layers": 3},
    "conv and two layers": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "one layer": {"num_hidden_layers": 1},
    "one layer, conv": {"num_hidden_layers": 1, "conv_kernel_size": 3},
}
DECODERS_V1: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1, new head, three layers": {"legacy": False, "num_hidden_layers": 3},
    "v1, c2p": {"pos_att_type": ["c2p"]},
    "v1, p2c, one layer": {"pos_att_type": ["p2c"], "num_hidden_layers": 1},
}


@pytest.fixture(params=list(SMALL_DEBERTAS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(family: str, deberta_tokenizers: dict[str, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return deberta_tokenizers[family]


@pytest.mark.parametrize(
    ("family", "name"), [("deberta-v2", name) for name in DECODERS] + [("deberta", name) for name in DECODERS_V1]
)
def test_trained_uses_the_enhanced_mask_decoder(
    family: str, name: str, deberta_tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path, clamped: None
) -> None:
    tokenizer, options = deberta_tokenizers[family], (DECODERS | DECODERS_V1)[name]
    model = SMALL_DEBERTAS[family](len(tokenizer), max_position_embeddings=50, **options)
    folder = save(tmp_path, model, tokenizer)
    table = add_position_table(folder, 50, 32)  # texts of 67 tokens read its last row again
    lm = mlmfast.load(folder)
    forward = enhanced_decoder(model, table)
    assert_equals_the_loop(lm, forward, tokenizer, far_cases(tokenizer, lm.config), ["original", "window"])
    short = TEXTS[1]
    assert_score(lm.score([short], metric="unmasked")[0], reference_loop(forward, tokenizer, short, "unmasked"))


def test_predictions_may_be_read_one_to_the_left(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, clamped: None
) -> None:
    """Masked-next-token prediction: the decoder's queries start from the place where they are read."""
    model = SMALL_DEBERTAS[family](len(tokenizer))
    folder = save(tmp_path, model, tokenizer)
    forward = enhanced_decoder(model, add_position_table(folder, 96, 32))
    lm = mlmfast.load(folder, objective="mntp")
    for metric in ("window", "strided"):
        truth = reference_loop(forward, tokenizer, TEXTS[1], metric, shift=1)
        assert_score(lm.score([TEXTS[1]], metric=metric)[0], truth)


def test_the_decoder_changes_the_scores_and_upstream_ignores_it(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = SMALL_DEBERTAS[family](len(tokenizer))
    folder = save(tmp_path, model, tokenizer)
    before = mlmfast.load(folder).score([TEXTS[1]])[0]
    add_position_table(folder, 96, 32)
    upstream, trained = mlmfast.load(folder, semantics="upstream"), mlmfast.load(folder, semantics="trained")
    assert_score(upstream.score([TEXTS[1]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[1]))
    assert np.abs(trained.score([TEXTS[1]])[0].logprobs - before.logprobs).max() > 1e-2


def test_absolute_positions_in_the_input_are_no_decoder(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """With ``position_biased_input`` the same weight name is the input's table, and there is no second decoder step."""
    model = SMALL_DEBERTAS[family](len(tokenizer), position_biased_input=True)
    lm = mlmfast.load(save(tmp_path, model, tokenizer), semantics="trained")
    text = long_text(tokenizer, 12)
    assert_score(lm.score([text])[0], reference_loop(forward_of(model), tokenizer, text))


def new_head_under_a_legacy_configuration(folder: Path, model: PreTrainedModel, tokenizer: Any) -> Path:
    """As microsoft/deberta-* are: ``lm_predictions`` in the weights, and transformers' default ``legacy=True``."""
    save(folder, model, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config.pop("legacy")
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["mask_predictions.dense.weight"] = torch.ones(32, 32)  # v3 checkpoints carry the discriminator's head too
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_trained_reads_the_head_that_the_checkpoint_holds(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, clamped: None
) -> None:
    model = SMALL_DEBERTAS[family](len(tokenizer), legacy=False)
    lm = mlmfast.load(new_head_under_a_legacy_configuration(tmp_path, model, tokenizer))
    for text in TEXTS[1:3]:
        assert_score(lm.score([text])[0], reference_loop(forward_of(model), tokenizer, text))


def test_upstream_refuses_a_head_that_transformers_would_draw_afresh(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = SMALL_DEBERTAS[family](len(tokenizer), legacy=False)
    folder = new_head_under_a_legacy_configuration(tmp_path, model, tokenizer)
    with pytest.raises(CheckpointError, match="head|lm_predictions|cls.predictions"):
        mlmfast.load(folder, semantics="upstream")


def test_a_bin_of_the_original_release_loads(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, clamped: None
) -> None:
    """Pickled weights, the new head under a legacy configuration and the decoder's table, as Microsoft's are."""
    options = {} if family == "deberta" else {"conv_kernel_size": 3, "conv_act": "gelu"}
    model = SMALL_DEBERTAS[family](len(tokenizer), legacy=False, **options)
    folder = new_head_under_a_legacy_configuration(tmp_path, model, tokenizer)
    table = add_position_table(folder, 96, 32)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    forward = enhanced_decoder(model, table)
    lm = mlmfast.load(folder)
    assert_score(lm.score([TEXTS[1]], metric="window")[0], reference_loop(forward, tokenizer, TEXTS[1], "window"))
