"""Packed batch -> what the vocabulary ops read at the scored rows: the one forward pass.

Rows are packed from start to end. In the last layer only scored rows ask queries, and only they pass its output
projection, its feed-forward and the prediction head. Before the first layer the copies of a text are the same but for
their masks, so its queries, keys and values are computed once for each distinct row.

What a layer reads is normed, what it adds to is the stream. After a norm that follows a sum (BERT) the two are one;
where norms stand before attention and feed-forward (ESM-2, ModernBERT) the stream is never normed itself.

Nothing here waits for an accelerator: sizes come from the batch, which knows them on the host, so that launches run
ahead of the device and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlmfast.architectures.spec import Convolution, Embedding, EncoderSpec, Linear, Norm, Rotary, TokenDropout
from mlmfast.cache import Cache, LayerCache, StepBatch
from mlmfast.ops.add_layer_norm import add_layer_norm
from mlmfast.ops.attention import attention
from mlmfast.ops.disentangled_attention import disentangled_attention
from mlmfast.ops.linear import linear
from mlmfast.ops.masked_embedding import masked_embedding
from mlmfast.ops.pre_norm import pre_norm
from mlmfast.ops.rotary import rotary
from mlmfast.packing import Batch, PaddedBatch


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


# On the CPU: distinct rows are shared where they are at most this part of all, else looking them up costs more.
SHARED = 0.75


@dataclass(frozen=True)
class States:
    """Hidden states of packed rows, rows that are known to be equal held once.

    Attributes:
        normed: ``[U, d]``, what the next products read.
        stream: ``[U, d]``, what is added to their result; the same tensor but for pre-norm models.
        kinds: int64 ``[T]``, each row's place in both; None where they hold every row.
    """

    normed: Tensor
    stream: Tensor
    kinds: Tensor | None = None

    def every(self) -> Tensor:
        """The stream of all rows, ``[T, d]``."""
        return self.stream if self.kinds is None else self.stream[self.kinds]

    def of(self, rows: Tensor) -> States:
        """Some packed rows, int64 ``[Tq]``, each held by itself."""
        places = rows if self.kinds is None else self.kinds[rows]
        stream = self.stream[places]
        return States(stream if self.normed is self.stream else self.normed[places], stream)

    def projected(self, product: Linear) -> Tensor:
        """All rows through a product, ``[T, m]``."""
        out = linear(self.normed, product.weight, product.bias)
        return out if self.kinds is None else out[self.kinds]


class Angles:
    """Cosines and sines of every place of a batch's sequences, a table for each set of frequencies."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._places: Tensor | None = None
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def turned(self, x: Tensor, turning: Rotary, places: Tensor | None) -> Tensor:
        """Rows ``x [n, H, D]`` turned by their places int64 ``[n]``; None where they are all rows of the batch."""
        if places is None:
            if self._places is None:
                self._places = row_positions(self._batch)
            places = self._places
        key = id(turning.frequencies)  # which the spec keeps
        if key not in self._tables:
            every = torch.arange(self._batch.keys()[1], device=x.device, dtype=torch.float32)
            angles = every[:, None] * turning.frequencies.float()
            self._tables[key] = (angles.cos() * turning.scaling, angles.sin() * turning.scaling)
        return rotary(x, *self._tables[key], places)


def encode(spec: EncoderSpec, batch: Batch, mask_token_id: int, cache: Cache | None = None) -> Tensor:
    """Hidden states of the scored rows after the last layer, ``[R, d]``.

    Without a cache a batch holds whole copies. With one it is a :class:`mlmfast.cache.StepBatch` of the rows that are
    computed anew: they see the keys and values that the cache holds of the others, and leave theirs in it.
    """
    every = Queries(None, batch.places(), batch.cu_seqlens, batch.max_seqlen)
    scored = Queries(batch.scored_rows, batch.scored_positions, batch.cu_scored, batch.max_scored)
    hidden = embed(spec, batch, mask_token_id)
    memories = [None] * len(spec.layers) if cache is None else cache.layers
    angles = Angles(batch)
    last = len(spec.layers) - 1
    for index in range(last):
        hidden = apply_layer(spec, index, batch, memories[index], angles, hidden, every, hidden)
    asked = hidden.of(batch.scored_rows)
    if spec.mask_decoder is None:
        return apply_layer(spec, last, batch, memories[last], angles, hidden, scored, asked).normed
    # Enhanced mask decoder (He et al. 2021, section 3.2): the last layer twice, its keys and values from the layer
    # before it both times, its queries from absolute positions first. Positions past the table share its last row.
    places = batch.scored_positions.clamp(max=len(spec.mask_decoder) - 1)
    queries = asked.normed + spec.mask_decoder[places]
    for _ in range(2):
        asked = States(queries, queries)
        asked = apply_layer(spec, last, batch, memories[last], angles, hidden, scored, asked, convolve=False)
        queries = asked.normed
    return queries


def layer_states(spec: EncoderSpec, batch: Batch) -> Iterator[States]:
    """States of all rows of a batch of whole sequences without masked rows: before each layer, and after the last.

    The enhanced mask decoder is no part of them: its queries are those of predictions.
    """
    every = Queries(None, batch.places(), batch.cu_seqlens, batch.max_seqlen)
    angles = Angles(batch)
    hidden = embed(spec, batch, 0)  # which no row reads
    yield hidden
    for index in range(len(spec.layers)):
        hidden = apply_layer(spec, index, batch, None, angles, hidden, every, hidden)
        yield hidden


def predict(spec: EncoderSpec, hidden: Tensor) -> Tensor:
    """The head's hidden states ``[R, e]``, ready for a vocabulary op, from the encoder's ``[R, d]``."""
    head = spec.head
    transformed = linear(hidden, head.dense.weight, head.dense.bias, head.activation)
    return add_layer_norm(transformed, None, None, head.norm.weight, head.norm.bias, head.norm.eps)


