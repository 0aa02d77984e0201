"""A text -> its sentences, by rules that need no trained data.

A sentence ends at ``.``, ``!`` or ``?`` (and quotes or brackets that close after it) where white space and then
something that may begin a sentence follow, and at a blank line. Titles, initials and the like end none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from mlmfast.errors import RequestError
from mlmfast.readers import format_of, read_rows

CLOSING = "\"'”’)\\]"
# What may begin a sentence: a capital letter or a digit, after opening quotes or brackets.
BORDER = re.compile(rf"(?<=[.!?…])[{CLOSING}]*(?=\s+[\"'“‘(\[]*[^\W_a-zß-öø-ÿ])\s+")
TITLES = "Mr Mrs Ms Messrs Dr Prof Rev Hon Gen Col Maj Capt Lt Sgt Sen Rep Gov Pres St Mt Ft No Nos Vol Fig vs cf Jr Sr"
# A capital letter alone is an initial ("J. Smith", "U.S. Army"); "I." is left out, which also ends a sentence.
UNENDING = re.compile(rf"(?:^|[\s\W])(?:{TITLES.replace(' ', '|')}|e\.g|i\.e|[A-HJ-Z])\.[{CLOSING}]*$")


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, in order, white space within them made single spaces."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        start = 0
        for border in BORDER.finditer(paragraph):
            sentence = paragraph[start : border.end()].rstrip()
            if not UNENDING.search(sentence):
                found.append(sentence)
                start = border.end()
        if start < len(paragraph):
            found.append(paragraph[start:])
    return found


def read_haystack(source: str, field: str = "text") -> list[str]:
    """The sentences of a file: a text, which lines and blank lines lay out, or JSON Lines, CSV, Parquet of texts.

    Args:
        source: a path, also ending in ``.gz``, ``.bz2`` or ``.xz``.
        field: of JSON Lines, CSV and Parquet, the key or column that holds a text.

    Raises:
        RequestError: it cannot be read, or holds no sentence.
    """
    texts: list[str] = []
    for row in read_rows(source, field=field):
        if row.text is None or row.error:
            raise RequestError(f"{source}: {row.error}")
        texts.append(row.text)
    whole = ["\n".join(texts)] if format_of(source) == "text" else texts
    found = [sentence for text in whole for sentence in sentences_of(text)]
    if not found:
        raise RequestError(f"{source} holds no sentence; give a longer text as --haystack")
    return found


def digest(sentences: Iterable[str]) -> str:
    """A short name for these sentences in this order."""
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]
