"""Hugging Face's encoder with its head on the scored rows only, and log-softmax in float32."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mlmfast.bench.peers.subject import Subject, longest_copy, padded_batches
from mlmfast.masking import MaskPlan

# Copies a pass on a CPU, where small batches stay in caches.
BATCH = 32
# Padded rows a pass on a GPU, which they fill: DeBERTa-v2-xxlarge holds 0.8 GB a position term for so many in bfloat16.
GPU_TOKENS = 1 << 15


class ScoredRows(torch.nn.Module):
    """Encoder, the scored rows, head, log-softmax in float32, the targets' values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        encoder = self.model.base_model
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, L, d]
        return target_logprobs(self.model, hidden.reshape(-1, hidden.shape[-1])[rows], targets)


def target_logprobs(model: Any, scored: Tensor, targets: Tensor) -> Tensor:
    """The head of a Hugging Face model over ``scored [n, d]``: float32 log-probabilities of ``targets``, ``[n]``."""
    if hasattr(model, "lm_predictions"):  # DeBERTa's newer layout
        logits = model.lm_predictions(scored, model.deberta.embeddings.word_embeddings)
    elif hasattr(model, "decoder"):  # ModernBERT
        logits = model.decoder(model.head(scored))
    else:
        logits = model.cls(scored) if hasattr(model, "cls") else model.lm_head(scored)
    return logits.float().log_softmax(1).gather(1, targets[:, None])[:, 0]  # from [n, V]


def copies_a_pass(plan: MaskPlan, device: torch.device) -> int:
    """How many copies :func:`plain_logprobs` puts into one pass."""
    return BATCH if device.type == "cpu" else max(1, GPU_TOKENS // longest_copy(plan))


def plain_logprobs(model: Any, plan: MaskPlan, pad_token_id: int, batch: int | None = None) -> np.ndarray:
    """:class:`ScoredRows` in plain torch, in the model's dtype, on its device: float32 ``[N]``."""
    module = ScoredRows(model)
    device = next(model.parameters()).device
    found = np.empty(len(plan.targets), np.float32)
    with torch.inference_mode():
        for padded in padded_batches(plan, pad_token_id, batch or copies_a_pass(plan, device)):
            moved = padded.to(device)
            values = module(moved.input_ids, moved.attention_mask, moved.rows, moved.targets)
            found[moved.order] = values.cpu().numpy()
    return found


class HuggingFaceScored:
    """What a careful user writes: masked copies in padded batches through the eager encoder, and the head on the rows
    that are scored."""

    name: ClassVar[str] = "hf-scored"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._batch = 0

    def way(self) -> str:
        return f"at most {self._batch} copies a pass, head on scored rows"

    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        self._batch = self.subject.batch or copies_a_pass(plan, self.subject.device)
        return plain_logprobs(self.subject.model, plan, self.subject.tokenizer.pad_token_id, self._batch)
