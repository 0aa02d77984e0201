"""Checks of what callers pass to :class:`mlmfast.model.MaskedLM`: a :class:`RequestError` names culprit and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlmfast.errors import RequestError

NORMALIZATIONS = (None, "tokens", "unconditional")


def listed(items: Any, what: str) -> list[Any]:
    """A list of ``items``, which must not be a single string."""
    if isinstance(items, str):
        raise RequestError(f"{what} is one string; put it in a list")
    return list(items)


def listed_pairs(pairs: Any) -> list[tuple[str, str]]:
    """A list of ``(prefix, continuation)``."""
    pairs = listed(pairs, "pairs")
    for i, pair in enumerate(pairs):
        parts = pair if isinstance(pair, (tuple, list)) else ()
        if [isinstance(part, str) for part in parts] != [True, True]:
            raise RequestError(f"pair {i} is not (prefix, continuation), two strings: {pair!r}")
    return pairs


def listed_options(options: Any, normalize: str | None, scoring: Mapping[str, Any]) -> list[str]:
    """A list of the options to rank; refuses arguments that leave nothing to compare."""
    options = listed(options, "options")
    if not options:
        raise RequestError("rank() needs at least one option")
    if normalize not in NORMALIZATIONS:
        raise RequestError(f"normalize={normalize!r} is not known; choose None, 'tokens' or 'unconditional'")
    if scoring.get("on_error", "raise") != "raise":
        raise RequestError("rank() compares all options or none; on_error='return' does not apply")
    if scoring.get("truncation") == "right":
        raise RequestError(
            "truncation='right' would cut the options, and what is cut cannot be compared; pass truncation='left'"
        )
    return options


def check_batch_tokens(batch_tokens: int | None) -> int | None:
    if batch_tokens is not None and batch_tokens < 1:
        raise RequestError(f"batch_tokens={batch_tokens} holds no row; 1 is the least")
    return batch_tokens


def check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "return"):
        raise RequestError(f"on_error={on_error!r} is not known; choose 'raise' or 'return'")


def check_temperature(temperature: float) -> None:
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise RequestError(f"temperature={temperature!r} is not a number above 0")


def check_top_k(top_k: int | None, vocab_size: int) -> None:
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise RequestError(f"top_k={top_k} is not between 1 and the vocabulary's {vocab_size}")
