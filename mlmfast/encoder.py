"""Packed batch -> what the vocabulary ops read at the scored rows: the one forward pass.

Rows are packed from start to end. In the last layer only scored rows ask queries, and only they pass its output
projection, its feed-forward and the prediction head. Before the first layer the copies of a text are the same but for
their masks, so its queries, keys and values are computed once for each distinct row.

Nothing here waits for an accelerator: sizes come from the batch, which knows them on the host, so that launches run
ahead of the device and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlmfast.architectures.spec import Convolution, Embedding, EncoderSpec, Layer, Linear
from mlmfast.cache import Cache, LayerCache, StepBatch
from mlmfast.ops.add_layer_norm import add_layer_norm
from mlmfast.ops.attention import attention
from mlmfast.ops.disentangled_attention import disentangled_attention
from mlmfast.ops.linear import linear
from mlmfast.ops.masked_embedding import masked_embedding
from mlmfast.packing import Batch


@dataclass(frozen=True)
class Queries:
    """The rows that a layer computes.

    Attributes:
        rows: int64 ``[Tq]``, rows of the packed batch; None for all of them.
        positions: int64 ``[Tq]``, their places in their sequences; None for all rows.
        cu_seqlens: int32 ``[C + 1]``, their bounds by copy.
        max_seqlen: most of them in a copy.
    """

    rows: Tensor | None
    positions: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int

    def of(self, hidden: Tensor) -> Tensor:
        """These rows of ``hidden [T, d]``."""
        return hidden if self.rows is None else hidden[self.rows]


# On the CPU: distinct rows are shared where they are at most this part of all, else looking them up costs more.
SHARED = 0.75


@dataclass(frozen=True)
class States:
    """Hidden states of every packed row, rows that are known to be equal held once.

    Attributes:
        distinct: ``[U, d]``.
        kinds: int64 ``[T]``, each row's place in ``distinct``; None where that holds every row.
    """

    distinct: Tensor
    kinds: Tensor | None = None

    def every(self) -> Tensor:
        """All rows, ``[T, d]``."""
        return self.distinct if self.kinds is None else self.distinct[self.kinds]

    def projected(self, product: Linear) -> Tensor:
        """All rows through a product, ``[T, m]``."""
        out = linear(self.distinct, product.weight, product.bias)
        return out if self.kinds is None else out[self.kinds]


def encode(spec: EncoderSpec, batch: Batch, mask_token_id: int, cache: Cache | None = None) -> Tensor:
    """Hidden states of the scored rows after the last layer, ``[R, d]``.

    Without a cache a batch holds whole copies. With one it is a :class:`mlmfast.cache.StepBatch` of the rows that are
    computed anew: they see the keys and values that the cache holds of the others, and leave theirs in it.
    """
    every = Queries(None, batch.places(), batch.cu_seqlens, batch.max_seqlen)
    scored = Queries(batch.scored_rows, batch.scored_positions, batch.cu_scored, batch.max_scored)
    hidden = embed(spec.embedding, batch, mask_token_id)
    memories = [None] * len(spec.layers) if cache is None else cache.layers
    for layer, memory in zip(spec.layers[:-1], memories):
        hidden = States(apply_layer(spec, layer, batch, memory, hidden, every, hidden.every()))
    last, memory = spec.layers[-1], memories[-1]
    if spec.mask_decoder is None:
        return apply_layer(spec, last, batch, memory, hidden, scored, scored.of(hidden.every()))
    # Enhanced mask decoder (He et al. 2021, section 3.2): the last layer twice, its keys and values from the layer
    # before it both times, its queries from absolute positions first. Positions past the table share its last row.
    places = batch.scored_positions.clamp(max=len(spec.mask_decoder) - 1)
    queries = scored.of(hidden.every()) + spec.mask_decoder[places]
    for _ in range(2):
        queries = apply_layer(spec, last, batch, memory, hidden, scored, queries, convolve=False)
    return queries


def predict(spec: EncoderSpec, hidden: Tensor) -> Tensor:
    """The head's hidden states ``[R, e]``, ready for a vocabulary op, from the encoder's ``[R, d]``."""
    head = spec.head
    transformed = linear(hidden, head.dense.weight, head.dense.bias, head.activation)
    return add_layer_norm(transformed, None, None, head.norm.weight, head.norm.bias, head.norm.eps)


def embed(embedding: Embedding, batch: Batch, mask_token_id: int) -> States:
    """What the packed rows enter the first layer with."""
    ids, masked = batch.token_ids, batch.masked_rows
    table = embedding.positions
    places = None if table is None else position_ids(embedding, batch)
    kinds = None
    if ids.device.type == "cpu":  # elsewhere the number of distinct rows would have to be waited for
        count = 1 if places is None else int(places.max()) + 1
        read = ids.index_fill(0, masked, mask_token_id)
        distinct, found = torch.unique(read if places is None else read * count + places, return_inverse=True)
        if len(distinct) <= SHARED * len(read):
            ids, masked, kinds = distinct // count, masked[:0], found
            places = None if places is None else distinct % count
    norm, projection = embedding.norm, embedding.projection
    inside = projection is None or embedding.norm_first  # else the projection stands between the sum and its norm
    hidden = masked_embedding(
        ids,
        masked,
        mask_token_id,
        embedding.words,
        places,
        table,
        None,
        embedding.types,
        norm.weight if inside else None,
        norm.bias if inside else None,
        norm.eps,
    )
    if projection is not None and inside:
        hidden = linear(hidden, projection.weight, projection.bias)
    elif projection is not None:
        hidden = linear(hidden, projection.weight, None)
        hidden = add_layer_norm(hidden, None, projection.bias, norm.weight, norm.bias, norm.eps)
    return States(hidden, kinds)


def position_ids(embedding: Embedding, batch: Batch) -> Tensor:
    """Absolute position of every packed row, int64 ``[T]``."""
    if isinstance(batch, StepBatch):
        return batch.position_ids
    if embedding.padding_id is None:
        return row_positions(batch) + embedding.first_position
    # RoBERTa counts the tokens that are not padding, and gives padding its own id, should a text spell it out.
    counted = batch.token_ids.ne(embedding.padding_id).index_fill(0, batch.masked_rows, True).long()
    before = torch.cat([counted.new_zeros(1), counted.cumsum(0)])  # [T + 1]
    starts = batch.cu_seqlens[:-1].long()
    within = before[1:] - by_row(batch, before[starts])
    return within * counted + embedding.padding_id


def row_positions(batch: Batch) -> Tensor:
    """Each packed row's place in its copy, int64 ``[T]``."""
    if isinstance(batch, StepBatch):
        return batch.positions
    starts = by_row(batch, batch.cu_seqlens[:-1].long())
    return torch.arange(batch.tokens, device=starts.device) - starts


