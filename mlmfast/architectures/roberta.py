"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) and what has its modules: BERT's layers, positions from ``pad + 1``.

XLM-R, CamemBERT and data2vec-text are RoBERTa under other names, trained differently.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlmfast.architectures import activation
from mlmfast.architectures.bert import embedding, encoder_layers, head
from mlmfast.architectures.spec import Derived, EncoderSpec


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``RobertaForMaskedLM`` or of one of its namesakes; both semantics are the same."""
    config = model.config
    embeddings, predictions = model.base_model.embeddings, model.lm_head
    padding = embeddings.padding_idx
    return EncoderSpec(
        family=config.model_type,
        embedding=embedding(embeddings, first_position=padding + 1, padding_id=padding),
        layers=encoder_layers(model.base_model.encoder, config),
        # gelu, whatever config.hidden_act says
        head=head(predictions.dense, "gelu", predictions.layer_norm, predictions.decoder),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=activation(config.hidden_act, "hidden_act", config.model_type),
        max_length=config.max_position_embeddings - padding - 1,
    )