def embed(spec: EncoderSpec, batch: Batch, mask_token_id: int) -> States:
    """What the packed rows enter the first layer with."""
    embedding = spec.embedding
    ids, masked = batch.token_ids, batch.masked_rows
    table = embedding.positions
    places = None if table is None else position_ids(embedding, batch)
    scale = None if embedding.token_dropout is None else copy_scale(embedding.token_dropout, batch, mask_token_id)
    bounds = None if scale is None else batch.cu_seqlens
    kinds = None
    token_types = batch.token_types if isinstance(batch, PaddedBatch) else None
    # Elsewhere the number of distinct rows would have to be waited for; rows of several types are texts, not copies.
    if ids.device.type == "cpu" and token_types is None:
        key, parts = ids.index_fill(0, masked, mask_token_id), []
        if places is not None:
            parts.append((places, int(places.max()) + 1))
        if scale is not None:
            scales, of_copy = scale.unique(return_inverse=True)
            parts.append((by_row(batch, of_copy), len(scales)))
        for values, count in parts:
            key = key * count + values
        distinct, found = torch.unique(key, return_inverse=True)
        if len(distinct) <= SHARED * len(key):
            kinds, masked = found, masked[:0]
            if scale is not None:  # each distinct row is a copy of its own
                scale, distinct = scales[distinct % len(scales)], distinct // len(scales)
                bounds = torch.arange(len(distinct) + 1, dtype=torch.int32)
            if places is not None:
                places, distinct = distinct % parts[0][1], distinct // parts[0][1]
            ids = distinct
    norm, projection = embedding.norm, embedding.projection
    inside = norm if projection is None or embedding.norm_first else None  # else the projection stands before the norm
    hidden = masked_embedding(
        ids,
        masked,
        mask_token_id,
        embedding.words,
        places,
        table,
        token_types,
        embedding.types,
        None if inside is None else inside.weight,
        None if inside is None else inside.bias,
        0.0 if inside is None else inside.eps,
        scale,
        bounds,
    )
    if projection is not None and norm is not None and inside is None:
        hidden = linear(hidden, projection.weight, None)
        hidden = add_layer_norm(hidden, None, projection.bias, norm.weight, norm.bias, norm.eps)
    elif projection is not None:
        hidden = linear(hidden, projection.weight, projection.bias)
    first = spec.layers[0].attention_norm
    if not spec.pre_norm or first is None:
        return States(hidden, hidden, kinds)
    return States(add_layer_norm(hidden, None, None, first.weight, first.bias, first.eps), hidden, kinds)


def copy_scale(dropout: TokenDropout, batch: Batch, mask_token_id: int) -> Tensor:
    """Factor on each copy's words, float32 ``[C]``."""
    if isinstance(batch, (StepBatch, PaddedBatch)):
        return batch.copy_scale
    masks = batch.token_ids.index_fill(0, batch.masked_rows, mask_token_id).eq(dropout.token)
    before = torch.cat([masks.new_zeros(1, dtype=torch.int64), masks.cumsum(0)])  # [T + 1]
    return dropout.scale(before[batch.cu_seqlens.long()].diff().float(), batch.cu_seqlens.diff())


def position_ids(embedding: Embedding, batch: Batch) -> Tensor:
    """Absolute position of every packed row, int64 ``[T]``."""
    if isinstance(batch, (StepBatch, PaddedBatch)):
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
    index: int,
    batch: Batch,
    memory: LayerCache | None,
    angles: Angles,
    hidden: States,
    queries: Queries,
    asked: States,
    convolve: bool = True,
) -> States:
    """One layer for some rows: ``asked``, those of ``queries``, ask; all of ``hidden`` gives keys and values."""
    layer = spec.layers[index]
    q, k, v = (
        rows.projected(product).unflatten(1, (spec.heads, -1))
        for rows, product in ((asked, layer.query), (hidden, layer.key), (hidden, layer.value))
    )
    if layer.rotary is not None:
        q = angles.turned(q, layer.rotary, queries.positions)
        k = angles.turned(k, layer.rotary, batch.places())
    if memory is not None:
        k, v = memory.extended(k, v, batch)
    cu_keys, max_keys = batch.keys()
    bounds = (queries.cu_seqlens, cu_keys, queries.max_seqlen, max_keys, queries.positions, spec.scale)
    if spec.buckets is None:
        mixed = attention(q, k, v, *bounds, layer.local_window, spec.distance_bias)
    else:
        mixed = disentangled_attention(q, k, v, layer.pos_key, layer.pos_query, spec.buckets, *bounds)
    after_attention, after_feed_forward = spec.norms(index)
    attended = linear(mixed.flatten(1), layer.output.weight)
    states = added(spec, attended, asked.every(), layer.output.bias, after_attention)
    wide = linear(states.normed, layer.up.weight, layer.up.bias, spec.activation)
    states = added(spec, linear(wide, layer.down.weight), states.stream, layer.down.bias, after_feed_forward)
    if layer.convolution is not None and convolve:
        out = apply_convolution(layer.convolution, batch, memory, hidden.every(), queries, states.stream)
        states = States(out, out)
    return states


def added(spec: EncoderSpec, out: Tensor, stream: Tensor, bias: Tensor | None, norm: Norm) -> States:
    """A product's ``out [Tq, m]`` and its bias added to the stream, and the norm that stands after that."""
    if spec.pre_norm:
        stream, normed = pre_norm(out, stream, bias, norm.weight, norm.bias, norm.eps)
        return States(normed, stream)
    normed = add_layer_norm(out, stream, bias, norm.weight, norm.bias, norm.eps)
    return States(normed, normed)


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