def by_row(batch: Batch, values: Tensor) -> Tensor:
    """A value a copy, ``[C]``, for each of the copy's rows, ``[T]``."""
    # Without its size torch would wait for the device to add up the lengths.
    return torch.repeat_interleave(values, batch.cu_seqlens.diff().long(), output_size=batch.tokens)


def apply_layer(
    spec: EncoderSpec,
    layer: Layer,
    batch: Batch,
    memory: LayerCache | None,
    hidden: States,
    queries: Queries,
    states: Tensor,
    convolve: bool = True,
) -> Tensor:
    """One layer for some rows: ``states [Tq, d]`` ask the queries, all of ``hidden [T, d]`` gives keys and values."""

    asked = hidden if queries.rows is None else States(states)
    q, k, v = (
        rows.projected(product).unflatten(1, (spec.heads, -1))
        for rows, product in ((asked, layer.query), (hidden, layer.key), (hidden, layer.value))
    )
    if memory is not None:
        k, v = memory.extended(k, v, batch)
    cu_keys, max_keys = batch.keys()
    bounds = (queries.cu_seqlens, cu_keys, queries.max_seqlen, max_keys, queries.positions, spec.scale)
    if spec.buckets is None:
        mixed = attention(q, k, v, *bounds)
    else:
        mixed = disentangled_attention(q, k, v, layer.pos_key, layer.pos_query, spec.buckets, *bounds)
    norm = layer.attention_norm
    attended = linear(mixed.view(len(states), -1), layer.output.weight)
    attended = add_layer_norm(attended, states, layer.output.bias, norm.weight, norm.bias, norm.eps)
    norm = layer.feed_forward_norm
    wide = linear(attended, layer.up.weight, layer.up.bias, spec.activation)
    out = add_layer_norm(linear(wide, layer.down.weight), attended, layer.down.bias, norm.weight, norm.bias, norm.eps)
    if layer.convolution is not None and convolve:
        out = apply_convolution(layer.convolution, batch, memory, hidden.every(), queries, out)
    return out


def apply_convolution(
    convolution: Convolution,
    batch: Batch,
    memory: LayerCache | None,
    hidden: Tensor,
    queries: Queries,
    out: Tensor,
) -> Tensor:
    """``norm(out + activation(conv(hidden)))`` for the query rows; taps past a copy's ends read zeros."""
    positions = row_positions(batch)
    if isinstance(batch, StepBatch):
        lengths, own = batch.lengths, batch.cache_rows
    else:
        lengths = by_row(batch, batch.cu_seqlens.diff().long())
        own = torch.arange(batch.tokens, device=hidden.device)
    if memory is not None:
        hidden = memory.with_inputs(hidden, batch)
    if queries.rows is not None:
        positions, lengths, own = positions[queries.rows], lengths[queries.rows], own[queries.rows]
    taps = torch.arange(convolution.width, device=hidden.device) - convolution.width // 2
    reached = positions[:, None] + taps  # [Tq, width]
    inside = (reached >= 0) & (reached < lengths[:, None])
    sources = (own[:, None] + taps).clamp(0, len(hidden) - 1)
    read = hidden[sources].masked_fill(~inside[:, :, None], 0)  # [Tq, width, d]
    product = convolution.linear
    convolved = linear(read.view(len(own), -1), product.weight, product.bias, convolution.activation)
    norm = convolution.norm
    return add_layer_norm(convolved, out, None, norm.weight, norm.bias, norm.eps)
