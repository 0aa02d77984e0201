"""What an architecture file hands to the encoder: weights, and what this family does differently.

A spec holds references to the model's own parameters, never copies, so a training step between two scores is seen.
What has to be computed from parameters (DeBERTa's projected position tables) goes through :class:`Derived`, which
notices a changed parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from mlmfast.errors import UnsupportedModelError
from mlmfast.ops.vocab_logprob import vocab_logprob
from mlmfast.ops.vocab_rows import vocab_rows
from mlmfast.ops.vocab_topk import vocab_topk
from mlmfast.reference import accumulation


def _plain(module: Any, kind: type[nn.Module]) -> None:
    """Refuses a module that computes more than its weights say: an adapter, a quantised layer, an offloading hook."""
    if getattr(module.forward, "__func__", None) is not kind.forward:
        raise UnsupportedModelError(
            f"a {type(module).__name__} stands where a plain {kind.__name__} was expected (an adapter, a quantised "
            "layer?); merge or dequantise it first (PEFT: model.merge_and_unload()), or load the checkpoint by name"
        )


def table(module: Any) -> Tensor:
    """The weight ``[rows, width]`` of a plain embedding module."""
    _plain(module, nn.Embedding)
    return module.weight


@dataclass(frozen=True)
class Linear:
    """Weight ``[out, in]`` and bias ``[out]`` of a matrix product."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, module: Any) -> Linear:
        _plain(module, nn.Linear)
        return cls(module.weight, module.bias)

    @classmethod
    def parts(cls, module: Any, count: int) -> list[Linear]:
        """The products that one module computes side by side, the first rows of its weight the first product's."""
        whole = cls.of(module)
        biases = [None] * count if whole.bias is None else whole.bias.chunk(count)
        return [cls(weight, bias) for weight, bias in zip(whole.weight.chunk(count), biases)]


@dataclass(frozen=True)
class Norm:
    """Weight and bias ``[d]`` of a LayerNorm, and the epsilon added to its variance."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: Any, kind: type[nn.Module] = nn.LayerNorm) -> Norm:
        """``kind``: the class that is expected; DeBERTa's own calls its epsilon ``variance_epsilon``."""
        _plain(module, kind)
        return cls(module.weight, module.bias, module.eps if kind is nn.LayerNorm else module.variance_epsilon)


@dataclass(frozen=True)
class TokenDropout:
    """Masks without an embedding: the other words of a copy are scaled as dropout would (Lin et al. 2022, ESM-2).

    Attributes:
        token: the mask's id, whose row of the words is zero.
        kept: part of a text that training left unmasked, on average.
    """

    token: int
    kept: float

    def scale(self, masks: Any, length: Any) -> Any:
        """Factor on the words of copies of some length that hold some masks, numbers or tensors of them."""
        return self.kept / (1 - masks / length)


