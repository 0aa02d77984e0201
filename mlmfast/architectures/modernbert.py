"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): pre-norm, rotary positions, GeGLU, most layers local."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlmfast.architectures import activation, require
from mlmfast.architectures.bert import head, require_encoder
from mlmfast.architectures.spec import Derived, Embedding, EncoderSpec, Layer, Linear, Norm, Rotary, table

# Rotary schemes whose frequencies depend on the length of the text.
CHANGING = ("dynamic", "longrope")


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``ModernBertForMaskedLM``; both semantics are the same."""
    config, encoder = model.config, model.model
    name = config.model_type
    # Some published configs say sans_pos: there are no absolute positions.
    require_encoder(config, positions=("absolute", "sans_pos"))
    gate = activation(config.hidden_activation, "hidden_activation", name)
    require(gate == "gelu", name, f"hidden_activation={config.hidden_activation!r}, a gate of another kind than GELU,")
    act = activation(config.classifier_activation, "classifier_activation", name)
    return EncoderSpec(
        family=name,
        embedding=Embedding(words=table(encoder.embeddings.tok_embeddings), norm=Norm.of(encoder.embeddings.norm)),
        layers=[_layer(layer, encoder.rotary_emb, config) for layer in encoder.layers],
        head=head(model.head.dense, act, model.head.norm, model.decoder),
        heads=config.num_attention_heads,
        scale=(config.hidden_size // config.num_attention_heads) ** -0.5,
        activation="geglu",
        pre_norm=True,
        final_norm=Norm.of(encoder.final_norm),
    )


def _layer(layer: Any, turning: Any, config: Any) -> Layer:
    kind = layer.attention_type
    require(kind in ("full_attention", "sliding_attention"), config.model_type, f"layer_types with {kind!r}")
    scheme = turning.rope_type.get(kind)
    require(scheme is not None and scheme not in CHANGING, config.model_type, f"rope_type={scheme!r}")
    frequencies = getattr(turning, f"{kind}_inv_freq")
    turned, width = 2 * len(frequencies), config.hidden_size // config.num_attention_heads
    require(turned <= width, config.model_type, f"a head_dim of {turned} in heads that are {width} wide")
    query, key, value = Linear.parts(layer.attn.Wqkv, 3)
    return Layer(
        query=query,
        key=key,
        value=value,
        output=Linear.of(layer.attn.Wo),
        # The first layer reads the embeddings as they are normed already.
        attention_norm=Norm.of(layer.attn_norm) if layer.layer_idx else None,
        up=Linear.of(layer.mlp.Wi),
        down=Linear.of(layer.mlp.Wo),
        feed_forward_norm=Norm.of(layer.mlp_norm),
        rotary=Rotary(frequencies, getattr(turning, f"{kind}_attention_scaling")),
        local_window=config.sliding_window if kind == "sliding_attention" else -1,
    )
