"""LAMBADA's last word, where predictions that cannot be one are passed over: GPT-2's stop-word filter.

The paper says no more of its filter than that it is one. Here the model's first choice is taken among the tokens that
begin a word which is no stop word; the word's later tokens have to be first choices among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

KIND = "last_word"
# Written for this purpose: articles, pronouns, prepositions, conjunctions, auxiliaries and the commonest adverbs.
_WRITTEN = """
a an the this that these those such some any each every either neither both all no none one other another same own
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves who whom whose which what
of in on at by for with from to into onto upon about above below under over between among through during before
after against along across around behind beside beyond near off out up down within without toward towards until till
since per via
and or but nor so yet if then else than as because while although though unless whether when where why how
am is are was were be been being do does did doing done have has had having will would shall should can could may
might must ought need dare
not never ever also too very just only even still again once more most much many few less least here there now
already quite rather almost always often
s t d ll re ve m don didn doesn isn wasn weren aren hasn haven hadn won wouldn couldn shouldn
"""
STOP_WORDS = frozenset(_WRITTEN.split())
# Distributions of a masked model held at once; a causal one's batch is sized by what it computes.
TEXTS = 16


def passed_over(tokenizer: Any, size: int) -> np.ndarray:
    """Which tokens are no choice for a word's beginning, bool ``[size]``: stop words, and what begins no word.

    A word begins with a letter or a digit after a space, so a byte-level or SentencePiece token has its space in front;
    a WordPiece token begins one unless it goes on another.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    space = next((mark for mark in ("Ġ", "▁") if any(piece and piece.startswith(mark) for piece in pieces)), "")
    found = np.ones(size, bool)
    special = set(tokenizer.all_special_ids)
    for i, piece in enumerate(pieces):
        if i in special or piece is None or not piece.startswith(space):
            continue
        word = piece.removeprefix(space)
        found[i] = not word[:1].isalnum() or word.lower() in STOP_WORDS
    return found


def last_words(lm: Any, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Each (context, last word): the word's log-probability (of a masked model its PLL), and whether it is predicted.

    Args:
        lm: :class:`mlmfast.integrations.lm_eval.MLMFastLM`, or lm_eval's ``hf`` with a causal model.
        requests: with ``args`` (context, word), a space before the word.
    """
    answers = []
    find, size = (_causal, lm.batch_size) if hasattr(lm, "_encode_pair") else (_masked, TEXTS)
    ignored = None
    for start in range(0, len(requests), size):
        for logprobs, ids in find(lm, [request.args for request in requests[start : start + size]]):
            if ignored is None:
                ignored = passed_over(lm.tokenizer, logprobs.shape[1])
            answers.append(predicted(logprobs, ids, ignored))
    return answers


def predicted(logprobs: np.ndarray, ids: Sequence[int] | np.ndarray, ignored: np.ndarray) -> tuple[float, bool]:
    """Of a word's tokens, at each its distribution ``[n, V]``: the sum, and whether each is the first choice."""
    own = logprobs[np.arange(len(ids)), ids]
    choices = logprobs.copy()
    choices[0, ignored] = -np.inf
    return float(own.sum(dtype=np.float64)), bool((choices.argmax(1) == ids).all())


def _masked(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each token masked as the metric has it, the context beside it."""
    texts = [context + word for context, word in pairs]
    spans = [(len(context), None) for context, _ in pairs]
    found = lm.lm.distributions(texts, spans=spans, top_k=None, truncation="left", progress=False, **lm.masking)
    return [(one.logprobs, one.token_ids) for one in found]


@torch.inference_mode()
def _causal(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, list[int]]]:
    """Each token after all before it. Rows are padded at their ends, where no token looks."""
    rows, words = [], []
    for context, word in pairs:
        before, ids = lm._encode_pair(context, word)
        rows.append([*before, *ids][-(lm.max_length + 1) : -1])
        words.append(ids)
    padded = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long, device=lm.device)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    logits = lm._model_call(padded)
    found = []
    for i, (row, ids) in enumerate(zip(rows, words)):
        own = logits[i, len(row) - len(ids) : len(row)].float().log_softmax(-1)
        found.append((own.cpu().numpy(), ids))
    return found
