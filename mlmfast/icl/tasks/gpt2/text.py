"""Text as a tokenizer of words left it -> text as people write it, and back; and its sentences."""

from __future__ import annotations

import re

# What stands without a space after, or before, its neighbour.
CLITICS = ("n't", "'s", "'re", "'ve", "'ll", "'d", "'m")
CLOSING = (",", ".", ";", ":", "!", "?", ")", "]", "}", "%", *CLITICS)
OPENING = ("(", "[", "{", "$", "£")
# WikiText's: inside of what is one word elsewhere.
INNER = {"@-@": "-", "@,@": ",", "@.@": "."}
QUOTE = '"'
_KNOWN = (
    "Mr. Mrs. Ms. Dr. St. Jr. Sr. Prof. Gen. Col. Lt. Capt. Sgt. Rev. Inc. Corp. Co. Ltd. Mt. Ft. vs. etc. e.g. i.e. "
    "Jan. Feb. Mar. Apr. Jun. Jul. Aug. Sep. Sept. Oct. Nov. Dec. U.S. U.K. a.m. p.m. Ph.D."
)
ABBREVIATIONS = frozenset(_KNOWN.split())
_INITIALS = re.compile(r"(?:[A-Za-z]\.)+|\.{2,}")
_NUMBER = re.compile(r"(?<=\d)([.,])(?=\d)|(?<=\w)(-)(?=\w)")
# Children's Book Test: brackets and quotes by the names that the Penn Treebank gives them.
_TREEBANK = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "``": '"', "''": '"'}


def detokenised(line: str) -> str:
    """A line of words between spaces, as WikiText, Penn Treebank and One Billion Word have it, as running text.

    Spaces go, and ``@-@`` becomes ``-``, only where :func:`retokenised` puts them back; what would not come back stands
    as it was. So each line can be had again from its text, but for words that themselves look like two joined ones
    (an abbreviation with a full stop that is not known here): two lines may share that text.
    """
    words: list[list[str]] = []
    opened = glue = False
    for token in line.split(" "):
        closing = token in CLOSING or token in INNER or (token == QUOTE and opened)
        opening = token in OPENING or token in INNER or (token == QUOTE and not opened)
        if token == QUOTE:
            opened = not opened
        if words and token and words[-1][-1] and (glue or closing):
            words[-1].append(token)
        else:
            words.append([token])
        glue = opening
    return " ".join(text for word in words for text in _joined(word))


def _joined(tokens: list[str]) -> list[str]:
    """The tokens as one word if they can be had from it; else the longest beginning that can, and the rest likewise."""
    for end in range(len(tokens), 1, -1):
        word = "".join(INNER.get(token, token) for token in tokens[:end])
        if _parted(word) == tokens[:end]:
            return [word, *(_joined(tokens[end:]) if end < len(tokens) else [])]
    return [tokens[0], *(_joined(tokens[1:]) if len(tokens) > 1 else [])]


def retokenised(text: str) -> str:
    """The line that :func:`detokenised` made a text of."""
    return " ".join(token for word in text.split(" ") for token in _parted(word))


def _parted(word: str) -> list[str]:
    """A word between spaces as tokens."""
    before: list[str] = []
    after: list[str] = []
    while len(word) > 1 and word[0] in (*OPENING, QUOTE):
        before.append(word[0])
        word = word[1:]
    while len(word) > 1 and word not in ABBREVIATIONS and not _INITIALS.fullmatch(word) and word not in CLITICS:
        end = next((one for one in (*CLOSING, QUOTE) if word.endswith(one) and len(word) > len(one)), None)
        if end is None:
            break
        after.insert(0, end)
        word = word[: -len(end)]
    if word in INNER:
        return [*before, word, *after]
    inner = _NUMBER.sub(lambda found: f" @{found[0]}@ ", word).split(" ")
    return [*before, *inner, *after]


def treebank(line: str) -> str:
    """A line of the Children's Book Test as running text."""
    return detokenised(" ".join(_TREEBANK.get(token, token) for token in line.split()))


def sentences(text: str) -> list[str]:
    """The sentences of a text: they end at a line's end, and at a full stop, ! or ? before a capital, digit or quote.

    Not at an initial's or a known abbreviation's full stop.
    """
    found = []
    for line in text.splitlines():
        start = 0
        for end in re.finditer(r"[.!?]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]*[A-Z0-9À-Þ])", line):
            last = line[start : end.end()].split()[-1].lstrip("\"'“‘([")
            if last in ABBREVIATIONS or re.fullmatch(r"(?:[A-Z]\.)+", last):
                continue
            found.append(line[start : end.end()].strip())
            start = end.end()
        found.append(line[start:].strip())
    return [one for one in found if one]


def words(line: str) -> int:
    """Units of a text as its data set counts them: words between white space, and each line's end."""
    return len(line.split()) + max(1, line.count("\n") + (not line.endswith("\n")))
