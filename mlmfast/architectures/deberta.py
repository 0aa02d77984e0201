"""DeBERTa, the first (He et al. 2020, arXiv 2006.03654): disentangled attention without buckets.

It differs from :mod:`~mlmfast.architectures.deberta_v2`, whose semantics it shares, inside the attention alone: one
product makes queries, keys and values, and every layer projects the distances by products of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.deberta.modeling_deberta import DebertaLayerNorm

from mlmfast.architectures import deberta_v2, require
from mlmfast.architectures.deberta_v2 import after_attention, encoder_spec, position_table, position_terms
from mlmfast.architectures.spec import Derived, EncoderSpec, Layer, Linear

EXTRAS = deberta_v2.EXTRAS
prepare_config = deberta_v2.prepare_config


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``DebertaForMaskedLM``, of arguments as in :mod:`~mlmfast.architectures.deberta_v2`."""
    config, encoder = model.config, model.deberta.encoder
    require(not getattr(config, "talking_head", False), config.model_type, "talking_head=True")
    terms = position_terms(config)
    layers = [_layer(encoder, i, derived, terms) for i in range(len(encoder.layer))]
    return encoder_spec(model, layers, 1 + len(terms), derived, extras, semantics, DebertaLayerNorm)


def _layer(encoder: Any, index: int, derived: Derived, terms: list[str]) -> Layer:
    layer = encoder.layer[index]
    attention = layer.attention.self
    pos_key = pos_query = None
    if encoder.relative_attention and "c2p" in terms:
        pos_key = position_table(encoder, attention, attention.pos_proj, ("c2p", index), derived)
    if encoder.relative_attention and "p2c" in terms:
        pos_query = position_table(encoder, attention, attention.pos_q_proj, ("p2c", index), derived)
    query, key, value = _projections(attention, index, derived)
    return Layer(
        query=Linear(query, attention.q_bias),
        key=Linear(key),
        value=Linear(value, attention.v_bias),
        pos_key=pos_key,
        pos_query=pos_query,
        **after_attention(layer, DebertaLayerNorm),
    )


def _projections(attention: Any, index: int, derived: Derived) -> Tensor:
    """``[3, H D, d]``: the weights of queries, keys and values, whose rows ``in_proj`` groups by head instead.

    The rows of one of them are no matrix within ``in_proj``, so all are copied: ``3 d d`` more numbers a layer (21
    million beside deberta-base's 139 million), and copied again after each step that trains them.
    """
    fused = Linear.of(attention.in_proj).weight

    def build() -> Tensor:
        grouped = fused.unflatten(0, (attention.num_attention_heads, 3, attention.attention_head_size))
        return grouped.transpose(0, 1).flatten(1, 2).contiguous()

    return derived.get(("queries, keys and values", index), [fused], build)
