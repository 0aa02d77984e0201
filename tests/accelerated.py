"""Models of transformers under ``mlmfast.accelerate``, and batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from checkpoints import TEXTS, long_text
from families import HOLDS
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import mlmfast
from mlmfast import backends

# A checkout without a compiled extension has no kernels here; the ops are the same.
KERNELS = all(service.backend != "reference" for service in backends.report())
BACKEND = "auto" if KERNELS else "reference"


def accelerated(model: nn.Module) -> Any:
    return mlmfast.accelerate(model, backend=BACKEND)


def batch(tokenizer: PreTrainedTokenizerBase, side: str = "right", lengths: tuple[int, ...] = (HOLDS, 9)) -> Any:
    """Texts of several lengths, masks in some."""
    texts = [*TEXTS, *(long_text(tokenizer, length) for length in lengths)]
    found = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    for line, every in ((0, 3), (1, 2), (4, 7)):
        cells = mask[line].nonzero()[1:-1:every, 0]
        ids[line, cells] = tokenizer.mask_token_id
    return found


def logprobs(logits: Tensor) -> np.ndarray:
    return logits.log_softmax(-1).numpy()
