"""DeBERTa-v2 and v3 (He et al. 2021, arXiv 2006.03654): disentangled attention over relative distances.

A score is ``(q.k + q.PosKey[row] + k.PosQuery[row]) * scale`` with ``row`` looked up by the distance from query to
key. Two semantics:

- ``"upstream"`` is what transformers computes: distances are not clamped, so beyond ``max_relative_positions`` the
  first row of the table is read, which training never reached.
- ``"trained"`` is the model as it was trained: distances clamp to ``max_relative_positions - 1`` before bucketing, and
  where the checkpoint carries absolute positions that the embeddings do not use, they drive the enhanced mask decoder.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from mlmfast.architectures import activation, require
from mlmfast.architectures.bert import require_encoder
from mlmfast.architectures.spec import Convolution, Derived, Embedding, EncoderSpec, Head, Layer, Linear, Norm, table

# Absolute positions that only the enhanced mask decoder reads; transformers drops them when it loads.
MASK_DECODER = "deberta.embeddings.position_embeddings.weight"
EXTRAS = (MASK_DECODER,)
# config.legacy -> where the prediction head is stored
HEADS = {True: "cls.predictions.", False: "lm_predictions."}


def prepare_config(config: Any, keys: set[str], semantics: str) -> None:
    """Points the config at the prediction head that the checkpoint really holds.

    Microsoft's checkpoints store ``lm_predictions`` under a config that says ``legacy``, for which transformers builds
    a fresh ``cls.predictions``. Upstream semantics keep that, and loading then refuses the untrained head.
    """
    stores = {legacy: any(key.startswith(prefix) for key in keys) for legacy, prefix in HEADS.items()}
    if semantics == "trained" and sum(stores.values()) == 1:
        config.legacy = stores[True]
    if not config.legacy:
        # This head is handed the embeddings, so there is nothing to tie; some releases of transformers (5.4) still try,
        # and stumble over a weight that is not there.
        config.tie_word_embeddings = False
    if any(key.startswith("mask_predictions.") for key in keys):
        warnings.warn(
            "the checkpoint holds a replaced-token-detection head (mask_predictions), as DeBERTa-v3's do: if it was "
            "trained to detect tokens rather than to predict them, its pseudo-log-likelihoods are noise",
            stacklevel=2,
        )


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of a ``DebertaV2ForMaskedLM``.

    Args:
        model: the Hugging Face model.
        derived: keeps the projected position tables.
        extras: tensors of :data:`EXTRAS` found in the checkpoint.
        semantics: ``"trained"`` or ``"upstream"``.
    """
    terms = position_terms(model.config)
    layers = [_layer(model.deberta.encoder, i, derived, terms) for i in range(len(model.deberta.encoder.layer))]
    # A term counts towards the scale even where relative_attention is off and it is never computed.
    return encoder_spec(model, layers, 1 + len(set(terms)), derived, extras, semantics)


def position_terms(config: Any) -> list[str]:
    """``config.pos_att_type``: which of ``c2p`` and ``p2c`` an attention score is made of beside its content.

    Raises:
        UnsupportedModelError: it names another.
    """
    terms = config.pos_att_type or []
    unknown = sorted(set(terms) - {"c2p", "p2c"})
    require(not unknown, config.model_type, f"pos_att_type with {', '.join(unknown)}")
    return terms


def encoder_spec(
    model: Any,
    layers: list[Layer],
    factor: int,
    derived: Derived,
    extras: dict[str, Tensor],
    semantics: str,
    norm: type[nn.Module] = nn.LayerNorm,
) -> EncoderSpec:
    """What both generations of DeBERTa share, around layers that are ready.

    Args:
        factor: the terms of an attention score, which its scale is over.
        norm: the class of every LayerNorm but the head's.
    """
    config, encoder = model.config, model.deberta.encoder
    name = config.model_type
    require_encoder(config)
    mask_decoder = None
    if semantics == "trained" and not config.position_biased_input:
        mask_decoder = extras.get(MASK_DECODER)
    if mask_decoder is not None:
        require(
            mask_decoder.shape[1] == config.hidden_size,
            name,
            f"an enhanced mask decoder of width {mask_decoder.shape[1]} over hidden_size {config.hidden_size} "
            "(semantics='upstream' goes without it)",
        )
    relative = encoder.relative_attention and config.pos_att_type
    return EncoderSpec(
        family=name,
        embedding=_embedding(model.deberta.embeddings, norm),
        layers=layers,
        head=_head(model),
        heads=config.num_attention_heads,
        scale=1 / math.sqrt(encoder.layer[0].attention.self.attention_head_size * factor),
        activation=activation(config.hidden_act, "hidden_act", name),
        buckets=_buckets(encoder, name, derived, semantics) if relative else None,
        mask_decoder=mask_decoder,
        max_length=config.max_position_embeddings if config.position_biased_input else None,
    )


def _embedding(module: Any, norm: type[nn.Module]) -> Embedding:
    positions, types = module.position_embeddings, module.token_type_embeddings
    return Embedding(
        words=table(module.word_embeddings),
        norm=Norm.of(module.LayerNorm, norm),
        positions=None if positions is None else table(positions),
        types=None if types is None else table(types),
        projection=None if module.embed_proj is None else Linear.of(module.embed_proj),
    )


