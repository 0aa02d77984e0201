"""Hugging Face's own modules: as they are, and through torch.compile."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from mlmfast.bench.peers.subject import PaddedBatch, Subject, batch_shapes, copy_lengths, longest_copy, padded_batches
from mlmfast.masking import MaskPlan

# Copies a pass on a CPU. 64 copies of 128 tokens under DeBERTa-v3's vocabulary hold 4 GB of logits, and are no faster.
BATCH = 32
# On a GPU, which 32 short copies would not fill, as many as keep the logits of a pass within this, in bytes; and the
# scores of a layer's attention, of which eager attention holds several at once, within as much. A power of two, which
# leaves batches of one size, each of which would be compiled for.
GPU_BYTES, GPU_BATCH = 4 << 30, 512


class HuggingFaceEager:
    """A user's loop: masked copies in padded batches, logits of every position, log-softmax at the scored ones."""

    name: ClassVar[str] = "hf-eager"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        self.model = subject.model
        self.pad_token_id = subject.tokenizer.pad_token_id
        self.device = subject.device
        self.wish = subject.batch
        self.batch = subject.batch or BATCH

    def way(self) -> str:
        return f"at most {self.batch} copies a pass"

    @torch.inference_mode()
    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        self._choose_batch(plan)
        return self._scored(self.model, plan)

    def _choose_batch(self, plan: MaskPlan) -> None:
        if self.wish is None and self.device.type != "cpu":
            config, length, wide = self.model.config, longest_copy(plan), self.model.dtype.itemsize
            held = max(config.vocab_size * length, config.num_attention_heads * length**2) * wide
            most = min(GPU_BATCH, max(1, GPU_BYTES // held))
            self.batch = 1 << (most.bit_length() - 1)

    def _scored(self, model: Any, plan: MaskPlan) -> np.ndarray:
        found = np.empty(len(plan.targets), np.float32)
        for padded in padded_batches(plan, self.pad_token_id, self.batch):
            batch = padded.to(self.device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # [B, L, V]
            found[batch.order] = _read(logits.flatten(0, 1), batch)
        return found


def _read(logits: torch.Tensor, batch: PaddedBatch) -> np.ndarray:
    """Log-probabilities from the logits of all rows, ``[B L, V]``."""
    rows = logits[batch.rows].float().log_softmax(1)  # [n, V]
    return rows.gather(1, batch.targets[:, None])[:, 0].cpu().numpy()


class HuggingFaceCompiled(HuggingFaceEager):
    """The same loop over ``torch.compile(model)``, with the attention that transformers chooses by itself (SDPA where
    the family has it; DeBERTa has not).

    Compiled anew for each request, in the first call: for exactly its shapes if there are one or two, which is
    fastest, and otherwise for any. One compilation after another would run into torch's limit, and fall back to eager.

    In torch's default mode, on a GPU too: its batches keep the device busy for milliseconds, so that CUDA graphs
    (``reduce-overhead``) would save little, and ``max-autotune`` takes minutes a shape. Not run on a GPU so far.
    """

    name: ClassVar[str] = "hf-compile"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.model = with_own_attention(subject.twin())
        self._request = b""
        self._compiled: Any = None
        self._static = True

    def way(self) -> str:
        return f"{'exact' if self._static else 'dynamic'} shapes, {super().way()}"

    # Not inference_mode: its tensors are another kind to torch.compile, with less of it tried by others.
    @torch.no_grad()
    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        self._choose_batch(plan)
        request = copy_lengths(plan).tobytes()
        if request != self._request:
            torch.compiler.reset()
            self._static = len(batch_shapes(plan, self.batch)) <= 2
            self._compiled = torch.compile(self.model, dynamic=not self._static)
            self._request = request
        return self._scored(self._compiled, plan)


def with_own_attention(model: Any) -> Any:
    """The model with SDPA where its family has it."""
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    return model
