"""ESM-2 (Lin et al. 2023, 10.1126/science.ade2574) and ESM-1b: proteins; pre-norm, rotary or absolute positions.

Token dropout: masks have no embedding at all, and the others of a copy are scaled up by what that takes from the
average, so a row's embedding depends on how many masks its copy has.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from mlmfast.architectures.bert import require_encoder
from mlmfast.architectures.spec import (
    Derived,
    Embedding,
    EncoderSpec,
    Head,
    Layer,
    Linear,
    Norm,
    Rotary,
    TokenDropout,
    table,
)

# Training masked 80 % of the 15 % of a text that it chose; transformers has it as a constant, too.
KEPT = 1 - 0.15 * 0.8


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of an ``EsmForMaskedLM``; both semantics are the same."""
    config, head = model.config, model.lm_head
    require_encoder(config, positions=("absolute", "rotary"))
    embedding = _embedding(model.esm.embeddings, derived)
    return EncoderSpec(
        family=config.model_type,
        embedding=embedding,
        layers=[_layer(model.esm, layer) for layer in model.esm.encoder.layer],
        head=Head(
            dense=Linear.of(head.dense),
            activation="gelu",
            norm=Norm.of(head.layer_norm),
            vocabulary=Linear.of(head.decoder).weight,
            bias=head.bias,
        ),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation="gelu",  # whatever config.hidden_act says
        pre_norm=True,
        final_norm=Norm.of(model.esm.encoder.emb_layer_norm_after),
        max_length=None if embedding.positions is None else len(embedding.positions) - embedding.first_position,
    )


def _embedding(module: Any, derived: Derived) -> Embedding:
    words, padding = table(module.word_embeddings), module.padding_idx
    absolute = module.position_embedding_type == "absolute"
    dropout = TokenDropout(module.mask_token_id, KEPT) if module.token_dropout else None
    if dropout is not None:
        words = derived.get("words", [words], partial(_without, words, dropout.token))
    return Embedding(
        words=words,
        norm=None if module.layer_norm is None else Norm.of(module.layer_norm),
        positions=table(module.position_embeddings) if absolute else None,
        first_position=padding + 1,
        padding_id=padding,
        token_dropout=dropout,
    )


def _without(words: Tensor, token: int) -> Tensor:
    rows = words.clone()
    rows[token] = 0
    return rows


def _layer(encoder: Any, layer: Any) -> Layer:
    attention = layer.attention.self
    # Before transformers 5.10 each layer had its own, equal to all others.
    turning = getattr(encoder, "rotary_embeddings", None) or getattr(attention, "rotary_embeddings", None)
    return Layer(
        query=Linear.of(attention.query),
        key=Linear.of(attention.key),
        value=Linear.of(attention.value),
        output=Linear.of(layer.attention.output.dense),
        attention_norm=Norm.of(layer.attention.LayerNorm),
        up=Linear.of(layer.intermediate.dense),
        down=Linear.of(layer.output.dense),
        feed_forward_norm=Norm.of(layer.LayerNorm),
        rotary=None if turning is None else Rotary(turning.inv_freq),
    )
