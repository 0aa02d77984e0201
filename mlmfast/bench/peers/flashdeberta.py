"""FlashDeBERTa's Triton kernels for DeBERTa-v2/v3 (Knowledgator, Apache-2.0), its head on the scored rows."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import numpy as np
import torch

from mlmfast.bench.peers.scored import copies_a_pass, plain_logprobs
from mlmfast.bench.peers.subject import Subject, copy_lengths
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan


class FlashDeBERTa:
    """Hugging Face's encoder with ``flashdeberta.model.FlashDisentangledSelfAttention`` in every layer: what
    ``FlashDebertaV2Model`` computes, on weights that are shared. The attention class has no parameters of its own, so
    that a layer of a twin becomes one by its class alone.

    Not its ``FlashDebertaV2ForMaskedLM``, whose decoder transformers 5 leaves untied. Copies of equal lengths only: its
    kernel for others mirrors the positions. It asks the device in each layer whether a mask has gaps, as its own model
    does. In float32 its kernel would multiply in TF32; here Triton is told not to, as all sides compute in float32.

    Run so far: version 0.0.8 with the kernel that serves equal lengths in Triton 3.9's interpreter, float32, toy shapes
    of 9 to 150 tokens, within 2e-6 of Hugging Face; the same kernel compiled for sm_90. Not run so far: bfloat16, and
    anything on a GPU.
    """

    name: ClassVar[str] = "flashdeberta"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    packages: ClassVar[tuple[str, ...]] = ("flashdeberta", "einops")
    rounds: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        family = subject.model.config.model_type
        if family != "deberta-v2":
            raise RequestError(f"flashdeberta computes DeBERTa-v2 and v3, not {family}")
        attention = importlib.import_module("flashdeberta.model").FlashDisentangledSelfAttention
        self._knobs = importlib.import_module("triton.knobs").language
        self._subject, self._batch = subject, 0
        self._model: Any = subject.twin()
        for layer in self._model.deberta.encoder.layer:
            layer.attention.self.__class__ = attention

    def way(self) -> str:
        return f"at most {self._batch} copies a pass, head on scored rows"

    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        lengths = copy_lengths(plan)
        if lengths.min() != lengths.max():
            raise RequestError(
                f"flashdeberta is given copies of one length only, not of {lengths.min()} to {lengths.max()} tokens: "
                "its kernel for mixed lengths mirrors the positions"
            )
        self._batch = self._subject.batch or copies_a_pass(plan, self._subject.device)
        with self._knobs.scope(), torch.inference_mode():
            self._knobs.fp32_default = "ieee"
            return plain_logprobs(self._model, plan, self._subject.tokenizer.pad_token_id, self._batch)
