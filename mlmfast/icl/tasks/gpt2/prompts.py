"""Requests of the GPT-2 paper's tasks, of which a template cannot say what they are."""

from __future__ import annotations

from typing import Any

from mlmfast.icl.tasks.gpt2.text import detokenised, treebank
from mlmfast.icl.tasks.prompts import winograd_choices, wrong

Row = dict[str, Any]

BLANK = "XXXXX"


def all_but_last(doc: Row, separator: str) -> str:
    """LAMBADA: the passage up to its last word."""
    return parted(doc)[0]


def last(doc: Row) -> str:
    """LAMBADA: the last word and the space before it."""
    return parted(doc)[1]


def parted(doc: Row) -> tuple[str, str]:
    text, space, word = doc["text"].rstrip().rpartition(" ")
    if not text.strip():
        raise wrong(doc, "text", "there is but one word")
    return text, space + word


def cbt_pairs(doc: Row) -> list[tuple[str, str]]:
    """Children's Book Test: a choice and the rest of its sentence, after all that stands before."""
    before, blank, after = doc["question"].partition(BLANK)
    if not blank:
        raise wrong(doc, "question", f"there is no {BLANK}")
    passage = " ".join(treebank(sentence) for sentence in doc["sentences"])
    start = treebank(before)
    pairs = []
    for choice in doc["options"]:
        sentence = treebank(f"{before} {choice} {after}")
        pairs.append((f"{passage} {start}".rstrip(), sentence[len(start) :] if start else f" {sentence}"))
    return pairs


def cbt_target(doc: Row) -> int:
    """The place of the answer among the options."""
    if doc["answer"] not in doc["options"]:
        raise wrong(doc, "answer", f"{doc['answer']!r} is none of the options")
    return doc["options"].index(doc["answer"])


def wsc_full(doc: Row) -> list[tuple[str, str]]:
    """Trinh & Le's full scoring: the whole sentence with each option."""
    return [("", text) for text in winograd_choices(doc)]


def wsc_partial(doc: Row) -> list[tuple[str, str]]:
    """Trinh & Le's partial scoring: what follows the pronoun, after the sentence with the option up to there."""
    rest = doc["text"][int(doc["pronoun_loc"]) + len(doc["pronoun"]) :]
    if not rest.strip():
        raise wrong(doc, "pronoun_loc", "nothing follows the pronoun")
    return [(text[: len(text) - len(rest)], rest) for text in winograd_choices(doc)]


def running(doc: Row) -> str:
    """A text of words between spaces as running text, line by line."""
    return "\n".join(detokenised(line.strip(" ")) for line in text_of(doc).split("\n"))


def text_of(doc: Row) -> str:
    """A row's text, whatever its data set calls it."""
    return doc["page"] if "page" in doc else doc["text"]
