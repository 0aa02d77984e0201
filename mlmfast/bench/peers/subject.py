"""What a peer is given, and how a plan looks to one that pads: rows of equal length and a mask."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from mlmfast.masking import MaskPlan


@dataclass(frozen=True)
class Subject:
    """What is to be computed with.

    Attributes:
        model: a Hugging Face ``...ForMaskedLM``. Its weights are shared with mlmfast where the dtypes are the same.
        tokenizer: its tokenizer.
        dtype: what the peer computes in. ``model`` is in it, too.
        batch: most copies in one pass; None leaves it to the peer.
    """

    model: Any
    tokenizer: Any
    dtype: str = "float32"
    batch: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are, and so where the peer computes."""
        return next(self.model.parameters()).device

    def twin(self) -> Any:
        """The model with a config of its own, so that a peer can change its attention; the weights are shared."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})


class Served(Protocol):
    """Where something that mlmfast is compared with runs.

    Attributes:
        name: as rows call it.
        dtypes: what it computes in.
        devices: the device types that it runs on.
        packages: what it needs that mlmfast does not.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()


class Peer(Served, Protocol):
    """Another way to the log-probabilities of a plan.

    Attributes:
        rounds: whether it reduces log-probabilities in the model's own dtype, and so rounds them to it.
    """

    rounds: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None: ...

    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        """float32 ``[N]``, in the plan's order. The first call for a plan may take long: it compiles and chooses."""
        ...

    def way(self) -> str:
        """How the last plan was computed, where the peer has a choice."""
        ...


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Copies padded to their longest.

    Attributes:
        input_ids, attention_mask: int64 ``[B, L]``.
        rows: int64 ``[n]``, the rows scored, counted through all ``B L``.
        targets: int64 ``[n]``, their token ids.
        order: int64 ``[n]``, their places in the plan.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    targets: Tensor
    order: np.ndarray

    def to(self, device: torch.device) -> PaddedBatch:
        """The same batch on a device; ``order`` stays."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def padded_batches(plan: MaskPlan, pad_token_id: int, most: int) -> Iterator[PaddedBatch]:
    """A plan's copies in the order given, in batches as even as can be of at most ``most``."""
    for members in np.array_split(np.arange(plan.copies), -(-plan.copies // most)):
        first = members[0]
        texts = [plan.sequences[plan.copy_sequences[member]].copy() for member in members]
        for member, text in zip(members, texts):
            text[plan.masked_positions[plan.mask_offsets[member] : plan.mask_offsets[member + 1]]] = plan.mask_token_id
        ids = [torch.from_numpy(text) for text in texts]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
        lengths = torch.tensor([len(text) for text in texts])
        mine = np.flatnonzero((plan.score_copies >= first) & (plan.score_copies <= members[-1]))
        rows = (plan.score_copies[mine] - first) * input_ids.shape[1] + plan.score_positions[mine]
        yield PaddedBatch(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            rows=torch.from_numpy(rows),
            targets=torch.from_numpy(plan.targets[mine]),
            order=mine,
        )


def copy_lengths(plan: MaskPlan) -> np.ndarray:
    """int64 ``[C]``."""
    return np.array([len(sequence) for sequence in plan.sequences], np.int64)[plan.copy_sequences]


def longest_copy(plan: MaskPlan) -> int:
    """Tokens of the longest copy."""
    return int(copy_lengths(plan).max())


def batch_shapes(plan: MaskPlan, most: int) -> set[tuple[int, int]]:
    """The different ``(B, L)`` among :func:`padded_batches`."""
    parts = np.array_split(copy_lengths(plan), -(-plan.copies // most))
    return {(len(part), int(part.max())) for part in parts}
