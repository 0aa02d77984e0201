"""``score()`` of bert-in-context (Samuel 2024, arXiv 2406.04823) on mlmfast.

There it is remote code of ``ltg/deberta-*-fixed``. Load those by name, ``mlmfast.load("ltg/deberta-base-fixed")``: its
clamped distances and its mask decoder are ``semantics="trained"``, the default for names. Remote code never runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlmfast.errors import RequestError, TextError
from mlmfast.integrations.masked_rows import loaded
from mlmfast.masking import OBJECTIVES, TokenSequence, make_plan

MASKS = 3  # the token and the two after it: table 6 of the paper


def score(
    model: Any, text: str, score_length_in_words: int, tokenizer: Any = None, device: Any = None, batch_size: int = 8
) -> float:
    """The PLL, in nats, of a text's last words, two more tokens masked to the right of each scored one.

    Args:
        model: from :func:`mlmfast.load`, or a live Hugging Face model.
        text: a whole prompt with its answer.
        score_length_in_words: how many words at the end are scored, as the tokenizer counts words (DeBERTa-v2's: by
            white space); more than there are means all.
        tokenizer: of a live model; otherwise the model's own is used.
        device, batch_size: mean nothing here: the model stays where it is, batches follow its token budget.

    Raises:
        RequestError: the tokenizer does not tell words, or the length is negative.
        TextError: the text is longer than the model holds.
    """
    lm = loaded(model, tokenizer)
    tokenizer = lm.tokenizer
    if not tokenizer.is_fast:
        raise RequestError(f"{lm.name}: score() counts words, and a slow tokenizer does not tell them; load a fast one")
    if score_length_in_words < 0:
        raise RequestError(f"score_length_in_words={score_length_in_words} is negative")
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    ids = np.array([tokenizer.cls_token_id, *encoding["input_ids"], tokenizer.sep_token_id], np.int64)
    words = [-1 if word is None else word for word in encoding.word_ids()]
    if lm.max_length is not None and len(ids) > lm.max_length:
        raise TextError(0, f"has {len(ids)} tokens; {lm.name} holds {lm.max_length}: shorten it")
    first = max(words, default=-1) + 1 - score_length_in_words
    scored = np.array([False, *(word >= max(0, first) for word in words), False])
    special = np.zeros(len(ids), bool)
    special[[0, -1]] = True
    plan = make_plan(
        [TokenSequence(ids, special, scored)],
        tokenizer.mask_token_id,
        "window",
        window=MASKS,
        lookback=OBJECTIVES[lm.objective],
    )
    return float(lm.logprobs(plan).sum(dtype=np.float64))
