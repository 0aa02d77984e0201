"""A needle in a haystack: the prompts of the paper's section 3, and what counts as the right answer.

    > Some special magic number is hidden within the following articles. Make sure to memorize it. ...

    <sentences> The magic number is 482131. <sentences>

    > Question: What is the special magic number mentioned in the provided text?
    > Answer: The special magic number mentioned in the provided text is

Nothing here knows a model: lengths come from a function that counts a prompt's tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlmfast.errors import RequestError

DIGITS = 6
INTRODUCTION = (
    "> Some special magic number is hidden within the following articles. Make sure to memorize it. I will quiz you "
    "about the magic number afterwards."
)
QUESTION = "> Question: What is the special magic number mentioned in the provided text?"
ANSWER = "> Answer: The special magic number mentioned in the provided text is"
# Whole sentences may leave this share of a length empty; where they leave more, the last one is cut at a word.
SLACK = 0.05


@dataclass(frozen=True)
class Grid:
    """What is asked: lengths x placements x repetitions.

    Attributes:
        lengths: in the model's tokens; see :func:`fitted` for what they hold.
        placements: so many places of the needle, evenly from before the first sentence to after the last.
        repetitions: needles a length and place, each in another part of the text.
        seed: of the numbers.
    """

    lengths: tuple[int, ...]
    placements: int = 11
    repetitions: int = 10
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise RequestError(f"lengths={self.lengths} are not different numbers from 1")
        if self.placements < 2:
            raise RequestError(f"placements={self.placements}: 2 is the least, the needle before and after the text")
        if self.repetitions < 1:
            raise RequestError(f"repetitions={self.repetitions}: 1 is the least")

    def cells(self, length: int) -> Iterator[Cell]:
        """The needles of a length, in the order in which they are asked for."""
        for again in range(self.repetitions):
            for place in range(self.placements):
                yield Cell(length, place, again)


@dataclass(frozen=True)
class Cell:
    """One needle's place in the grid: ``place`` and ``again`` count placements and repetitions from 0."""

    length: int
    place: int
    again: int

    def number(self, seed: int) -> str:
        """The needle: six digits, none of them a leading zero.

        The numbers of seed 42 were kept out of what the bundled model was trained on: this must not change.
        """
        drawn = random.Random(f"{seed}:{self.length}:{self.place}:{self.again}")
        return str(drawn.randrange(10 ** (DIGITS - 1), 10**DIGITS))


@dataclass(frozen=True)
class Prompt:
    """A needle in its haystack.

    Attributes:
        cell: where in the grid.
        number: the needle.
        text: the whole prompt, to be continued by the number.
        tokens: its length as :class:`Grid` counts it.
        sentences: of the haystack.
    """

    cell: Cell
    number: str
    text: str
    tokens: int
    sentences: int


def render(haystack: Sequence[str], at: int, number: str, separator: str) -> str:
    """The paper's template, with the needle before the haystack's sentence ``at``."""
    lines = [*haystack[:at], f"The magic number is {number}.", *haystack[at:]]
    return separator.join([INTRODUCTION, "", *lines, "", QUESTION, ANSWER])


def fitted(
    cell: Cell, grid: Grid, haystack: Sequence[str], separator: str, count: Callable[[str], int], name: str
) -> Prompt:
    """The prompt of a cell, as long as the length allows.

    The haystack begins at a sentence that moves with the repetition, evenly over the text, and goes on at the text's
    beginning where it reaches the end. Whole sentences are added while they fit, as in the paper; where they leave more
    than 5 % of the length empty (short lengths, long sentences), one more is cut at a word to fill it. The needle
    stands before sentence ``floor(share * sentences)``.

    Args:
        cell: of ``grid``.
        grid: all that is asked.
        haystack: sentences.
        separator: stands for every line break of the template.
        count: a prompt's length, everything counted that the model has to hold.
        name: of the model, for errors.

    Raises:
        RequestError: the template does not fit, or the haystack is too short.
    """
    number = cell.number(grid.seed)
    start = cell.again * len(haystack) // grid.repetitions
    turned = [*haystack[start:], *haystack[:start]]

    def prompt(sentences: Sequence[str]) -> str:
        at = cell.place * len(sentences) // (grid.placements - 1)
        return render(sentences, at, number, separator)

    def fits(sentences: Sequence[str]) -> bool:
        return count(prompt(sentences)) <= cell.length

    if not fits([]):
        least = count(prompt([]))
        raise RequestError(
            f"length {cell.length} is too short: the question and its needle alone take {least} tokens of {name}; "
            f"leave it out of --lengths"
        )
    whole = _most(len(turned), lambda n: fits(turned[:n]))
    if whole == len(turned):
        raise RequestError(
            f"the haystack is too short: all its {whole:,} sentences are {count(prompt(turned)):,} tokens of {name}, "
            f"and length {cell.length:,} was asked for"
        )
    chosen = turned[:whole]
    tokens = count(prompt(chosen))
    if cell.length - tokens > SLACK * cell.length:
        words = turned[whole].split()
        taken = _most(len(words), lambda n: fits([*chosen, " ".join(words[:n])] if n else chosen))
        if taken:
            chosen = [*chosen, " ".join(words[:taken])]
            tokens = count(prompt(chosen))
    return Prompt(cell, number, prompt(chosen), tokens, len(chosen))


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` that fits, where 0 does and no number fits after one that does not."""
    low, step = 0, 1
    while low + step <= limit and fits(low + step):  # strides first: a limit may be a whole book
        low += step
        step *= 2
    high = min(low + step, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def digits_right(answer: str, number: str) -> int:
    """How many of the number's digits an answer has in their places."""
    return sum(a == b for a, b in zip(answer, number))