@dataclass(frozen=True)
class Embedding:
    """Tables that a row's embedding is summed from, and what follows the sum.

    Attributes:
        words: ``[V, e]``.
        norm: LayerNorm of the result; None where the first layer's stands in its place.
        positions: ``[P, e]``, absolute positions; None where the family has none.
        types: ``[K, e]``, token types; a single text is all type 0.
        projection: from ``e`` to the hidden size; None where the family has none.
        norm_first: the norm is ``e`` wide and stands before the projection (ALBERT), not after it (DeBERTa).
        first_position: position id of a sequence's first token.
        padding_id: set where position ids count only tokens other than this one (RoBERTa).
        token_dropout: set where masks have no embedding and the others are scaled up for it (ESM-2).
    """

    words: Tensor
    norm: Norm | None = None
    positions: Tensor | None = None
    types: Tensor | None = None
    projection: Linear | None = None
    norm_first: bool = False
    first_position: int = 0
    padding_id: int | None = None
    token_dropout: TokenDropout | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), as the ``rotary`` op pairs elements.

    Attributes:
        frequencies: float32 ``[half]``, radians a position of each pair; ``2 * half`` elements of a head are turned.
        scaling: factor on the turned elements (YaRN's).
    """

    frequencies: Tensor
    scaling: float = 1.0


@dataclass(frozen=True)
class Convolution:
    """A convolution over positions beside a layer (DeBERTa-v2-xlarge): ``norm(layer + activation(conv(input)))``.

    Attributes:
        linear: weight ``[d, width * d]``: the taps side by side, the leftmost position first.
        width: number of taps, odd.
        activation: as in the ``linear`` op.
        norm: LayerNorm of the sum.
    """

    linear: Linear
    width: int
    activation: str
    norm: Norm


@dataclass(frozen=True)
class Layer:
    """One transformer layer.

    Attributes:
        query, key, value, output: the attention's products.
        attention_norm: after attention and its residual; in a pre-norm model before attention, and None in a first
            layer whose input is normed already.
        up, down: the feed-forward's products.
        feed_forward_norm: after the feed-forward and its residual; in a pre-norm model before the feed-forward.
        pos_key: ``[P, H, D]``, projected position keys for content-to-position; None without that term.
        pos_query: ``[P, H, D]``, projected position queries for position-to-content; None without that term.
        convolution: beside this layer, or None.
        rotary: positions that turn this layer's queries and keys, or None.
        local_window: greatest distance that this layer attends to; -1 for every one.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm | None
    up: Linear
    down: Linear
    feed_forward_norm: Norm
    pos_key: Tensor | None = None
    pos_query: Tensor | None = None
    convolution: Convolution | None = None
    rotary: Rotary | None = None
    local_window: int = -1


@dataclass(frozen=True)
class Head:
    """The prediction head: ``norm(activation(dense(hidden))) @ vocabulary.T + bias``.

    Attributes:
        dense: from the hidden size to the vocabulary's width.
        activation: as in the ``linear`` op.
        norm: LayerNorm after it.
        vocabulary: ``[V, e]``.
        bias: ``[V]``.
    """

    dense: Linear
    activation: str
    norm: Norm
    vocabulary: Tensor
    bias: Tensor | None

    @property
    def vocab_size(self) -> int:
        """``V``."""
        return len(self.vocabulary)

    def vocab_logprob(
        self,
        hidden: Tensor,
        targets: Tensor,
        target_rows: Tensor,
        temperature: float = 1.0,
        ranks: bool = False,
        entropies: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The op over this vocabulary, as the two that follow."""
        return vocab_logprob(hidden, self.vocabulary, self.bias, targets, target_rows, temperature, ranks, entropies)

    def vocab_topk(self, hidden: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        return vocab_topk(hidden, self.vocabulary, self.bias, k, temperature)

    def vocab_rows(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        return vocab_rows(hidden, self.vocabulary, self.bias, temperature)

    def first_logits(self, hidden: Tensor) -> Tensor:
        """Token 0's logit at each row, ``[R]``: what turns log-probabilities back into logits."""
        wide = accumulation(hidden.dtype)
        first = hidden.to(wide) @ self.vocabulary[0].to(wide)
        return first if self.bias is None else first + self.bias[0].to(wide)


@dataclass(frozen=True)
class EncoderSpec:
    """Everything the encoder needs to know of a model.

    Attributes:
        family: the checkpoint's ``model_type``.
        embedding, layers, head: the weights.
        heads: attention heads ``H``.
        scale: what attention scores are multiplied by.
        activation: of the feed-forward, as in the ``linear`` op.
        buckets: int32 ``[2 N + 1]``, the position-table row of each distance from ``-N`` to ``N``; farther ones
            share the ends. None for plain attention.
        distance_bias: float32 ``[H, 2 N + 1]``, what each head adds to a score at each distance (MPNet); farther ones
            share the ends. None without one; not together with ``buckets``.
        pre_norm: norms stand before attention and feed-forward, and the residual stream is not normed.
        final_norm: of the stream after the last layer of a pre-norm model.
        mask_decoder: ``[P, d]``, absolute positions of the enhanced mask decoder, which replaces the last layer by
            two passes of it whose queries start at ``position + hidden``; None without one.
        max_length: longest sequence, special tokens included; None where only memory limits it.
    """

    family: str
    embedding: Embedding
    layers: Sequence[Layer]
    head: Head
    heads: int
    scale: float
    activation: str
    buckets: Tensor | None = None
    distance_bias: Tensor | None = None
    pre_norm: bool = False
    final_norm: Norm | None = None
    mask_decoder: Tensor | None = None
    max_length: int | None = None

    def norms(self, index: int) -> tuple[Norm, Norm]:
        """The norms that follow a layer's attention and its feed-forward, wherever the model has them."""
        layer = self.layers[index]
        following: tuple[Norm | None, Norm | None] = (layer.attention_norm, layer.feed_forward_norm)
        if self.pre_norm:
            last = index == len(self.layers) - 1
            following = (layer.feed_forward_norm, self.final_norm if last else self.layers[index + 1].attention_norm)
        assert following[0] is not None and following[1] is not None
        return following[0], following[1]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table: token ids that can be read."""
        return len(self.embedding.words)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embedding.words.dtype


def _note_fused_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Advances the version counters that a fused optimiser's step leaves as they were."""
    for group in optimiser.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if p.grad is not None and not p.is_inference()])


register_optimizer_step_post_hook(_note_fused_step)


class Derived:
    """Tensors computed from parameters, kept until a parameter changes.

    A change is seen by a parameter's identity, storage and version counter, which optimisers, ``copy_`` and
    ``load_state_dict`` advance (fused optimisers through a hook of this module). Writing through ``parameter.data``
    hides from the counter: :meth:`clear` is for that.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[Tensor], list[StorageWeakRef], list[Hashable], Tensor]] = {}

    def get(self, name: Hashable, sources: Sequence[Tensor | None], build: Callable[[], Tensor]) -> Tensor:
        """The tensor kept under ``name``, built anew if any of its ``sources`` is not what it was."""
        present = [source for source in sources if source is not None]
        if any(source.is_inference() for source in present):  # these have no version counter
            return build()
        # A weak reference keeps a storage's identity from being used again: model.bfloat16() and back swaps the storage
        # under a parameter, at an unchanged version and perhaps at the old address.
        storages = [StorageWeakRef(source.untyped_storage()) for source in present]
        state: list[Hashable] = [
            (storage.cdata, source.data_ptr(), source.dtype, source._version)
            for storage, source in zip(storages, present)
        ]
        kept = self._kept.get(name)
        same = kept is not None and len(kept[0]) == len(present) and all(a is b for a, b in zip(kept[0], present))
        if kept is None or not same or kept[2] != state:
            # Without version counters, kept tensors could be packed by no backend.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept[name] = (present, storages, state, build())
        return kept[3]

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()
