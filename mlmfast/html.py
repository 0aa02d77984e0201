"""Scores and rankings -> one HTML page whose tokens are coloured by surprisal.

The page is whole without a network and readable without its script, which sorts, filters and shows exact values.
Everything that comes from a text stands in it escaped and between tags, never in an attribute or in the script; its
Content-Security-Policy lets nothing load and nothing run but the one style and the one script that it names by digest.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from mlmfast.colours import DARK, LIGHT, NATS, STEPS, scale, step_of
from mlmfast.errors import RequestError
from mlmfast.writers import Record, replace

# What a browser still sorts at once, and a reader may still look through.
ROWS = 2_000
TOKENS = 250_000
# From here on a browser lays out only the lines that are in sight.
MANY = 20_000
# An error may be about a text of millions of characters.
SHOWN_CHARACTERS = 500

# Characters that cannot stand in a page, are not seen in it, or turn the text around them. Joiners stay: they shape
# emoji and letters.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)
WORD_STARTS = ("▁", "Ġ", "Ċ")  # of SentencePiece; of byte-level BPE, a space and a line break

SCORE_COLUMNS = (
    ("#", "ascending", "place in the input"),
    ("Tokens", "", ""),
    ("PLL", "ascending", "pseudo-log-likelihood, nats"),
    ("Per token", "ascending", "PLL over the number of tokens, nats"),
    ("Perplexity", "descending", "exp of minus the PLL a token"),
    ("Length", "descending", "scored tokens"),
)
RANK_COLUMNS = (
    ("#", "ascending", "place in the input"),
    ("Prompt; options best first: value, probability, tokens", "", ""),
    ("Best", "ascending", "probability of the best among these options"),
    ("Margin", "ascending", "value of the best less that of the second, nats"),
    ("Options", "descending", "how many there are"),
)


@dataclass
class Excerpt:
    """The first records of a run, as many as a page holds: ``most`` rows, :data:`TOKENS` tokens, at least one row."""

    most: int = ROWS
    records: list[Record] = field(default_factory=list)
    tokens: int = 0
    full: bool = False

    def take(self, records: Iterable[Record]) -> None:
        """Takes the next records, no more of them than there is room for."""
        for record in records:
            tokens = sum(len(score["tokens"]) for score in record.get("scores", [record]) if "tokens" in score)
            if len(self.records) >= self.most or (self.records and self.tokens + tokens > TOKENS):
                self.full = True
            if self.full:
                return
            self.records.append(record)
            self.tokens += tokens


@dataclass(frozen=True)
class Heading:
    """What a page says of its run.

    Attributes:
        kind: ``"score"`` or ``"rank"``.
        title: what was scored or ranked.
        facts: a name and a value each, shown.
        settings: all arguments of the run, folded away.
        rows: rows of the run, on the page or not.
        errors: how many of them have ``error``.
    """

    kind: str
    title: str
    facts: Mapping[str, str]
    settings: Mapping[str, Any]
    rows: int
    errors: int


def check_page(path: str, most: int, *others: str) -> None:
    """Refuses, before anything is computed, a page that could not be written or would be written over something else.

    Args:
        others: input and output, ``"-"`` for standard ones.

    Raises:
        RequestError: and how to name it instead.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--html {path}: give a file whose name ends in .html")
    if most < 1:
        raise RequestError(f"--html-rows {most}: a page has at least one row")
    taken = [Path(other).resolve() for other in others if other != "-"]
    if target.resolve() in taken:
        raise RequestError(f"--html {path} is the input or the output too: give the page another name")
    if target.is_dir():
        raise RequestError(f"--html {path} is a folder: give a file")
    parent = target.resolve().parent
    if not parent.is_dir() and parent not in taken:  # an output folder may still have to be made
        raise RequestError(f"cannot write {path}: there is no folder {target.parent}")


