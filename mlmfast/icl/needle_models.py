"""Who is asked for the needle: a masked model through mlmfast, or a causal one through transformers' ``generate``.

Both choose greedily, digits only, and are given the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

import mlmfast
from mlmfast.errors import RequestError
from mlmfast.icl.checkpoints import kind_of, load_causal, split
from mlmfast.icl.digits import DigitsOnly, DigitsWritten, digit_counts
from mlmfast.icl.needle import DIGITS
from mlmfast.identity import digest
from mlmfast.model import MaskedLM
from mlmfast.tokenization import TextEncoder


class Asked(Protocol):
    """A model that continues prompts by digits.

    Attributes:
        name: as it was asked for.
        kind: ``"masked"`` or ``"causal"``.
        tokenizer: its own.
        beside: tokens that it has to hold beside a prompt: special ones, masks, and a token for each digit.
        limit: the longest ``length`` that it can be asked for; None where only memory limits it.
        settings: all that decides its answers, for the record.
        note: what is to be said of its results, such as that they are approximate; may be empty.
    """

    name: str
    kind: str
    tokenizer: Any
    beside: int
    limit: int | None
    settings: dict[str, Any]
    note: str

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """The digits that the model continues each prompt with."""

    def truncated(self, tokens: int) -> int:
        """How many tokens are cut off the beginning of a prompt that counts as ``tokens``."""


def count(asked: Asked, prompt: str) -> int:
    """The length of a prompt: its tokens, special ones, masks, and a token for each digit."""
    return asked.beside + len(asked.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])


class Masked:
    """A masked model, asked by :meth:`mlmfast.model.MaskedLM.generate`.

    Args:
        lm: the model.
        num_masks: appended at each step.
        cache: ``"none"`` (exact) or ``"window"`` (approximate).
    """

    kind = "masked"

    def __init__(self, lm: MaskedLM, *, num_masks: int = 3, cache: str = "none") -> None:
        self.lm = lm
        self.name = lm.name
        self.tokenizer = lm.tokenizer
        self.counts = digit_counts(lm.tokenizer)
        before, after = TextEncoder(lm.tokenizer, lm.name, None, lm.vocab_size, 0).surroundings()
        self.beside = len(before) + len(after) + num_masks + DIGITS
        self.limit = lm.max_length
        self.options: dict[str, Any] = {"num_masks": num_masks, "cache": cache}
        self.settings = {"kind": self.kind, "weights": digest(lm.model, lm.tokenizer, lm.extras)}
        self.settings |= {"dtype": _name(lm.dtype), "semantics": lm.semantics, "objective": lm.objective}
        self.settings |= self.options
        notes = ["approximate: cache window"] if cache != "none" else []
        self.note = "; ".join(notes + (["generic: its own code, not mlmfast's kernels"] if lm.generic else []))

    def answers(self, prompts: Sequence[str]) -> list[str]:
        found = self.lm.generate(
            list(prompts),
            max_new_tokens=DIGITS,
            logits_processor=[DigitsOnly(self.counts)],
            stopping_criteria=[DigitsWritten(self.counts, DIGITS)],
            eos_token_id=[],
            progress=False,
            **self.options,
        )
        if any(generation.stopped == "interrupted" for generation in found):
            raise KeyboardInterrupt
        return [_digits(generation.text) for generation in found]

    def truncated(self, tokens: int) -> int:
        return 0


class Causal:
    """A causal model, asked by transformers' own ``generate``; prompts that are too long lose their beginning.

    Args:
        model: any ``AutoModelForCausalLM``.
        tokenizer: its own.
        name: for records and errors.
    """

    kind = "causal"
    note = ""
    limit: int | None = None  # what is too long is cut, as in the paper

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.counts = digit_counts(tokenizer)
        # Only what stands before a text: an end of sequence after it would end the prompt.
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        self.before: list[int] = whole[: starts[0]] if starts else []
        self.beside = len(self.before) + DIGITS
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        if self.context is not None and self.context <= self.beside:
            raise RequestError(f"{name} holds {self.context} tokens, no room for a prompt")
        self.settings: dict[str, Any] = {"kind": self.kind, "weights": digest(model, tokenizer)}
        self.settings |= {"dtype": _name(next(model.parameters()).dtype)}
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        # generate() takes what is not asked for from here, and a checkpoint may want sampling or penalties.
        model.generation_config = GenerationConfig(max_new_tokens=DIGITS, do_sample=False, pad_token_id=self.pad)

    def answers(self, prompts: Sequence[str]) -> list[str]:
        rows = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
        rows = [self.before + ids[self.truncated(len(ids) + self.beside) :] for ids in rows]
        width = max(map(len, rows))
        device = next(self.model.parameters()).device
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(rows):  # padding goes before a prompt, so that all are continued at the same place
            ids[row, width - len(own) :] = torch.tensor(own)
            mask[row, width - len(own) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=LogitsProcessorList([DigitsOnly(self.counts)]),
                stopping_criteria=StoppingCriteriaList([DigitsWritten(self.counts, DIGITS)]),
            )
        return [_digits(text) for text in self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]

    def truncated(self, tokens: int) -> int:
        return 0 if self.context is None else max(tokens - self.context, 0)


def load_asked(spec: str, *, num_masks: int, cache: str, loading: dict[str, Any]) -> Asked:
    """A model by name or folder, of the kind that stands before it or that its config says.

    Args:
        spec: ``"tiny"``, a folder or a Hub name, perhaps after ``masked:`` or ``causal:``.
        num_masks, cache: of a masked model.
        loading: arguments of :func:`mlmfast.load`; a causal model heeds :func:`load_causal`'s.

    Raises:
        MLMFastError: as :func:`mlmfast.load` does.
    """
    kind, name = split(spec)
    if (kind or kind_of(name, loading.get("revision"))) == "masked":
        return Masked(mlmfast.load(name, **loading), num_masks=num_masks, cache=cache)
    heeded = ("dtype", "device", "revision", "allow_random_head")
    return Causal(*load_causal(name, **{key: loading[key] for key in heeded if key in loading}), name)


def _digits(text: str) -> str:
    """The first digits of an answer; WordPiece writes spaces between them."""
    return "".join(letter for letter in text if letter.isdigit())[:DIGITS]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
