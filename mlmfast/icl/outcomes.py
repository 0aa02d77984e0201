"""What one pass over a task's examples gives, and what several with other demonstrations give together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """One repetition: a task, so many shots, one draw of demonstrations.

    Attributes:
        metrics: name -> value, as lm_eval gives it: a part of 1, or BLEU.
        errors: name -> standard error over the examples; None where a metric is no mean over them.
        chance: name -> what guessing gives; None where that is 0 or not known.
        examples: how many were judged.
        samples: an object an example: prompts, answers, choice.
        parts: of BLiMP, its paradigms: name -> accuracy and pairs.
    """

    metrics: dict[str, float]
    errors: dict[str, float | None]
    chance: dict[str, float | None]
    examples: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


def together(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Repetitions as the report has them: of each metric its mean, and beside it how far single ones lie apart.

    ``std`` is the standard deviation over the repetitions (of a sample: divided by one less than their number), None
    if there is but one. ``standard_error`` is that of one repetition over its examples, the mean of all.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for name in outcomes[0].metrics:
        values = [outcome.metrics[name] for outcome in outcomes]
        errors = [outcome.errors.get(name) for outcome in outcomes]
        known = [error for error in errors if error is not None]
        metrics[name] = {
            "mean": sum(values) / len(values),
            "std": deviation(values),
            "standard_error": sum(known) / len(known) if known else None,
            "chance": outcomes[0].chance.get(name),
            "repetitions": values,
        }
    found: dict[str, Any] = {"examples": outcomes[0].examples, "metrics": metrics}
    if outcomes[0].parts:
        found["parts"] = outcomes[0].parts
    return found


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of fewer than two."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def mean_error(values: Sequence[float]) -> float | None:
    """The standard error of a mean over examples."""
    spread = deviation(values)
    return None if spread is None else spread / math.sqrt(len(values))