def write_page(path: str, excerpt: Excerpt, heading: Heading) -> str:
    """Writes the page, whole or not at all; returns a line that says what is on it.

    Args:
        excerpt: records as ``mlmfast score`` writes them; or as ``mlmfast rank`` does, each with ``scores``, for every
            option its ``tokens`` and ``logprobs``.
    """
    replace(Path(path).resolve(), page(excerpt, heading).encode())
    return f"{path}: {_extent(excerpt, heading)}"


def page(excerpt: Excerpt, heading: Heading) -> str:
    """The whole page. The same records give the same page."""
    template = (resources.files("mlmfast") / "report.html").read_text(encoding="utf-8")
    ranks = heading.kind == "rank"
    gaps = gaps_of(excerpt.records)
    rows = (
        _question(n, record, gaps) if ranks else _text(n, record, gaps) for n, record in enumerate(excerpt.records, 1)
    )
    style, script = (_between(template, tag).replace("{{colours}}", _colours()) for tag in ("style", "script"))
    extent = _extent(excerpt, heading)
    if len(excerpt.records) < heading.rows:
        extent += "; the others are in the output, and --html-rows sets how many are here"
        extent += f" (never more than {TOKENS:,} tokens)" if len(excerpt.records) < excerpt.most else ""
    parts = {
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        "colours": _colours(),
        "name": UNSEEN.sub("\ufffd", escape(heading.title, quote=False)),  # a title has no elements in it
        "title": visible(heading.title),
        "extent": escape(extent),
        "facts": _terms(heading.facts),
        "settings": _terms(heading.settings),
        "legend": "".join(f"<span class=c{step}></span>" for step in range(STEPS)),
        "last": f"{(STEPS - 1) * NATS:g}",
        "kind": heading.kind + " many" * (excerpt.tokens > MANY),
        "columns": "".join(_column(*column) for column in (RANK_COLUMNS if ranks else SCORE_COLUMNS)),
        "rows": "\n".join(rows),
    }
    # In one pass: braces in a text are left as they are.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def visible(text: str) -> str:
    """HTML of a text in which characters that would not be seen stand as their numbers."""
    return UNSEEN.sub(lambda found: f"<span class=u>U+{ord(found[0]):04X}</span>", escape(text, quote=False))


def gaps_of(records: Sequence[Record]) -> Callable[[Sequence[str]], list[bool]]:
    """How the tokenizer of these records marks words: a function from tokens to whether there is a gap before each.

    SentencePiece and byte-level BPE mark a word's first piece, XLM's BPE its last one, WordPiece all but the first.
    """
    scores = [score for record in records for score in record.get("scores", [record])]
    tokens = {token for score in scores for token in score.get("tokens", ())}
    if any(token.startswith(WORD_STARTS) for token in tokens):
        return lambda found: [token.startswith(WORD_STARTS) for token in found]
    if any(token.endswith("</w>") for token in tokens):
        return lambda found: [before.endswith("</w>") for before in ["", *found[:-1]]]
    return lambda found: [not token.startswith("##") for token in found]


def _text(number: int, record: Record, gaps: Callable[[Sequence[str]], list[bool]]) -> str:
    if "error" in record:
        return _refused(number, record["error"], [record.get("text")], len(SCORE_COLUMNS))
    tokens = record["tokens"]
    perplexity = math.inf if record["perplexity"] is None else record["perplexity"]
    line = _line("p", _tokens(tokens, record["logprobs"], record.get("ranks"), gaps))
    numbers = [_number(record["pll"], ".2f"), _number(record["pll"] / len(tokens), ".3f")]
    form = ".4g" if perplexity < 1e3 else ",.0f" if perplexity < 1e7 else ".3g"
    numbers += [_number(perplexity, form), _number(len(tokens), "d")]
    given = f"<p class=given dir=auto>{visible(record['text'])}</p>"
    return f"<tr><td class=n data-v={number}>{number}<td lang>{line}{given}{''.join(numbers)}"


