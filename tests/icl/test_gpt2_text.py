"""Running text of words between spaces, and back."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason='pip install "mlmfast[eval]"')

from mlmfast.icl.tasks.gpt2 import text


@pytest.mark.parametrize(
    ("line", "running"),
    [
        ('He said , " do n\'t go ( now ) ! "', 'He said, "don\'t go (now)!"'),
        (
            "they ca n't pay $ 1 @.@ 5 for Mr. Hall 's half @-@ dry well .",
            "they can't pay $1.5 for Mr. Hall's half-dry well.",
        ),
        ("In the U.S. 5 % rose , i.e. fell .", "In the U.S. 5% rose, i.e. fell."),
        ("a -dash , b- and @-@ alone", "a -dash, b- and @-@ alone"),
        ("two  spaces and a trailing one ", "two  spaces and a trailing one "),
        ("", ""),
    ],
)
def test_detokenised_and_back(line: str, running: str) -> None:
    assert text.retokenised(line) == line  # nothing in it looks joined
    assert text.retokenised(text.detokenised(line)) == line
    if line != "a -dash , b- and @-@ alone":
        assert text.detokenised(line) == running


def test_words_that_would_not_come_back_stay_apart() -> None:
    """``.`` after an abbreviation could not be told from the abbreviation's own."""
    assert text.detokenised("He lives in the U.S .") == "He lives in the U.S ."
    assert text.retokenised("He lives in the U.S .") == "He lives in the U.S ."


def test_random_lines_come_back() -> None:
    rng = np.random.default_rng(3)
    tokens = ["cat", "Mr.", "U.S.", "5", "N", "<unk>", "half", "café", '"', *text.CLOSING, *text.OPENING, *text.INNER]
    changed = 0
    for _ in range(3000):
        line = " ".join(rng.choice(tokens, rng.integers(1, 9)))
        running = text.detokenised(line)
        assert text.retokenised(running) == line, line
        changed += running != line
    assert changed > 2000


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He left. "Go!" she said. 5 went.', ["He left.", '"Go!" she said.', "5 went."]),
        (
            "Mr. Hall of the U.S. Navy, J. R. Hall, has 5.5 m. of it.",
            ["Mr. Hall of the U.S. Navy, J. R. Hall, has 5.5 m. of it."],
        ),
        ("A line\n\nanother. one", ["A line", "another. one"]),
        ("Ils dorment. Élan!", ["Ils dorment.", "Élan!"]),
        (" \n", []),
    ],
)
def test_sentences(given: str, wanted: list[str]) -> None:
    assert text.sentences(given) == wanted


@pytest.mark.parametrize(("given", "units"), [("a b", 3), ("a b\n", 3), ("a\n\nb \n", 5), ("", 1)])
def test_units(given: str, units: int) -> None:
    """Words and line ends."""
    assert text.words(given) == units
