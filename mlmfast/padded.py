"""Padded sequences, as transformers takes them -> packed batches, and the states of their rows back in their places.

What counts the columns of the matrix is counted there, before padding is cut away: absolute positions, and the masks
that token dropout makes up for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mlmfast.architectures.spec import Embedding, EncoderSpec
from mlmfast.encoder import layer_states
from mlmfast.packing import PaddedBatch


@dataclass(frozen=True, eq=False)
class Padded:
    """A matrix of sequences.

    Attributes:
        token_ids: int64 ``[B, L]``.
        attended: bool ``[B, L]``, where tokens are; in each line they are neighbours.
        lengths: how many they are in each line.
        token_types: int64 ``[B, L]``; None for type 0 everywhere.
    """

    token_ids: Tensor
    attended: Tensor
    lengths: list[int]
    token_types: Tensor | None = None

    def states(self, spec: EncoderSpec, batch_tokens: int, layers: bool) -> list[Tensor]:
        """Hidden states ``[B, L, d]``, zeros at padding: after the last layer, or also before each layer.

        Args:
            spec: of the model.
            batch_tokens: most rows computed at once, if more than one sequence are.
            layers: all that transformers calls ``hidden_states``, the first layer's input first.
        """
        found: list[Tensor] = []
        for batch in self.batches(spec, batch_tokens):
            for i, rows in enumerate(_wanted(spec, batch, layers)):
                if i == len(found):
                    found.append(rows.new_zeros(self.token_ids.numel(), rows.shape[1]))
                found[i].index_copy_(0, batch.cells, rows)
        return [states.unflatten(0, self.token_ids.shape) for states in found]

    def batches(self, spec: EncoderSpec, batch_tokens: int) -> Iterator[PaddedBatch]:
        """The sequences that have tokens, longest first, at most so many rows together."""
        # A backend computes neighbours of one length as a block.
        lines = sorted((i for i, n in enumerate(self.lengths) if n), key=lambda i: -self.lengths[i])
        positions, scale = self._positions(spec.embedding), self._scale(spec.embedding)
        together: list[int] = []
        rows = 0
        for line in lines:
            if together and rows + self.lengths[line] > batch_tokens:
                yield self._batch(together, positions, scale)
                together, rows = [], 0
            together.append(line)
            rows += self.lengths[line]
        if together:
            yield self._batch(together, positions, scale)

    def _positions(self, embedding: Embedding) -> Tensor:
        """Absolute position of every cell, int64 ``[B, L]``."""
        padding = embedding.padding_id
        if padding is None:
            columns = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
            return (columns + embedding.first_position).expand(self.token_ids.shape)
        counted = self.token_ids.ne(padding)
        return counted.cumsum(1) * counted + padding

    def _scale(self, embedding: Embedding) -> Tensor:
        """Factor on each line's words, float32 ``[B]``."""
        dropout = embedding.token_dropout
        if dropout is None:
            return self.token_ids.new_ones(len(self.token_ids), dtype=torch.float32)
        return dropout.scale(self.token_ids.eq(dropout.token).sum(1).float(), self.attended.sum(1))

    def _batch(self, lines: list[int], positions: Tensor, scale: Tensor) -> PaddedBatch:
        device, width = self.token_ids.device, self.token_ids.shape[1]
        chosen = torch.tensor(lines, device=device)
        columns = torch.arange(width, device=device)
        cells = (chosen[:, None] * width + columns)[self.attended[chosen]]
        lengths = [self.lengths[line] for line in lines]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        none = cells[:0]  # no prediction is read here
        return PaddedBatch(
            token_ids=self.token_ids.flatten()[cells],
            cu_seqlens=bounds,
            masked_rows=none,
            scored_rows=none,
            cu_scored=torch.zeros_like(bounds),
            scored_positions=none,
            max_seqlen=max(lengths),
            max_scored=0,
            position_ids=positions.flatten()[cells],
            copy_scale=scale[chosen],
            token_types=None if self.token_types is None else self.token_types.flatten()[cells],
            cells=cells,
        )


def _wanted(spec: EncoderSpec, batch: PaddedBatch, layers: bool) -> Iterator[Tensor]:
    """States of all rows ``[T, d]``: the last, or all. A pre-norm model's are its stream, the last ones normed."""
    last = len(spec.layers)
    for i, states in enumerate(layer_states(spec, batch)):
        if i == last:
            yield states.normed
        elif layers:
            yield states.every()
