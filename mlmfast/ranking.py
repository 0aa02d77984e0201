"""Ranking questions from a file: JSON Lines of ``{"prompt", "options"}`` in, JSON Lines of rankings out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlmfast.errors import TextError
from mlmfast.model import MaskedLM
from mlmfast.readers import SURROGATE, Malformed, read_objects
from mlmfast.results import Ranking, generic_mark

# What the command line calls a normalisation -> what MaskedLM.rank does.
NORMALIZATIONS = {"none": None, "tokens": "tokens", "unconditional": "unconditional"}


@dataclass(frozen=True)
class Question:
    """A prompt and its options, or as much of them as a file had, and why it cannot be ranked."""

    prompt: str | None
    options: list[str] | None
    error: str | None = None


def read_questions(source: str) -> Iterator[Question]:
    """The questions of a JSON Lines file, or of standard input for ``"-"``; one that is malformed has ``error``.

    Raises:
        RequestError: the source cannot be read.
    """
    for record in read_objects(source):
        if isinstance(record, Malformed):
            yield Question(None, None, record.reason)
            continue
        prompt, options = record.get("prompt"), record.get("options")
        if not isinstance(prompt, str):
            prompt = None
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            options = None
        error = None
        if prompt is None:
            error = "has no string in 'prompt'"
        elif not options:
            error = "has no list of strings in 'options'"
        elif any(SURROGATE.search(text) for text in (prompt, *options)):
            error = "holds half of a surrogate pair, which is no character"
        yield Question(prompt, options, error)


def answer(lm: MaskedLM, question: Question, settings: Mapping[str, Any]) -> Ranking | str:
    """The ranking, or why there is none.

    Args:
        settings: keyword arguments of :meth:`MaskedLM.rank`.
    """
    if question.error is not None or question.prompt is None or question.options is None:
        return question.error or "has no prompt and options"
    try:
        return lm.rank(question.prompt, question.options, progress=False, **settings)
    except TextError as error:
        return f"cannot be ranked: with option {question.options[error.index]!r} it {error.reason}"


def record_of(question: Question, outcome: Ranking | str, number: int) -> dict[str, Any]:
    """What is written of a question, the ``number``-th of its file counted from 1."""
    record: dict[str, Any] = {"prompt": question.prompt, "options": question.options}
    if isinstance(outcome, str):
        return record | {"error": f"row {number} {outcome}"}
    return record | {
        "values": outcome.values.tolist(),
        "probabilities": outcome.probabilities.tolist(),
        "best": outcome.best,
        "order": outcome.order,
        "cache": outcome.cache,
        **generic_mark(outcome),
    }


def scores_of(outcome: Ranking | str) -> dict[str, Any]:
    """What a page shows beside :func:`record_of`: ``scores``, each option's tokens and their log-probabilities."""
    if isinstance(outcome, str):
        return {}
    scores = outcome.scores
    return {"scores": [{"tokens": one.tokens, "logprobs": [float(str(x)) for x in one.logprobs]} for one in scores]}