def _layer(encoder: Any, index: int, derived: Derived, terms: list[str]) -> Layer:
    layer = encoder.layer[index]
    attention = layer.attention.self
    pos_key = pos_query = None
    if encoder.relative_attention:
        shared = attention.share_att_key
        norm = Norm.of(encoder.LayerNorm) if "layer_norm" in encoder.norm_rel_ebd else None
        if "c2p" in terms:
            projection = attention.key_proj if shared else attention.pos_key_proj
            pos_key = position_table(encoder, attention, projection, ("c2p", index), derived, norm)
        if "p2c" in terms:
            projection = attention.query_proj if shared else attention.pos_query_proj
            pos_query = position_table(encoder, attention, projection, ("p2c", index), derived, norm)
    return Layer(
        query=Linear.of(attention.query_proj),
        key=Linear.of(attention.key_proj),
        value=Linear.of(attention.value_proj),
        pos_key=pos_key,
        pos_query=pos_query,
        convolution=_convolution(encoder.conv, derived) if index == 0 and encoder.conv is not None else None,
        **after_attention(layer),
    )


def after_attention(layer: Any, norm: type[nn.Module] = nn.LayerNorm) -> dict[str, Any]:
    """The arguments of :class:`Layer` that follow the attention, named alike in both generations."""
    return {
        "output": Linear.of(layer.attention.output.dense),
        "attention_norm": Norm.of(layer.attention.output.LayerNorm, norm),
        "up": Linear.of(layer.intermediate.dense),
        "down": Linear.of(layer.output.dense),
        "feed_forward_norm": Norm.of(layer.output.LayerNorm, norm),
    }


def position_table(
    encoder: Any,
    attention: Any,
    projection: Any,
    name: tuple[str, int],
    derived: Derived,
    norm: Norm | None = None,
) -> Tensor:
    """``[2 span, H, D]``: the position embeddings, normalised where there is a norm, through one layer's projection."""
    distances, product = table(encoder.rel_embeddings), Linear.of(projection)

    def build() -> Tensor:
        rows = distances
        if norm is not None:
            rows = F.layer_norm(rows, rows.shape[1:], norm.weight, norm.bias, norm.eps)
        rows = F.linear(rows, product.weight, product.bias)
        return rows.view(len(rows), attention.num_attention_heads, attention.attention_head_size)

    sources = [distances, product.weight, product.bias]
    if norm is not None:
        sources += [norm.weight, norm.bias]
    return derived.get(name, sources, build)


def _buckets(encoder: Any, model: str, derived: Derived, semantics: str) -> Tensor:
    """int32 ``[2 N + 1]``: the table row of each distance, saturated at both ends."""
    buckets, span = getattr(encoder, "position_buckets", -1), encoder.max_relative_positions  # v1 has no buckets
    device = encoder.rel_embeddings.weight.device
    # The logarithm's formula stands still with fewer than four buckets; with half of them at or past the longest
    # distance it divides by zero or turns round.
    sensible = buckets <= 0 or 2 <= buckets // 2 < span - 1
    require(sensible, model, f"position_buckets={buckets} for {span} positions")
    half = buckets if buckets > 0 else span

    def rows(longest: int) -> Tensor:
        distances = torch.arange(-longest, longest + 1)
        found = make_log_bucket_position(distances, buckets, span) if buckets > 0 else distances
        return (found.long() + half).clamp(0, 2 * half - 1)

    def build() -> Tensor:
        longest = span - 1 if semantics == "trained" else span
        while semantics == "upstream" and not (rows(longest)[0] == 0 and rows(longest)[-1] == 2 * half - 1):
            longest *= 2  # only with an odd number of buckets
        return rows(longest).to(torch.int32).to(device)

    return derived.get(("buckets", semantics, device), [], build)


def _convolution(module: Any, derived: Derived) -> Convolution:
    conv = module.conv
    width, groups = conv.kernel_size[0], conv.groups
    require(width % 2 == 1, "deberta-v2", f"conv_kernel_size={width} (an even one)")

    def build() -> Tensor:
        out, inner, _ = conv.weight.shape  # [d, d / groups, width]
        dense = conv.weight.new_zeros(out, width, inner * groups)
        for g in range(groups):  # each group of outputs reads its own group of inputs
            rows = slice(g * out // groups, (g + 1) * out // groups)
            dense[rows, :, g * inner : (g + 1) * inner] = conv.weight[rows].transpose(1, 2)
        return dense.view(out, -1)

    weight = derived.get("convolution", [conv.weight], build)
    return Convolution(
        linear=Linear(weight, conv.bias),
        width=width,
        activation=activation(module.conv_act, "conv_act", "deberta-v2"),
        norm=Norm.of(module.LayerNorm),
    )


def _head(model: Any) -> Head:
    config = model.config
    if model.legacy:
        predictions = model.cls.predictions
        dense, norm = predictions.transform.dense, predictions.transform.LayerNorm
        decoder = Linear.of(predictions.decoder)
        vocabulary, bias = decoder.weight, decoder.bias
    else:
        predictions = model.lm_predictions.lm_head
        dense, norm = predictions.dense, predictions.LayerNorm
        vocabulary, bias = table(model.deberta.embeddings.word_embeddings), predictions.bias
        require(
            vocabulary.shape[1] == config.hidden_size,
            config.model_type,
            f"the lm_predictions head with embedding_size {vocabulary.shape[1]} != hidden_size {config.hidden_size}",
        )
    return Head(
        dense=Linear.of(dense),
        activation=activation(config.hidden_act, "hidden_act", config.model_type),
        norm=Norm.of(norm),
        vocabulary=vocabulary,
        bias=bias,
    )
