"""disentangled-flash's Triton kernels for DeBERTa-v2/v3 (Boychev 2026, Apache-2.0), its head on the scored rows."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import numpy as np
import torch

from mlmfast.bench.peers.scored import copies_a_pass, target_logprobs
from mlmfast.bench.peers.subject import PaddedBatch, Subject, padded_batches
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan

# Widths of a head that its Triton kernels take.
HEADS = (32, 64, 128)


class DisentangledFlash:
    """The encoder of ``disentangled_flash.optimize_deberta`` on packed rows (``forward_packed``), strict float32.

    Between its encoder and the log-probabilities stands what a user of it would write: Hugging Face's embeddings, rows
    packed by its own ``pack_padded_with_info``, and the head on scored rows.

    Run so far: version 1.1.1 on a CPU, where the package's plain-torch backend serves, in toy shapes with copies of
    mixed lengths. Not run so far: its Triton kernels, and anything on a GPU.
    """

    name: ClassVar[str] = "disentangled-flash"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ("disentangled_flash",)
    rounds: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        config = subject.model.config
        if config.model_type != "deberta-v2":
            raise RequestError(f"disentangled-flash computes DeBERTa-v2 and v3, not {config.model_type}")
        self._backend = "torch" if subject.device.type == "cpu" else "triton"
        width = config.hidden_size // config.num_attention_heads
        if self._backend == "triton" and width not in HEADS:
            raise RequestError(f"disentangled-flash's kernels take heads of {', '.join(map(str, HEADS))}, not {width}")
        self._package = importlib.import_module("disentangled_flash")
        self._subject, self._batch = subject, 0
        self._model = subject.twin()
        self._package.optimize_deberta(self._model.deberta, backend=self._backend)
        encoder = self._model.deberta.encoder
        if getattr(encoder, "backend", None) != self._backend:  # without Triton it leaves Hugging Face's in place
            raise RequestError(f"disentangled-flash does not serve this model by its backend {self._backend!r} here")

    def way(self) -> str:
        return f"packed, backend {self._backend}, at most {self._batch} copies a pass, head on scored rows"

    @torch.inference_mode()
    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        self._batch = self._subject.batch or copies_a_pass(plan, self._subject.device)
        found = np.empty(len(plan.targets), np.float32)
        for padded in padded_batches(plan, self._subject.tokenizer.pad_token_id, self._batch):
            batch = padded.to(self._subject.device)
            found[batch.order] = target_logprobs(self._model, self._encode(batch), batch.targets).cpu().numpy()
        return found

    def _encode(self, batch: PaddedBatch) -> Any:
        """Hidden states of the scored rows, ``[n, d]``."""
        deberta = self._model.deberta
        embedded = deberta.embeddings(input_ids=batch.input_ids, mask=batch.attention_mask)  # [B, L, d]
        rows, cu_seqlens, info = self._package.pack_padded_with_info(embedded, batch.attention_mask)
        hidden = deberta.encoder.forward_packed(
            rows, cu_seqlens, info.max_seqlen, output_hidden_states=False, packed_info=info
        ).last_hidden_state  # [T, d]
        length = batch.input_ids.shape[1]
        starts = cu_seqlens[:-1].long()
        return hidden[starts[batch.rows // length] + batch.rows % length]
