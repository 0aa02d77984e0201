"""RemBERT (Chung et al. 2021, arXiv 2010.12821): BERT's layers between narrow input and wide output embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlmfast.architectures import activation
from mlmfast.architectures.bert import embedding, encoder_layers, head
from mlmfast.architectures.spec import Derived, EncoderSpec, Linear


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``RemBertForMaskedLM``; both semantics are the same."""
    config = model.config
    encoder, predictions = model.rembert.encoder, model.cls.predictions
    act = activation(config.hidden_act, "hidden_act", config.model_type)
    return EncoderSpec(
        family=config.model_type,
        embedding=embedding(model.rembert.embeddings, projection=Linear.of(encoder.embedding_hidden_mapping_in)),
        layers=encoder_layers(encoder, config),
        head=head(predictions.dense, act, predictions.LayerNorm, predictions.decoder),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=act,
        max_length=config.max_position_embeddings,
    )
