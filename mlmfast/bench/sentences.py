"""Real sentences for benchmarks: some of a file's, spread evenly over it, and as the tokens of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

import mlmfast
from mlmfast.bench.shapes import Shape
from mlmfast.errors import RequestError
from mlmfast.masking import TokenSequence
from mlmfast.readers import read_rows


def read_sentences(source: str, *, field: str = "text", count: int | None = None) -> list[str]:
    """Distinct texts of a file that :func:`mlmfast.readers.read_rows` reads, ``count`` of them spread evenly over it.

    Spread, because such files are often sorted by kind.

    Raises:
        RequestError: the file cannot be read, or holds fewer.
    """
    texts = list(dict.fromkeys(row.text for row in read_rows(source, field=field) if row.text and row.text.strip()))
    if count is None:
        count = len(texts)
    if not 1 <= count <= len(texts):
        raise RequestError(f"{source} holds {len(texts)} different texts; {count} cannot be taken of it")
    return [texts[place] for place in np.linspace(0, len(texts) - 1, count).round().astype(int)]


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    """The bundled model's."""
    return mlmfast.load("tiny").tokenizer


def token_sequences(shape: Shape, texts: Sequence[str]) -> list[TokenSequence]:
    """Sentences as a shape's tokens: cut by the bundled tokenizer, between the shape's own special tokens.

    A piece keeps its id, moved past the shape's special tokens; a vocabulary smaller than the tokenizer's is wrapped
    around.

    Raises:
        RequestError: a sentence is too long for the shape, or empty.
    """
    if not texts:
        return []
    tokenizer = tiny_tokenizer()
    theirs, ours = len(tokenizer.all_special_ids), len(shape.special)
    first, last = (list(shape.special).index(role) for role in ("cls_token", "sep_token"))
    sequences = []
    for text, ids in zip(texts, tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        if not 1 <= len(ids) <= shape.max_length - 2:
            raise RequestError(f"{text[:60]!r} has {len(ids)} tokens; this shape takes 1 to {shape.max_length - 2}")
        # Unknown words are the one special token that a text can have, and are scored: any word stands for them.
        words = ours + np.maximum(0, np.array(ids, np.int64) - theirs) % (shape.settings["vocab_size"] - ours)
        special = np.zeros(len(words) + 2, bool)
        special[[0, -1]] = True
        sequences.append(TokenSequence(np.concatenate([[first], words, [last]]), special, ~special))
    return sequences
