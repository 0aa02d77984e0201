"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) and XLM-R: BERT's layers, positions counted from ``pad + 1``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlmfast.architectures import activation
from mlmfast.architectures.bert import embedding, encoder_layers
from mlmfast.architectures.spec import Derived, EncoderSpec, Head, Linear, Norm


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``RobertaForMaskedLM`` or ``XLMRobertaForMaskedLM``; both semantics are the same."""
    config = model.config
    decoder = Linear.of(model.lm_head.decoder)
    padding = model.roberta.embeddings.padding_idx
    return EncoderSpec(
        family=config.model_type,
        embedding=embedding(model.roberta.embeddings, first_position=padding + 1, padding_id=padding),
        layers=encoder_layers(model.roberta.encoder, config),
        head=Head(
            dense=Linear.of(model.lm_head.dense),
            activation="gelu",  # whatever config.hidden_act says
            norm=Norm.of(model.lm_head.layer_norm),
            vocabulary=decoder.weight,
            bias=decoder.bias,
        ),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=activation(config.hidden_act, "hidden_act", config.model_type),
        max_length=config.max_position_embeddings - padding - 1,
    )
