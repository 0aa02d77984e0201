"""ALBERT (Lan et al. 2020, arXiv 1909.11942): narrow embeddings, and layers that share their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlmfast.architectures import activation
from mlmfast.architectures.bert import embedding, head, require_encoder
from mlmfast.architectures.spec import Derived, EncoderSpec, Layer, Linear, Norm


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of an ``AlbertForMaskedLM``; both semantics are the same."""
    config = model.config
    require_encoder(config)
    encoder, predictions = model.albert.encoder, model.predictions
    act = activation(config.hidden_act, "hidden_act", config.model_type)
    return EncoderSpec(
        family=config.model_type,
        # the projection is there even where the widths are equal
        embedding=embedding(model.albert.embeddings, projection=Linear.of(encoder.embedding_hidden_mapping_in)),
        layers=_layers(encoder, config),
        head=head(predictions.dense, act, predictions.LayerNorm, predictions.decoder),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=act,
        max_length=config.max_position_embeddings,
    )


def _layers(encoder: Any, config: Any) -> list[Layer]:
    """The layers in the order of the pass: each of ``num_hidden_layers`` steps runs all layers of its group."""
    groups = [[_layer(layer) for layer in group.albert_layers] for group in encoder.albert_layer_groups]
    steps = config.num_hidden_layers
    # As transformers divides, in floating point: with some odd numbers a whole quotient comes out just below itself.
    return [layer for step in range(steps) for layer in groups[int(step / (steps / config.num_hidden_groups))]]


def _layer(layer: Any) -> Layer:
    attention = layer.attention
    return Layer(
        query=Linear.of(attention.query),
        key=Linear.of(attention.key),
        value=Linear.of(attention.value),
        output=Linear.of(attention.dense),
        attention_norm=Norm.of(attention.LayerNorm),
        up=Linear.of(layer.ffn),
        down=Linear.of(layer.ffn_output),
        feed_forward_norm=Norm.of(layer.full_layer_layer_norm),
    )
