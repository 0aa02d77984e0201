"""BERT (Devlin et al. 2019, arXiv 1810.04805): absolute positions, post-norm, ``cls.predictions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mlmfast.architectures import activation, require
from mlmfast.architectures.spec import Derived, Embedding, EncoderSpec, Head, Layer, Linear, Norm, table


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``BertForMaskedLM``; both semantics are the same."""
    config = model.config
    predictions = model.cls.predictions
    transform = predictions.transform
    act = activation(config.hidden_act, "hidden_act", config.model_type)
    return EncoderSpec(
        family=config.model_type,
        embedding=embedding(model.base_model.embeddings),
        layers=encoder_layers(model.base_model.encoder, config),
        head=head(transform.dense, act, transform.LayerNorm, predictions.decoder),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=act,
        max_length=config.max_position_embeddings,
    )


def embedding(
    module: Any, first_position: int = 0, padding_id: int | None = None, projection: Linear | None = None
) -> Embedding:
    """Embeddings laid out as BERT's, which most families share; a projection follows their norm."""
    return Embedding(
        words=table(module.word_embeddings),
        norm=Norm.of(module.LayerNorm),
        positions=table(module.position_embeddings),
        types=table(module.token_type_embeddings),
        projection=projection,
        norm_first=projection is not None,
        first_position=first_position,
        padding_id=padding_id,
    )


def head(dense: Any, act: str, norm: Any, decoder: Any) -> Head:
    """A prediction head of BERT's four parts, under whatever names a family gives them."""
    vocabulary = Linear.of(decoder)
    return Head(
        dense=Linear.of(dense), activation=act, norm=Norm.of(norm), vocabulary=vocabulary.weight, bias=vocabulary.bias
    )


def require_encoder(config: Any, positions: Sequence[str] = ("absolute",)) -> None:
    """Refuses what a config can ask for beyond an encoder with positions of a known kind.

    Raises:
        UnsupportedModelError: the config asks for a decoder, cross-attention or positions of another kind.
    """
    name = config.model_type
    require(not getattr(config, "is_decoder", False), name, "is_decoder=True")
    require(not getattr(config, "add_cross_attention", False), name, "add_cross_attention=True")
    scheme = getattr(config, "position_embedding_type", "absolute")
    require(scheme in (None, *positions), name, f"position_embedding_type={scheme!r}")


def encoder_layers(encoder: Any, config: Any) -> list[Layer]:
    """Layers laid out as BERT's, which most families share.

    Raises:
        UnsupportedModelError: see :func:`require_encoder`.
    """
    require_encoder(config)
    return [
        Layer(
            query=Linear.of(layer.attention.self.query),
            key=Linear.of(layer.attention.self.key),
            value=Linear.of(layer.attention.self.value),
            output=Linear.of(layer.attention.output.dense),
            attention_norm=Norm.of(layer.attention.output.LayerNorm),
            up=Linear.of(layer.intermediate.dense),
            down=Linear.of(layer.output.dense),
            feed_forward_norm=Norm.of(layer.output.LayerNorm),
        )
        for layer in encoder.layer
    ]
