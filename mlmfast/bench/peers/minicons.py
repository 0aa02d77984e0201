"""minicons' own scorer (Misra 2022, arXiv 2203.13112)."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import numpy as np
from transformers import BatchEncoding

from mlmfast.bench.peers.subject import Subject
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan


class Minicons:
    """``minicons.scorer.MaskedLMScorer`` on a text at a time: it puts all copies of a text into one pass, whatever
    their number, with the logits of every position.

    Masking, padding, the pass and the log-softmax are minicons'; it is given token ids in place of text, as its
    ``prepare_text`` allows. It knows one mask a copy. Its log-softmax is in the model's dtype.
    """

    name: ClassVar[str] = "minicons"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ("minicons",)
    rounds: ClassVar[bool] = True

    def __init__(self, subject: Subject) -> None:
        self.scorer = repaired_scorer(subject.model, subject.tokenizer, str(subject.device))

    def way(self) -> str:
        return "all copies of a text a pass"

    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        ranges = _ranges(plan)
        found = np.empty(len(plan.targets), np.float32)
        for text, (ids, (start, end)) in enumerate(zip(plan.sequences, ranges)):
            if start < end:
                encoded = BatchEncoding({"input_ids": [ids], "attention_mask": [np.ones_like(ids)]})
                copies = self.scorer.get_masked_tensors(encoded, "original", [start], [end])
                (scores,) = self.scorer.compute_stats(copies, return_tensors=True)
                found[plan.score_offsets[text] : plan.score_offsets[text + 1]] = scores.cpu().numpy()
        return found


def _ranges(plan: MaskPlan) -> list[tuple[int, int]]:
    """From where to where each text is scored, ``(0, 0)`` where it is not."""
    if len(plan.masked_positions) != plan.copies or not np.array_equal(plan.masked_positions, plan.score_positions):
        raise RequestError("minicons is given plans of metric 'original' only: a copy a token, one mask a copy")
    ranges = []
    for first, last in zip(plan.score_offsets, plan.score_offsets[1:]):
        positions = plan.score_positions[first:last]
        ranges.append((int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0))
        if ranges[-1][1] - ranges[-1][0] != len(positions):
            raise RequestError("minicons scores one run of tokens a text, and this plan has gaps")
    return ranges


def repaired_scorer(model: Any, tokenizer: Any, device: str = "cpu") -> Any:
    """A ``MaskedLMScorer`` that runs on transformers 5.

    minicons 0.3.39 encodes texts by ``tokenizer.batch_encode_plus``, which transformers 5 has taken away; calling the
    tokenizer is the same. Nothing else is changed.
    """
    scorer = importlib.import_module("minicons.scorer")

    class Repaired(scorer.MaskedLMScorer):  # type: ignore[name-defined]
        def encode(self, text: Any, manual_special: bool = True, return_tensors: str | None = "pt") -> Any:
            if manual_special or hasattr(self.tokenizer, "batch_encode_plus"):
                return super().encode(text, manual_special, return_tensors)
            texts = [text] if isinstance(text, str) else text
            return self.tokenizer(texts, padding="longest", return_attention_mask=True)

    return Repaired(model, device, tokenizer=tokenizer)
