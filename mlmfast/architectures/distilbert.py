"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): BERT without token types, under other names.

Sinusoidal positions are written into the position table when the model is made, so they are read like learnt ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlmfast.architectures import activation
from mlmfast.architectures.bert import head, require_encoder
from mlmfast.architectures.spec import Derived, Embedding, EncoderSpec, Layer, Linear, Norm, table


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``DistilBertForMaskedLM``; both semantics are the same."""
    config = model.config
    require_encoder(config)
    embeddings = model.distilbert.embeddings
    act = activation(config.activation, "activation", config.model_type)
    return EncoderSpec(
        family=config.model_type,
        embedding=Embedding(
            words=table(embeddings.word_embeddings),
            norm=Norm.of(embeddings.LayerNorm),
            positions=table(embeddings.position_embeddings),
        ),
        layers=[_layer(layer) for layer in model.distilbert.transformer.layer],
        head=head(model.vocab_transform, act, model.vocab_layer_norm, model.vocab_projector),
        heads=config.n_heads,
        scale=(config.dim // config.n_heads) ** -0.5,
        activation=act,
        max_length=config.max_position_embeddings,
    )


def _layer(layer: Any) -> Layer:
    attention = layer.attention
    return Layer(
        query=Linear.of(attention.q_lin),
        key=Linear.of(attention.k_lin),
        value=Linear.of(attention.v_lin),
        output=Linear.of(attention.out_lin),
        attention_norm=Norm.of(layer.sa_layer_norm),
        up=Linear.of(layer.ffn.lin1),
        down=Linear.of(layer.ffn.lin2),
        feed_forward_norm=Norm.of(layer.output_layer_norm),
    )
