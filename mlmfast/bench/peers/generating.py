"""What generation is compared with: the loop that users write over a Hugging Face model, and a causal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mlmfast.bench.peers.subject import Served, Subject


class GeneratingPeer(Served, Protocol):
    """Another way to generate, greedily.

    Attributes:
        same_model: whether it computes the same predictions, so that they must agree.
    """

    same_model: ClassVar[bool]

    def __init__(self, subject: Subject, *, num_masks: int, longest: int) -> None:
        """``longest`` is the longest text that there will be, new tokens included and no special ones."""
        ...

    def way(self) -> str:
        """What it does, for readers of a result."""
        ...


class HuggingFaceLoop:
    """``[CLS] prompt generated [MASK]*n [SEP]`` through the model with eager attention, all logits as the model gives
    them, the best token at the first mask; everything again for the next token.
    """

    name: ClassVar[str] = "hf-loop"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ()
    same_model: ClassVar[bool] = True

    def __init__(self, subject: Subject, *, num_masks: int, longest: int) -> None:
        self.model = subject.model
        self.device = subject.device
        tokenizer: Any = subject.tokenizer
        self._before = [tokenizer.cls_token_id]
        self._after = [tokenizer.mask_token_id] * num_masks + [tokenizer.sep_token_id]

    def way(self) -> str:
        return "a whole pass a token, logits of every position"

    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits ``[V]`` of the token after ``ids``."""
        whole = torch.tensor([[*self._before, *ids, *self._after]], device=self.device)
        logits = self.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits  # [1, L, V]
        first: Tensor = logits[0, len(self._before) + len(ids)]
        return first

    @torch.inference_mode()
    def choose(self, prefixes: Sequence[Sequence[int]]) -> list[int]:
        """The next token after each prefix, a step each."""
        return [int(self.step(prefix).argmax()) for prefix in prefixes]

    @torch.inference_mode()
    def judge(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> tuple[np.ndarray, ...]:
        """After each prefix: log-probability of the token, float32 ``[N]``; of the best, the same; which that is."""
        rows = [self.step(prefix).float().log_softmax(0) for prefix in prefixes]
        given = [float(row[token]) for row, token in zip(rows, tokens)]
        best = [float(row.max()) for row in rows]
        return np.array(given, np.float32), np.array(best, np.float32), np.array([int(row.argmax()) for row in rows])


class CausalGPT2:
    """transformers' GPT-2, layers, width, heads and vocabulary those of the masked model: its own ``generate``, greedy,
    with its cache and the attention that it chooses itself (SDPA), as people get it.

    Its weights are random and its own: it generates other tokens.
    """

    name: ClassVar[str] = "gpt2"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ()
    same_model: ClassVar[bool] = False

    def __init__(self, subject: Subject, *, num_masks: int, longest: int) -> None:
        theirs = subject.model.config
        config = GPT2Config(
            vocab_size=theirs.vocab_size,
            n_positions=max(theirs.max_position_embeddings, longest),
            n_embd=theirs.hidden_size,
            n_layer=theirs.num_hidden_layers,
            n_head=theirs.num_attention_heads,
            n_inner=theirs.intermediate_size,
            bos_token_id=None,
            eos_token_id=None,  # nothing ends a text before its time
            pad_token_id=0,
        )
        torch.manual_seed(0)
        with torch.device(subject.device):
            self.model: Any = GPT2LMHeadModel(config)
        self.model = self.model.to(subject.model.dtype).eval()

    def way(self) -> str:
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        return f"{millions:.0f}M parameters, its own generate with its cache"

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The new tokens."""
        given = torch.tensor([list(ids)], device=self.model.device)
        mask = torch.ones_like(given)
        whole = self.model.generate(
            given, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0
        )
        found: list[int] = whole[0, len(ids) :].tolist()
        return found


GENERATING: dict[str, type[GeneratingPeer]] = {"hf": HuggingFaceLoop, "gpt2": CausalGPT2}
