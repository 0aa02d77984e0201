"""What the GPT-2 paper's tasks measure. A function has the row, the model's answer and what it should be."""

from __future__ import annotations

import math
from functools import cache
from random import Random
from typing import Any

from mlmfast.icl.tasks.gpt2.prompts import text_of
from mlmfast.icl.tasks.gpt2.text import sentences, words
from mlmfast.icl.tasks.metrics import first_line
from mlmfast.icl.tasks.rows import INDEX

Row = dict[str, Any]

ROUGES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}
# What a metric's name has after it that is of a baseline, not of the model: the report shows it in a column.
LEDE, RANDOM = "@Lede-3", "@random-3"
SUMMARY = 3


def last_word(doc: Row, answer: tuple[float, bool], gold: str) -> dict[str, float]:
    """LAMBADA: whether the word's tokens are the model's first choices, and its log-probability."""
    return {"acc": float(answer[1]), "perplexity": float(answer[0])}


def filtered(doc: Row, answer: tuple[float, bool], gold: str) -> dict[str, float]:
    return {"acc": float(answer[1])}


def perplexity(items: list[float]) -> float:
    """Of log-probabilities, each of one unit."""
    return math.exp(-sum(items) / len(items))


def by_words(doc: Row, answer: float, gold: str) -> dict[str, tuple[float, int]]:
    """The text's log-probability, to be shared among the words, and the bytes, that the original has."""
    text = text_of(doc)
    return {"word_perplexity": (answer, words(text)), "bits_per_byte": (answer, len(text.encode()))}


def by_bytes(doc: Row, answer: float, gold: str) -> dict[str, tuple[float, int]]:
    return {"bits_per_byte": (answer, len(text_of(doc).encode()))}


def by_characters(doc: Row, answer: float, gold: str) -> dict[str, tuple[float, int]]:
    return {"bits_per_character": (answer, len(text_of(doc)))}


def shared_perplexity(items: list[tuple[float, int]]) -> float:
    """Of texts and their numbers of units."""
    return math.exp(-sum(value for value, _ in items) / sum(units for _, units in items))


def bits(items: list[tuple[float, int]]) -> float:
    """Bits a unit."""
    return -sum(value for value, _ in items) / sum(units for _, units in items) / math.log(2)


def summary(doc: Row, answer: str, gold: str) -> dict[str, float]:
    """ROUGE of the answer's first three sentences, and of the article's first three and of three drawn from it."""
    article = sentences(doc["article"])
    drawn = sorted(Random(f"random-3 {doc[INDEX]}").sample(range(len(article)), min(SUMMARY, len(article))))
    lines = answer.replace("\\n", "\n").replace("\\", "")
    found = rouge(sentences(lines)[:SUMMARY], gold)
    for name, chosen in ((LEDE, article[:SUMMARY]), (RANDOM, [article[i] for i in drawn])):
        found |= {metric + name: value for metric, value in rouge(chosen, gold).items()}
    return found


def rouge(said: list[str], gold: str) -> dict[str, float]:
    """F of ROUGE-1, 2 and L (of summaries: sentence by sentence), words without their endings; their average."""
    scores = _scorer().score("\n".join(sentences(gold)), "\n".join(said))
    found = {name: float(scores[theirs].fmeasure) for name, theirs in ROUGES.items()}
    return {"rouge_avg": sum(found.values()) / len(found)} | found


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGES.values()), use_stemmer=True)


def translation(doc: Row, answer: str, gold: str) -> dict[str, tuple[str, str]]:
    """The first sentence that was generated."""
    return {"bleu": (next(iter(sentences(first_line(answer))), ""), gold)}
