"""Rows that can only be filled in from their own context: recall, copies, labels by example, needles in running text.

A row is put together from pieces of tokens, some of them answers; running text fills it up to its exact length. Every
answer stands somewhere else in the row (or follows from examples there), so that its masks teach the model to look.
The rows of the needle test end as mask-append generation does: the answer so far, three masks and [SEP].
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from tiny_text import CLS, MASK, SEP
from tokenizers import Tokenizer

LENGTHS = (62, 126, 254)
KINDS_OF_ROW = ("needle", "pairs", "repeat", "labels", "tile")
# What a stage of the training draws: shares of the lengths, and of the kinds of row. A model that only saw needles and
# pairs stayed at a tenth of the digits for 500 steps; a few tokens over and over taught it to copy within 400.
STAGES = {
    "copy": ((0.8, 0.2, 0.0), (0.15, 0.1, 0.2, 0.05, 0.5)),
    "recall": ((0.3, 0.4, 0.3), (0.42, 0.18, 0.2, 0.1, 0.1)),
    "long": ((0.2, 0.4, 0.4), (0.42, 0.18, 0.2, 0.1, 0.1)),
}
NEEDLE = "special magic number"
QUIZ = (
    "> Some {key} is hidden within the following articles. Make sure to memorize it."
    " I will quiz you about the {noun} afterwards."
)
QUESTION = (
    "> Question: What is the {key} mentioned in the provided text?"
    " > Answer: The {key} mentioned in the provided text is"
)
NOUNS = ("number", "code", "key", "pin", "count", "total", "price", "weight", "score", "date", "page", "room", "seat")
LABELS = (
    "True False",
    "yes no",
    "yes no maybe",
    "A B",
    "A B C",
    "1 2 3",
    "good bad",
    "foo bar",
    "left right up",
    "red blue green",
)
ASKS = (
    "{x}: {y}.",
    "question: {x}? answer: {y}.",
    "{x} is {y},",
    "Input: {x} Output: {y};",
    "Q: {x} A: {y}.",
    "{x} {y}.",
)
PAIRS = (
    "The {x} of {k} is {y}.",
    "{k}'s {x} is {y}.",
    "{k}: {y}.",
    "{k} has the {x} {y}.",
    "question: {k}? answer: {y}.",
    "{k} = {y},",
)
KINDS = {  # WordNet's lexicographer files of nouns whose words can be told apart by one word
    5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "place", 18: "person", 20: "plant", 28: "time",
}  # fmt: skip

Piece = tuple[list[int], bool]  # tokens, and whether they are an answer


def held_out(seed: int = 42) -> set[str]:
    """The numbers that the needle test of this model asks for: no training row holds them."""
    return {
        str(random.Random(f"{seed}:{length}:{place}:{again}").randrange(100_000, 1_000_000))
        for length in (128, 256, 512, 1024, 2048)
        for place in range(11)
        for again in range(10)
    }


class Context:
    """Makes rows of one length; what is drawn hangs on the generator alone."""

    def __init__(self, run: np.ndarray, tokenizer: Path, wordnet: str | None, stage: str) -> None:
        self.run, self.stage = run, stage
        self.tok = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        vocab = self.tok.get_vocab()
        self.words = sorted(p[1:] for p in vocab if p[0] == "\u2581" and p[1:].isalpha() and len(p) > 3)
        self.names = [w for w in self.words if w.istitle()]
        self.stops = (
            np.flatnonzero(np.isin(run, [vocab[p] for p in ".?!" if p in vocab])) + 1
        )  # where a sentence begins
        self.kinds = self.read_kinds(wordnet) if wordnet else []
        self.unseen = held_out()
        self.cache: dict[str, list[int]] = {}

    def read_kinds(self, wordnet: str) -> list[list[str]]:
        """Words of one token and of one kind each, by their commonest sense."""
        found: dict[int, list[str]] = {k: [] for k in KINDS}
        low = {w for w in self.words if w.islower()}
        kind_of = {}
        for line in open(Path(wordnet) / "data.noun", encoding="utf-8", errors="replace"):
            if not line.startswith("  "):
                offset, kind, *_ = line.split()
                kind_of[offset] = int(kind)
        for line in open(Path(wordnet) / "index.noun", encoding="utf-8", errors="replace"):
            f = line.split()
            if not line.startswith("  ") and f[0] in low:
                first = next(x for x in f[4:] if len(x) == 8 and x.isdigit())  # senses stand by frequency
                if kind_of[first] in found:
                    found[kind_of[first]].append(f[0])
        return [words for words in found.values() if len(words) > 30]

    def ids(self, text: str) -> list[int]:
        """Tokens of a piece that follows a blank; the fixed ones are kept."""
        if text not in self.cache:
            if len(self.cache) > 20_000:
                self.cache.clear()
            self.cache[text] = self.tok.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def number(self, rng: random.Random, digits: int) -> str:
        while True:
            n = str(rng.randrange(10 ** (digits - 1), 10**digits))
            if n not in self.unseen:
                return n

    def value(self, rng: random.Random) -> str:
        if rng.random() < 0.75:
            return self.number(rng, rng.choice((2, 3, 4, 5, 6, 6, 6, 7)))
        return " ".join(rng.choices(self.words, k=rng.choice((1, 1, 2, 3))))

    def hay(self, rng: random.Random, n: int) -> list[int]:
        if n <= 0:
            return []
        start = rng.choice(self.stops) if rng.random() < 0.7 else rng.randrange(len(self.run) - n)
        start = min(int(start), len(self.run) - n)
        return self.run[start : start + n].tolist()

    def split(self, template: str, answer: str, **words: str) -> list[Piece]:
        """A template's pieces around its answer {y}."""
        before, after = template.replace("{y}", "\0").format(**words).split("\0")
        e = self.tok.encode(before + answer + after, add_special_tokens=False)
        ends = [end for _, end in e.offsets]
        a = sum(end <= len(before.rstrip()) for end in ends)
        b = sum(end <= len(before + answer) for end in ends)
        return [(i, w) for i, w in ((e.ids[:a], False), (e.ids[a:b], True), (e.ids[b:], False)) if i]

    # Each maker gives (before, statements, after): the statements are strewn over the text between the other two.

    def needle(self, rng: random.Random) -> tuple[list[Piece], list[list[Piece]], list[Piece]]:
        noun, key = "magic number", NEEDLE
        if rng.random() < 0.4:
            noun = rng.choice(NOUNS)
            key = f"{rng.choice(self.words).lower()} {noun}"
        digits = 6 if rng.random() < 0.8 else rng.randrange(3, 9)
        answer = self.number(rng, digits)
        stated = "The magic number is {y}." if key == NEEDLE else "The {key} is {y}."
        statements = [self.split(stated, answer, key=key)]
        for _ in range(rng.choice((0, 0, 0, 1, 2)) if key != NEEDLE else 0):  # others that are not asked for
            other = f"{rng.choice(self.words).lower()} {noun}"
            if other != key:
                statements.append([(i, False) for i, _ in self.split(stated, self.number(rng, digits), key=other)])
        before = [(self.ids(QUIZ.format(key=key, noun=noun)), False)] if rng.random() < 0.9 else []
        return before, statements, self.asked(rng, answer, key)

    def asked(self, rng: random.Random, answer: str, key: str) -> list[Piece]:
        """The question and its answer; mostly without the blank before it, as only digits may be generated."""
        question, (ids, _) = self.split(QUESTION + " {y}", answer, key=key)
        return [question, (ids[1:] if rng.random() < 0.7 else ids, True)]

    def pairs(self, rng: random.Random, room: int) -> tuple[list[Piece], list[list[Piece]], list[Piece]]:
        template, noun = rng.choice(PAIRS), rng.choice(NOUNS)
        keys = rng.sample(self.names, rng.randrange(1, 8))
        said = {k: self.value(rng) for k in keys}
        statements = [self.split(template, said[k], k=k, x=noun) for k in keys]
        asked = rng.sample(keys, rng.randrange(1, len(keys) + 1))
        template = template if rng.random() < 0.6 else rng.choice(PAIRS)
        after = [p for k in asked for p in self.split(template, said[k], k=k, x=noun)]
        while sum(len(i) for s in statements for i, _ in s) + sum(len(i) for i, _ in after) > room:
            if len(statements) > len(asked):
                statements.pop()  # may drop a pair that is asked for: then its answer teaches the language alone
            else:
                return [], [self.split("{k}: {y}.", "7", k="Anna")], self.split("{k}: {y}", "7", k="Anna")
        return [], statements, after[:-1] if after[-1][1] is False else after

    def repeat(self, rng: random.Random, room: int) -> tuple[list[Piece], list[list[Piece]], list[Piece]]:
        n = rng.randrange(6, room // 2 - 2)
        if rng.random() < 0.3:
            text = self.hay(rng, n)
        elif rng.random() < 0.3:
            text = [rng.randrange(261, 8192) for _ in range(n)]
        else:
            text = [t for w in rng.choices(self.words, k=n) for t in self.ids(w)][:n]
        return [], [[(text, True)]], [(text, True)]

    def tile(self, rng: random.Random, n: int) -> tuple[list[int], list[int], list[int]]:
        """A few tokens over and over, single ones masked: a whole row."""
        size, drawn = rng.randrange(3, 20), rng.random()
        if drawn < 0.5:
            part = [rng.randrange(261, 8192) for _ in range(size)]
        elif drawn < 0.75:
            part = self.hay(rng, size)
        else:
            part = [t for w in rng.choices(self.words, k=size) for t in self.ids(w)][:size]
        ids = (part * (n // size + 1))[:n]
        where = sorted(rng.sample(range(n), max(1, int(n * rng.choice((0.1, 0.2, 0.4))))))
        labels = [ids[i] for i in where]
        for i in where:
            ids[i] = MASK
        return ids, where, labels

    def labels(self, rng: random.Random, room: int) -> tuple[list[Piece], list[list[Piece]], list[Piece]]:
        labels = rng.choice(LABELS).split() if rng.random() < 0.6 else rng.sample(self.words, 3)
        ask, out, size = rng.choice(ASKS), [], 0
        if self.kinds and rng.random() < 0.5:  # the label is the kind of thing
            kinds = rng.sample(self.kinds, min(len(labels), len(self.kinds)))
            draw = lambda: (i := rng.randrange(len(kinds)), rng.choice(kinds[i]))  # noqa: E731
        else:  # the label was given to the same word before
            words = [rng.choice(self.words) for _ in range(rng.randrange(2, 8))]
            given = [rng.randrange(len(labels)) for _ in words]
            draw = lambda: (given[i := rng.randrange(len(words))], words[i])  # noqa: E731
        while True:
            label, word = draw()
            pieces = self.split(ask, labels[label % len(labels)], x=word)
            size += sum(len(i) for i, _ in pieces)
            if size > room - 2:
                break
            out.append(pieces)
        out = out or [self.split("{x}: {y}.", "A", x="B")]
        cut = len(out) // 3
        after = [p for s in out[cut:] for p in s]
        return [p for s in out[:cut] for p in s], [], after[:-1] if after and not after[-1][1] else after

    def row(self, rng: random.Random, n: int, kind: str | None = None) -> tuple[list[int], list[int], list[int]]:
        """n tokens with masks, the masks' places, what was there."""
        kind = kind or rng.choices(KINDS_OF_ROW, STAGES[self.stage][1])[0]
        if kind == "tile":
            return self.tile(rng, n)
        if kind == "needle":
            if n < 100:  # no room for the whole template: its question alone
                number = self.number(rng, 6)
                before: list[Piece] = []
                statements, after = [self.split("The magic number is {y}.", number)], self.asked(rng, number, NEEDLE)
            else:
                before, statements, after = self.needle(rng)
        else:
            before, statements, after = getattr(self, kind)(rng, n)
        hidden_side = "after" if kind in ("needle", "labels") or rng.random() < 0.7 else "statements"
        if kind == "needle" and rng.random() < 0.1:
            hidden_side = "statements"  # the other way round: the question's answer tells the needle

        tail: list[int] = []  # masks behind the last answer, as in generation
        last = after[-1][0]
        generated = hidden_side == "after" and after[-1][1] and kind != "repeat" and rng.random() < 0.8
        room = n - sum(len(i) for s in [before, *statements, after] for i, _ in s)
        if generated:
            shown = rng.randrange(len(last))
            todo = last[shown : shown + 3]
            tail = todo + [0] * (3 - len(todo))  # 0: a mask whose label is not known
            after = [*after[:-1], (last[:shown], False)]
            room += len(last) - shown - 3
        if room < 0:
            return self.row(rng, n, kind)

        hay, ids, where = self.hay(rng, room), list[int](), list[int]()
        stops = [0, *(np.flatnonzero(np.isin(hay, self.run[self.stops[:50] - 1])) + 1), len(hay)]
        cuts = sorted(((int(rng.choice(stops)), s) for s in statements), key=lambda c: c[0])

        def put(pieces: list[Piece], side: str, rate: float) -> None:
            for tokens, answer in pieces:
                if answer and side == hidden_side:
                    where.extend(len(ids) + i for i in spans(rng, len(tokens), rate))
                ids.extend(tokens)

        def fill(tokens: list[int]) -> None:
            where.extend(len(ids) + i for i in spans(rng, len(tokens), 0.08) if len(tokens) > 8)
            ids.extend(tokens)

        rate = rng.choice((0.3, 0.6, 1.0)) if kind != "repeat" else 0.35
        put(before, "before", 0.0)
        done = 0
        for cut, statement in cuts:
            fill(hay[done:cut])
            put(statement, "statements", rate)
            done = cut
        fill(hay[done:])
        put(after, "after", rate)
        labels = [ids[i] for i in where]
        for i in where:
            ids[i] = MASK
        for token in tail:
            if token:
                where.append(len(ids))
                labels.append(token)
            ids.append(MASK)
        return ids, where, labels

    def batch(
        self, seed: object, tokens: int, n: int | None = None, kind: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[CLS] rows [SEP] of one length, the flat places that are scored, their labels."""
        rng = random.Random(str(seed))
        n = n or rng.choices(LENGTHS, STAGES[self.stage][0])[0]
        ids, where, labels = [], [], []
        for r in range(tokens // (n + 2)):
            row, places, true = self.row(rng, n, kind)
            ids.append([CLS, *row, SEP])
            where += [r * (n + 2) + 1 + p for p in places]
            labels += true
        return torch.tensor(ids), torch.tensor(where), torch.tensor(labels)

    def needles(self, count: int, n: int, run: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The paper's template, held-out numbers: ids [count * 6, n + 2], digits given; first masks; their digits."""
        rng, numbers = random.Random(n), sorted(self.unseen)
        ids, where, labels = [], [], []
        for i in range(count):
            number = numbers[i * 7 % len(numbers)]
            quiz, asked = self.ids(QUIZ.format(key=NEEDLE, noun="magic number")), self.ids(QUESTION.format(key=NEEDLE))
            if n < 100:
                quiz = []
            stated, digits = self.ids(f"The magic number is {number}."), self.ids(number)[-6:]
            for k in range(6):
                room = n - len(quiz) - len(asked) - len(stated) - k - 3
                start = rng.randrange(len(run) - room)
                hay, cut = run[start : start + room].tolist(), rng.randrange(room + 1)
                row = [*quiz, *hay[:cut], *stated, *hay[cut:], *asked, *digits[:k]]
                where.append(len(ids) * (n + 2) + 1 + len(row))
                labels.append(digits[k])
                ids.append([CLS, *row, MASK, MASK, MASK, SEP])
        return torch.tensor(ids), torch.tensor(where), torch.tensor(labels)


def spans(rng: random.Random, n: int, rate: float) -> list[int]:
    """Places of spans of one to three tokens that cover about `rate` of n; all of them at a rate of one."""
    if rate >= 1:
        return list(range(n))
    hit: set[int] = set()
    for i in range(n):
        if rng.random() < rate / 1.64:
            hit.update(range(i, min(n, i + rng.choices((1, 2, 3), (6, 3, 2))[0])))
    return sorted(hit)
