"""BLiMP (Warstadt et al. 2020): of two sentences the grammatical one should score higher. No prompt, no demonstrations.

Sentences go to the model without context: a masked one gives their PLLs, a causal one their log-likelihoods after the
token that it begins texts with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from mlmfast.errors import RequestError
from mlmfast.icl.outcomes import Outcome, mean_error
from mlmfast.readers import Malformed, read_objects

FIELDS = ("UID", "sentence_good", "sentence_bad")


def read_pairs(source: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The pairs of a JSON Lines file, or of all in a folder; of each paradigm the first ``limit``.

    Raises:
        RequestError: a file that cannot be read, or a row without one of :data:`FIELDS`.
    """
    files = [path for path in sorted(source.iterdir()) if ".jsonl" in path.suffixes] if source.is_dir() else [source]
    pairs: list[dict[str, Any]] = []
    taken: dict[str, int] = {}
    for file in files:
        for number, row in enumerate(read_objects(str(file)), 1):
            if isinstance(row, Malformed):
                raise RequestError(f"{file}, row {number} {row.reason}")
            missing = [name for name in FIELDS if not isinstance(row.get(name), str) or not row[name].strip()]
            if missing:
                raise RequestError(f"{file}, row {number} has no {missing[0]}; BLiMP's have {', '.join(FIELDS)}")
            taken[row["UID"]] = taken.get(row["UID"], 0) + 1
            if limit is None or taken[row["UID"]] <= limit:
                pairs.append(row)
    if not pairs:
        raise RequestError(f"{source} holds no pairs of BLiMP's")
    return pairs


def judged(lm: Any, pairs: Sequence[dict[str, Any]]) -> Outcome:
    """Accuracy of each paradigm, and their mean; equal scores are wrong."""
    requests = [
        Instance("loglikelihood", pair, ("", pair[side].strip()), place)
        for pair in pairs
        for place, side in enumerate(("sentence_good", "sentence_bad"))
    ]
    scores = [score for score, _ in lm.loglikelihood(requests)]
    right: dict[str, list[float]] = {}
    samples = []
    for pair, good, bad in zip(pairs, scores[::2], scores[1::2]):
        right.setdefault(pair["UID"], []).append(float(good > bad))
        sample = {"UID": pair["UID"], "arguments": [["", pair["sentence_good"]], ["", pair["sentence_bad"]]]}
        samples.append(sample | {"responses": [good, bad], "target": 0, "choice": 0 if good > bad else 1})
    parts = {name: {"accuracy": sum(one) / len(one), "pairs": len(one)} for name, one in sorted(right.items())}
    errors = [mean_error(one) for one in right.values()]
    # The mean of paradigms, each drawn by itself.
    error = None
    if all(one is not None for one in errors):
        error = math.sqrt(sum((one or 0.0) ** 2 for one in errors)) / len(errors)
    accuracy = sum(part["accuracy"] for part in parts.values()) / len(parts)
    return Outcome({"acc": accuracy}, {"acc": error}, {"acc": 0.5}, len(pairs), samples, parts)
