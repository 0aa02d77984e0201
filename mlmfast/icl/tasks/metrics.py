"""What an answer is worth, task by task: the paper's metrics, which are GPT-3's.

A function that takes a row has ``choices``, the place ``best`` of the candidate that won and the place ``gold`` of the
right one; or the text ``answer`` that was generated and what it should be. Those that take ``items`` make one number of
the values of all rows.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from typing import Any

Row = dict[str, Any]


def accuracy(doc: Row, choices: list[str], best: int, gold: int) -> dict[str, float]:
    """Whether the best candidate is the right one."""
    return {"acc": float(best == gold)}


def commitment(doc: Row, choices: list[str], best: int, gold: int) -> dict[str, Any]:
    """CB: accuracy, and F1 averaged over the classes."""
    return {"acc": float(best == gold), "f1": (gold, best)}


def macro_f1(items: list[tuple[int, int]]) -> float:
    """The mean over classes of each one's F1; of classes that are there or were answered."""
    classes = {label for pair in items for label in pair}
    return sum(f1([(gold == one, best == one) for gold, best in items]) for one in classes) / len(classes)


def f1(pairs: list[tuple[bool, bool]]) -> float:
    """F1 of what is true and what was said to be; 0 where nothing is right."""
    right = sum(gold and best for gold, best in pairs)
    return 2 * right / max(1, sum(gold for gold, _ in pairs) + sum(best for _, best in pairs))


def multirc(doc: Row, choices: list[str], best: int, gold: int) -> dict[str, Any]:
    """MultiRC: of questions, all of whose answers are judged rightly; and F1 over all answers."""
    return {"exact_match": ((doc["paragraph"], doc["question"]), best == gold), "f1": (gold == 1, best == 1)}


def all_right(items: list[tuple[Any, bool]]) -> float:
    """The share of questions of which every item is right."""
    questions: dict[Any, bool] = defaultdict(lambda: True)
    for question, right in items:
        questions[question] &= right
    return sum(questions.values()) / len(questions)


def binary_f1(items: list[tuple[bool, bool]]) -> float:
    return f1(items)


def record(doc: Row, choices: list[str], best: int, gold: int) -> dict[str, float]:
    """ReCoRD: the best over the right answers of equality and of the F1 of words."""
    entity = list(dict.fromkeys(doc["entities"]))[best]
    return {
        "exact_match": float(any(normalised(entity) == normalised(answer) for answer in doc["answers"])),
        "f1": max(word_f1(entity, answer) for answer in doc["answers"]),
    }


def coreference(doc: Row, choices: list[str], best: int, gold: int) -> dict[str, float]:
    """WSC: whether the pronoun was found to refer to the noun phrase asked about just where it does."""
    return {"acc": float((best == gold) == (doc["label"] == 1))}


def closed_book(doc: Row, answer: str, gold: list[str]) -> dict[str, float]:
    """Whether the answer's first line is one of the aliases, articles, punctuation and capitals aside."""
    said = normalised(first_line(answer))
    return {"exact_match": float(any(said == normalised(alias) for alias in gold))}


def translation(doc: Row, answer: str, gold: str) -> dict[str, tuple[str, str]]:
    return {"bleu": (first_line(answer), gold)}


def bleu(items: list[tuple[str, str]]) -> float:
    """SacreBLEU, 0 to 100: BLEU+case.mixed+numrefs.1+smooth.exp+tok.intl."""
    from sacrebleu import corpus_bleu

    answers, references = zip(*items)
    return corpus_bleu(list(answers), [list(references)], tokenize="intl", lowercase=False, smooth_method="exp").score


def first_line(text: str) -> str:
    r"""A generated text up to its end of line, be it real or a written ``\n``, without backslashes."""
    lines = text.replace("\\n", "\n").replace("\\", "").strip().split("\n")
    return lines[0].strip()


def normalised(text: str) -> str:
    """As SQuAD's script compares: small letters, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(answer: str, reference: str) -> float:
    said, wanted = normalised(answer).split(), normalised(reference).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / max(1, len(said) + len(wanted))
