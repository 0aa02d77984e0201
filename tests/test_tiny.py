"""The bundled model: a plain Hugging Face checkpoint that is small, exact and better than chance."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer
from truth import assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.masking import METRICS

FOLDER = Path(mlmfast.__file__).parent / "tiny"

# Written for this test: the second sentence of each differs in one thing that makes it wrong.
PAIRS = [
    ("The old man was sitting in his chair.", "The old man were sitting in his chair."),
    ("These houses are very old.", "This houses are very old."),
    ("They were walking to the river.", "They was walking to the river."),
    ("She is reading a long letter.", "She is read a long letter."),
    ("He did not want to go home.", "He did not wanted to go home."),
    ("The children have eaten the bread.", "The children have ate the bread."),
    ("I have never been to the city.", "I has never been to the city."),
    ("We saw them in the street.", "We saw they in the street."),
    ("The king and his men went away.", "The king and his men wents away."),
    ("There is a dog in the garden.", "There are a dog in the garden."),
    ("Many people live in this country.", "Many people lives in this country."),
    ("She looked at herself in the glass.", "She looked at himself in the glass."),
]


@pytest.fixture(scope="module")
def tiny() -> mlmfast.MaskedLM:
    return mlmfast.load("tiny")


def test_it_is_small_and_readable_by_everyone() -> None:
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)


def test_every_metric_equals_the_loop_over_transformers(tiny: mlmfast.MaskedLM) -> None:
    model = AutoModelForMaskedLM.from_pretrained(FOLDER, tie_word_embeddings=False).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "In 1945 they crossed the icy river, unharmed."
    for metric in METRICS:
        score = tiny.score([text], metric=metric)[0]
        assert_score(score, reference_loop(forward_of(model), tokenizer, text, metric))


def test_it_knows_some_grammar(tiny: mlmfast.MaskedLM) -> None:
    scores = tiny.score([sentence for pair in PAIRS for sentence in pair])
    right = sum(good.total > bad.total for good, bad in zip(scores[::2], scores[1::2]))
    assert right >= 10, f"{right} of {len(PAIRS)}"


def test_its_tokenizer(tiny: mlmfast.MaskedLM) -> None:
    score = tiny.score(["In 1945 she paid 20 € for 雨."])[0]
    digits = [token for token in score.tokens if any(c.isdigit() for c in token) and "x" not in token]
    assert "".join(digits).replace("▁", "") == "194520" and all(len(d.replace("▁", "")) == 1 for d in digits)
    assert tiny.tokenizer.unk_token_id not in score.token_ids
    assert tiny.fill("The [MASK] was very old.")[0].words[0].isalpha()
