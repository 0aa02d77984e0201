"""What mlmfast is compared with. A peer takes the same weights and the same plan and returns the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan


class Peer(Protocol):
    """Another way to the log-probabilities of a plan."""

    name: str

    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        """float32 ``[N]``, in the plan's order."""
        ...


class HuggingFaceEager:
    """A user's loop: masked copies in padded batches, logits of every position, log-softmax at the scored ones.

    Args:
        model: a Hugging Face ``...ForMaskedLM`` with eager attention.
        pad_token_id: fills the ends of shorter copies.
        batch: copies a pass. All at once would hold 4 GB of logits for 64 copies of 128 tokens under DeBERTa-v3's
            vocabulary, and is no faster.
    """

    name = "hf-eager"

    def __init__(self, model: Any, pad_token_id: int, batch: int) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.batch = batch

    @torch.inference_mode()
    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        found = torch.empty(len(plan.targets))
        for first, input_ids, attention_mask in self._batches(plan):
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # [B, L, V]
            mine = np.flatnonzero((plan.score_copies >= first) & (plan.score_copies < first + len(input_ids)))
            rows = logits[plan.score_copies[mine] - first, plan.score_positions[mine]].float()  # [n, V]
            found[mine] = rows.log_softmax(1)[torch.arange(len(mine)), plan.targets[mine]]
        return found.numpy()

    def _batches(self, plan: MaskPlan) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The first copy of each batch, its padded ids and its attention mask, ``[B, L]``."""
        for first in range(0, plan.copies, self.batch):
            copies = range(first, min(first + self.batch, plan.copies))
            texts = [plan.sequences[plan.copy_sequences[copy]].copy() for copy in copies]
            for copy, text in zip(copies, texts):
                text[plan.masked_positions[plan.mask_offsets[copy] : plan.mask_offsets[copy + 1]]] = plan.mask_token_id
            ids = [torch.from_numpy(text) for text in texts]
            input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
            lengths = torch.tensor([len(text) for text in texts])
            yield first, input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


PEERS: dict[str, Callable[[Any, int, int], Peer]] = {"hf": HuggingFaceEager}


def peer_named(name: str) -> Callable[[Any, int, int], Peer]:
    """What makes the peer that ``--against`` names, from a model, its pad token's id and the copies of a batch.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in PEERS:
        raise RequestError(f"peer {name!r} is not known; choose from {', '.join(PEERS)}")
    return PEERS[name]
