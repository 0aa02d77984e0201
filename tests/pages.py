"""Records for the tests of pages and comparisons: texts that try to break out, turn around or vanish."""

from __future__ import annotations

import math
import re
from typing import Any

from mlmfast.html import Excerpt, Heading

INJECTION = "</p></script><script>window.injected = 1</script><img src=x onerror='window.injected = 2'>"
NASTY = [
    INJECTION,
    "<!-- {{rows}} {{policy}} ]]> &lt;b&gt; \" ' ` =",
    "a\x00b\x1bc",
    "\u202eturned around\u202c \u2066and isolated",
    "\U0001f469\u200d\U0001f4bb \U0001f3f4\U000e0067\U000e0062\U000e007f family",
    "half \ud83d of a pair",
]


def scored(tokens: str, logprobs: list[float], text: str | None = None, **more: Any) -> dict[str, Any]:
    """A record as ``mlmfast score`` writes it, of pieces parted by spaces."""
    pieces = tokens.split(" ")
    pll = math.fsum(logprobs)
    text = tokens.replace(" ", "").replace("▁", " ").strip() if text is None else text
    record = {"text": text, "pll": pll, "tokens": pieces, "logprobs": logprobs}
    return record | {"perplexity": math.exp(-pll / len(pieces))} | more


def logprobs_in(page: str) -> list[float]:
    """The exact values on a page, in order."""
    return [float(value) for value in re.findall(r" data-l=(\S+?)[ >]", page)]


def nasty(text: str) -> dict[str, Any]:
    """A record whose tokens are a text's words."""
    words = text.split(" ")
    return scored(" ".join(words), [-0.5 * (i + 1) for i in range(len(words))], text)


SCORES = [
    scored("▁The ▁cat ▁sat .", [-0.046118654, -6.23711, -5.4317164, -0.041820414], ranks=[1, 103, 47, 1]),
    {"text": "much " * 900, "error": "row 2 has 900 tokens; tiny holds 512"},
    scored("▁incomp rehens ible ▁the ore m", [-4.046025, -1.1775258, -3.2219868, -6.2237706, -7.0749044, -15.5]),
    scored("▁שלום ▁עולם !", [-9.25, -2.5, -0.75], "שלום עולם!"),
    scored("▁" + "x" * 300, [-11.0], "x" * 300),
    {"text": None, "error": f"row 6 is not JSON: {INJECTION}"},
    *map(nasty, NASTY),
    scored("▁tea", [-0.1]),
]


def ranked(prompt: str, options: dict[str, float]) -> dict[str, Any]:
    """A question as a page takes it, each option one token of that log-probability."""
    values = list(options.values())
    weights = [math.exp(value) for value in values]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return {
        "prompt": prompt,
        "options": list(options),
        "values": values,
        "probabilities": [weight / sum(weights) for weight in weights],
        "best": list(options)[order[0]],
        "order": order,
        "cache": "none",
        "scores": [{"tokens": [f"▁{one.strip()}"], "logprobs": [value]} for one, value in options.items()],
    }


RANKINGS = [
    ranked("She drank a cup of", {" chairs": -9.0, " tea": -1.5, " coffee": -2.25}),
    {"prompt": INJECTION, "options": None, "error": "row 2 has no list of strings in 'options'"},
    ranked(INJECTION, {f" {text}": -3.0 - i for i, text in enumerate(NASTY)}),
    ranked("Only", {" one": -2.0}),
]


def excerpt_of(records: list[dict[str, Any]]) -> Excerpt:
    excerpt = Excerpt()
    excerpt.take(records)
    return excerpt


def heading_of(records: list[dict[str, Any]], kind: str = "score", rows: int | None = None) -> Heading:
    errors = sum("error" in record for record in records)
    settings = {"input": f"/folder/{INJECTION}", "metric": "original"}
    return Heading(kind, f"Scores of {INJECTION}", {"Model": INJECTION}, settings, rows or len(records), errors)
