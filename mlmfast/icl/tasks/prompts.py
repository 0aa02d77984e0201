"""What a template cannot say of a prompt, a candidate or a label. The tasks' files name these functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mlmfast.errors import RequestError
from mlmfast.icl.tasks.rows import INDEX, Rows

Row = dict[str, Any]

LINKS = {"cause": "because", "effect": "therefore"}
ARTICLES = ("a", "an", "the")
POSSESSIVES = ("my", "your", "his", "her", "its", "our", "their")


def copa_text(doc: Row, separator: str) -> str:
    """The premise without its full stop, and the word that the question asks for."""
    if doc["question"] not in LINKS:
        raise wrong(doc, "question", f"{doc['question']!r} is neither cause nor effect")
    return f"{doc['premise'].strip().removesuffix('.')} {LINKS[doc['question']]}"


def copa_choices(doc: Row) -> list[str]:
    """As they go on after that word: the first letter small."""
    return [choice[:1].lower() + choice[1:] for choice in (doc["choice1"].strip(), doc["choice2"].strip())]


def multirc_choices(doc: Row) -> list[str]:
    """Each answer is judged alone."""
    return [f"[{judgement}] {doc['answer']}" for judgement in ("False", "True")]


def record_text(doc: Row, separator: str) -> str:
    """The passage with its highlights as points of a list, to which the query will be one more."""
    passage = re.sub(r"\s*@highlight\s*", lambda _: separator + "- ", doc["passage"].strip())
    return f"{passage}{separator}-"


def entities(doc: Row) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(doc["entities"]))


def record_choices(doc: Row) -> list[str]:
    """The query with each of the passage's entities."""
    if "@placeholder" not in doc["query"]:
        raise wrong(doc, "query", "there is no @placeholder")
    return [doc["query"].replace("@placeholder", entity) for entity in entities(doc)]


def record_target(doc: Row) -> int:
    """The first entity that is an answer; there may be others."""
    found = [i for i, entity in enumerate(entities(doc)) if entity in doc["answers"]]
    if not found:
        raise wrong(doc, "answers", "none of them is among the entities")
    return found[0]


def wsc_text(doc: Row, separator: str) -> str:
    """The passage with the pronoun in asterisks, and the question."""
    words, place, pronoun = doc["text"].split(), int(doc["span2_index"]), doc["span2_text"]
    if place >= len(words) or pronoun.casefold() not in words[place].casefold():
        raise wrong(doc, "span2_index", f"there is no {pronoun!r} at word {place}")
    words[place] = re.sub(re.escape(pronoun), lambda found: f"*{found[0]}*", words[place], count=1, flags=re.IGNORECASE)
    return (
        f"Passage: {' '.join(words)}{separator}"
        f"Question: In the passage above, what does the pronoun '*{pronoun}*' refer to?{separator}answer:"
    )


def wsc_choices(doc: Row) -> list[str]:
    """The noun phrases of the row, and the one that is asked about, each once."""
    found = (phrase.strip() for phrase in [*doc.get("candidates", []), doc["span1_text"]])
    return list({phrase.casefold(): phrase for phrase in found}.values())


def wsc_target(doc: Row) -> int:
    """The noun phrase that is asked about."""
    asked = doc["span1_text"].strip().casefold()
    return [phrase.casefold() for phrase in wsc_choices(doc)].index(asked)


def positives(rows: Iterable[Row]) -> Rows:
    """Rows whose noun phrase is what the pronoun refers to: the others do not know the answer."""
    kept = [row for row in rows if row["label"] == 1]
    return Rows(kept, kept[0] if kept else [])


def winograd_choices(doc: Row) -> list[str]:
    """The sentence with each option for the pronoun.

    An article is small but at the beginning, and an option for a possessive takes 's.
    """
    text, start, pronoun = doc["text"], int(doc["pronoun_loc"]), doc["pronoun"]
    end = start + len(pronoun)
    if text[start:end] != pronoun:
        raise wrong(doc, "pronoun_loc", f"there is no {pronoun!r} at character {start}")

    def fitting(option: str) -> str:
        first, _, rest = option.partition(" ")
        if start > 0 and first.lower() in ARTICLES:
            option = f"{first.lower()} {rest}"
        return option + ("'s" if pronoun.lower() in POSSESSIVES and not option.endswith("'s") else "")

    return [text[:start] + fitting(option.strip()) + text[end:] for option in doc["options"]]


def with_full_stops(doc: Row) -> list[str]:
    """Answers as ends of sentences."""
    return [answer if answer.endswith(".") else answer + "." for answer in map(str.strip, doc["choices"]["text"])]


def lettered(doc: Row) -> int:
    """The place of the letter that the key names."""
    letters = doc["choices"]["label"]
    if doc["answerKey"] not in letters:
        raise wrong(doc, "answerKey", f"{doc['answerKey']!r} is none of {', '.join(letters)}")
    return letters.index(doc["answerKey"])


def aliases(doc: Row) -> list[str]:
    """Every answer that counts, the one shown in a demonstration first."""
    if "answers" in doc:
        return doc["answers"]
    answer = doc["answer"]
    if isinstance(answer, list):
        return answer
    return list(dict.fromkeys([answer["value"], *answer["aliases"]]))


def wrong(doc: Row, field: str, why: str) -> RequestError:
    return RequestError(f"row {doc[INDEX] + 1}: field {field!r}: {why}")