def _question(number: int, record: Record, gaps: Callable[[Sequence[str]], list[bool]]) -> str:
    if "error" in record:
        texts = [record.get("prompt"), *(record.get("options") or [])]
        return _refused(number, record["error"], texts, len(RANK_COLUMNS))
    lines = []
    for place in record["order"]:
        score, share = record["scores"][place], record["probabilities"][place]
        numbers = _number(record["values"][place], ".3f", "span") + _number(share, ".1%", "span")
        line = _line("span", _tokens(score["tokens"], score["logprobs"], score.get("ranks"), gaps))
        given = f"<span class=given dir=auto>{visible(record['options'][place])}</span>"
        lines.append(f"<li>{numbers}{line}{given}")
    values = sorted(record["values"], reverse=True)
    margin = _number(values[0] - values[1], ".3f") if len(values) > 1 else "<td>–"
    return (
        f"<tr><td class=n data-v={number}>{number}<td lang><p class=prompt dir=auto>{visible(record['prompt'])}</p>"
        f"<ol>{''.join(lines)}</ol>{_number(max(record['probabilities']), '.1%')}{margin}{_number(len(values), 'd')}"
    )


def _refused(number: int, reason: str, texts: Sequence[str | None], columns: int) -> str:
    shown = "".join(f"<p class=given dir=auto>{visible(_cut(text))}</p>" for text in texts if text)
    return (
        f"<tr class=error><td class=n data-v={number}>{number}<td lang colspan={columns - 1}>{shown}"
        f"<p class=why><strong>Error:</strong> {visible(_cut(reason))}</p>"
    )


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} … ({len(text):,} characters)"


def _tokens(
    tokens: Sequence[str],
    logprobs: Sequence[float],
    ranks: Sequence[int] | None,
    gaps: Callable[[Sequence[str]], list[bool]],
) -> str:
    """A span a token; ``data-l`` holds its log-probability in full, ``data-r`` its rank."""
    parts = []
    for place, (token, logprob, gap) in enumerate(zip(tokens, logprobs, gaps(tokens))):
        rank = f" data-r={int(ranks[place])}" if ranks else ""
        shown = visible(token).replace("\n", "↵").replace("\t", "⇥")
        if token.startswith(WORD_STARTS):
            shown = f"<i>{shown[0]}</i>{shown[1:]}"
        parts.append(f"{' ' * gap}<span class=c{step_of(logprob)} data-l={float(logprob)!r}{rank}>{shown}</span>")
    return "".join(parts)


def _line(tag: str, tokens: str) -> str:
    return f"<{tag} class=tokens dir=auto translate=no>{tokens}</{tag}>"


def _number(value: float, form: str, tag: str = "td") -> str:
    """A number, rounded to be read; ``data-v`` holds it in full."""
    exact = "Infinity" if value == math.inf else repr(value)
    shown = "∞" if value == math.inf else format(value, form).replace("-", "\u2212")
    return f"<{tag} class=v data-v={exact}>{shown}</{tag}>"


def _column(name: str, first: str, meaning: str) -> str:
    """A column's head; ``data-first`` is the order in which it is sorted first."""
    sorts = f' data-first={first} title="{escape(meaning)}"' if first else ""
    return f"<th scope=col{sorts}>{escape(name)}</th>"


def _terms(values: Mapping[str, Any]) -> str:
    return "".join(f"<div><dt>{visible(str(name))}<dd>{visible(str(value))}</div>" for name, value in values.items())


def _extent(excerpt: Excerpt, heading: Heading) -> str:
    shown = len(excerpt.records)
    if shown < heading.rows:
        return f"first {shown:,} of {heading.rows:,} rows; {heading.errors:,} of all have an error"
    return f"{shown:,} rows, {heading.errors:,} with an error"


def _colours() -> str:
    pairs = zip(scale(LIGHT), scale(DARK))
    return "\n".join(
        f".c{step} {{ background: light-dark({light}, {dark}); color: light-dark({on_light}, {on_dark}); }}"
        for step, ((light, on_light), (dark, on_dark)) in enumerate(pairs)
    )


def _between(template: str, tag: str) -> str:
    """The text of the one element of this name."""
    return template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
