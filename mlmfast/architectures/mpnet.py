"""MPNet (Song et al. 2020, arXiv 2004.09297): BERT's layers, positions from ``pad + 1``, and T5's bias by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlmfast.architectures import activation, require
from mlmfast.architectures.bert import head, require_encoder
from mlmfast.architectures.spec import Derived, Embedding, EncoderSpec, Layer, Linear, Norm, table

# From here on all distances fall into the last bucket.
FARTHEST = 128
# transformers reads as many, whatever the config says.
BUCKETS = 32


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of an ``MPNetForMaskedLM``; both semantics are the same."""
    config, embeddings, encoder = model.config, model.mpnet.embeddings, model.mpnet.encoder
    require_encoder(config)
    buckets = config.relative_attention_num_buckets
    require(buckets >= BUCKETS, config.model_type, f"relative_attention_num_buckets={buckets}, less than {BUCKETS},")
    padding = embeddings.padding_idx
    return EncoderSpec(
        family=config.model_type,
        embedding=Embedding(
            words=table(embeddings.word_embeddings),
            norm=Norm.of(embeddings.LayerNorm),
            positions=table(embeddings.position_embeddings),
            first_position=padding + 1,
            padding_id=padding,
        ),
        layers=[_layer(layer) for layer in encoder.layer],
        # gelu, whatever config.hidden_act says
        head=head(model.lm_head.dense, "gelu", model.lm_head.layer_norm, model.lm_head.decoder),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation=activation(config.hidden_act, "hidden_act", config.model_type),
        distance_bias=_distance_bias(encoder, derived),
        max_length=config.max_position_embeddings - padding - 1,
    )


def _distance_bias(encoder: Any, derived: Derived) -> Tensor:
    """``[H, 2 N + 1]``: what each head adds at each distance from key to query."""
    of_bucket = table(encoder.relative_attention_bias)  # [buckets, H]

    def build() -> Tensor:
        distances = torch.arange(-FARTHEST, FARTHEST + 1, device=of_bucket.device)
        buckets = encoder.relative_position_bucket(-distances, num_buckets=BUCKETS)
        wide = torch.float64 if of_bucket.dtype == torch.float64 else torch.float32
        return of_bucket[buckets].T.to(wide).contiguous()

    return derived.get("distance_bias", [of_bucket], build)


def _layer(layer: Any) -> Layer:
    attention = layer.attention.attn
    return Layer(
        query=Linear.of(attention.q),
        key=Linear.of(attention.k),
        value=Linear.of(attention.v),
        output=Linear.of(attention.o),
        attention_norm=Norm.of(layer.attention.LayerNorm),
        up=Linear.of(layer.intermediate.dense),
        down=Linear.of(layer.output.dense),
        feed_forward_norm=Norm.of(layer.output.LayerNorm),
    )
