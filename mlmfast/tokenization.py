"""Text -> token ids with what scoring needs to know of each: special or not, its word, its place in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlmfast.errors import CheckpointError, RequestError, TextError
from mlmfast.masking import TokenSequence

TRUNCATIONS = (None, "right", "left")


@dataclass(frozen=True, eq=False)
class EncodedText:
    """One text as the model will read it.

    Attributes:
        text: as given.
        sequence: ids, special and scored positions, words.
        offsets: int64 ``[L, 2]``, each token's characters in the text; None from a slow tokenizer.
        truncated: tokens cut to fit the model.
    """

    text: str
    sequence: TokenSequence
    offsets: np.ndarray | None
    truncated: int


class TextEncoder:
    """A tokenizer with the model's limits.

    Args:
        tokenizer: a transformers tokenizer; a fast one also tells words and offsets.
        name: the model's, for messages.
        max_length: longest sequence the model holds, special tokens included; None for no limit.
        vocab_size: rows of the embedding table.
        lookback: how many positions left of a token its prediction is read.

    Raises:
        CheckpointError: the tokenizer has no mask token, so nothing can be masked.
    """

    def __init__(self, tokenizer: Any, name: str, max_length: int | None, vocab_size: int, lookback: int = 0) -> None:
        if tokenizer.mask_token_id is None:
            raise CheckpointError(
                f"{name}: its tokenizer has no mask token, so nothing can be masked; load the tokenizer that the "
                "model was trained with, or set tokenizer.mask_token"
            )
        self.tokenizer = tokenizer
        self.name = name
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.lookback = lookback
        self.mask_token_id = int(tokenizer.mask_token_id)
        roles = ("cls_token_id", "sep_token_id", "pad_token_id", "mask_token_id", "bos_token_id", "eos_token_id")
        # An unknown word is a word; only a tokenizer that uses the same token as, say, its separator hides it.
        unknown = {tokenizer.unk_token_id} - {getattr(tokenizer, role) for role in roles}
        self.special_ids = np.array(sorted(set(tokenizer.all_special_ids) - unknown), np.int64)

    def encode(
        self,
        texts: Sequence[str],
        spans: Sequence[tuple[int, int | None] | None] | None = None,
        truncation: str | None = None,
        scores_masks: bool = False,
    ) -> list[EncodedText | TextError]:
        """Tokenises texts, special tokens added.

        Args:
            texts: what to read.
            spans: for each text the characters ``(start, end)`` whose tokens are scored, or None for all of them. A
                token is scored if it ends beyond ``start`` and begins before ``end``; an ``end`` of None is open, one
                beyond the text an error.
            truncation: which end loses tokens of a text that is too long; None refuses it.
            scores_masks: score the masks that stand in the text, and nothing else.

        Returns:
            For each text its encoding, or the error that keeps it from being scored.
        """
        if truncation not in TRUNCATIONS:
            raise RequestError(f"truncation={truncation!r} is not known; choose 'right', 'left' or None")
        if spans is not None:
            _check_spans(spans, len(texts))
        if spans is not None and not self.tokenizer.is_fast and any(span is not None for span in spans):
            raise RequestError(
                f"{self.name}: spans and continuations need each token's place in the text, and this tokenizer does "
                "not tell (a slow tokenizer); load a fast one"
            )
        faults = [_fault(text, None if spans is None else spans[i]) for i, text in enumerate(texts)]
        good = [text for text, fault in zip(texts, faults) if fault is None]
        encodings = self._tokenise(good)
        results: list[EncodedText | TextError] = []
        taken = 0
        for i, (text, fault) in enumerate(zip(texts, faults)):
            span = None if spans is None else spans[i]
            outcome: EncodedText | str
            if fault is None:
                outcome = self._encoded(text, encodings, taken, span, truncation, scores_masks)
                taken += 1
            else:
                outcome = fault
            results.append(TextError(i, outcome) if isinstance(outcome, str) else outcome)
        return results

    def surroundings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special tokens that the tokenizer puts before and after a text."""
        inside = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = [i for i in range(len(whole) + 1) if whole[i : i + len(inside)] == inside]
        if not starts:
            raise CheckpointError(f"{self.name}: its tokenizer reads a text otherwise beside its special tokens")
        before = starts[0]
        return tuple(whole[:before]), tuple(whole[before + len(inside) :])

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int] | TextError]:
        """Token ids of prompts, no special tokens around them; an empty prompt has none.

        Returns:
            For each prompt its ids, or the error that keeps it from being continued.
        """
        faults = [_fault(prompt) for prompt in prompts]
        good = [prompt for prompt, fault in zip(prompts, faults) if fault is None]
        tokenised = iter(
            self.tokenizer(good, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            if good
            else []
        )
        found: list[list[int] | TextError] = []
        for i, fault in enumerate(faults):
            ids = next(tokenised) if fault is None else []
            if ids and max(ids) >= self.vocab_size:
                fault = self._not_embedded(max(ids))
            found.append(ids if fault is None else TextError(i, fault))
        return found

    def _not_embedded(self, token_id: int) -> str:
        culprit = self.tokenizer.convert_ids_to_tokens(token_id)
        return (
            f"has the token {culprit!r} (id {token_id}), but {self.name} embeds {self.vocab_size}: "
            "the tokenizer is not this model's, or the model needs resize_token_embeddings"
        )

    def _tokenise(self, texts: list[str]) -> Any:
        if not texts:
            return None
        return self.tokenizer(
            texts,
            add_special_tokens=True,
            return_special_tokens_mask=True,
            return_offsets_mapping=self.tokenizer.is_fast,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _encoded(
        self,
        text: str,
        encodings: Any,
        i: int,
        span: tuple[int, int | None] | None,
        truncation: str | None,
        scores_masks: bool,
    ) -> EncodedText | str:
        token_ids = np.array(encodings["input_ids"][i], np.int64)
        added = np.array(encodings["special_tokens_mask"][i], bool)
        offsets = word_ids = None
        if self.tokenizer.is_fast:
            offsets = np.array(encodings["offset_mapping"][i], np.int64).reshape(-1, 2)
            word_ids = np.array([-1 if w is None else w for w in encodings.word_ids(i)], np.int64)
        excess = 0 if self.max_length is None else max(0, len(token_ids) - self.max_length)
        if excess:
            if truncation is None:
                return (
                    f"has {len(token_ids)} tokens; {self.name} holds {self.max_length}: "
                    'pass truncation="right" or split it'
                )
            content = np.flatnonzero(~added)
            keep = np.ones(len(token_ids), bool)
            keep[content[-excess:] if truncation == "right" else content[:excess]] = False
            token_ids = token_ids[keep]
            offsets = None if offsets is None else offsets[keep]
            word_ids = None if word_ids is None else word_ids[keep]
        if len(token_ids) and token_ids.max() >= self.vocab_size:
            return self._not_embedded(int(token_ids.max()))
        special = np.isin(token_ids, self.special_ids)
        if scores_masks:
            scored = token_ids == self.mask_token_id
            special = special & ~scored
            if not scored.any():
                return f"has no mask to fill; write {self.tokenizer.mask_token} where the word is wanted"
        else:
            scored = ~special
            if not scored.any():
                return "has no token to score: it is empty or only white space and special tokens"
        if span is not None:
            assert offsets is not None
            scored &= _inside(offsets, span)
            if not scored.any():
                cut = " (after truncation)" if excess else ""
                end = "the end" if span[1] is None else span[1]
                return f"has no token to score within characters {span[0]} to {end}{cut}"
        if scored[: self.lookback].any():
            return (
                f"begins with the token {self.tokenizer.convert_ids_to_tokens(int(token_ids[0]))!r}, and with "
                "objective='mntp' a token is predicted at the one before it; load a tokenizer that puts a special "
                "token before a text"
            )
        return EncodedText(text, TokenSequence(token_ids, special, scored, word_ids), offsets, excess)


def _inside(offsets: np.ndarray, span: tuple[int, int | None]) -> np.ndarray:
    """bool ``[L]``: which tokens a span of characters scores."""
    start, end = span
    # From the very start and to an open end every token counts, even a piece of white space that covers no character.
    beyond = np.ones(len(offsets), bool) if start <= 0 else offsets[:, 1] > start
    if end is None:
        return beyond
    return beyond & (offsets[:, 0] < end) & (start < end)


def _check_spans(spans: Sequence[Any], texts: int) -> None:
    if len(spans) != texts:
        raise RequestError(f"{len(spans)} spans were given for {texts} texts")
    for i, span in enumerate(spans):
        if span is None:
            continue
        bounds = list(span) if isinstance(span, (tuple, list)) else []
        whole = [isinstance(bound, (int, np.integer)) for bound in bounds]
        if whole != [True, True] and not (whole == [True, False] and bounds[1] is None):
            raise RequestError(f"span {i} is {span!r}; it should be (start, end) in characters, or None for the text")
        if bounds[0] < 0:
            raise RequestError(f"span {i} is {span!r}; characters are counted from 0, not from the end")


def _fault(text: object, span: tuple[int, int | None] | None = None) -> str | None:
    """Why this is not a text that a tokenizer can read, or not one that the span is of; None if it is."""
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, not a string"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate at character {error.start}, which is no text; remove it"
    if span is not None and span[1] is not None and span[1] > len(text):
        return (
            f"has {len(text)} characters, and its span ({span[0]}, {span[1]}) reaches past them; end it at {len(text)} "
            "or at None"
        )
    return None
