"""ELECTRA's generator (Clark et al. 2020, arXiv 2003.10555): BERT's layers, embeddings and head of another width.

The discriminator detects replaced tokens and predicts none; its checkpoints lack this head and are refused on loading.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlmfast.architectures import activation
from mlmfast.architectures.bert import embedding, encoder_layers, head
from mlmfast.architectures.spec import Derived, EncoderSpec, Linear


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of an ``ElectraForMaskedLM``; both semantics are the same."""
    config = model.config
    project = getattr(model.electra, "embeddings_project", None)  # not there where the widths are equal
    predictions = model.generator_predictions
    return EncoderSpec(
        family=config.model_type,
        embedding=embedding(model.electra.embeddings, projection=None if project is None else Linear.of(project)),
        layers=encoder_layers(model.electra.encoder, config),
        # gelu, whatever config.hidden_act says
        head=head(predictions.dense, "gelu", predictions.LayerNorm, model.generator_lm_head),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=activation(config.hidden_act, "hidden_act", config.model_type),
        max_length=config.max_position_embeddings,
    )
