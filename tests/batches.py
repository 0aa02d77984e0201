"""Texts, spans and token budgets to draw batches from."""

from __future__ import annotations

from checkpoints import sentences
from hypothesis import strategies as st
from truth import ALL_METRICS

NAMES = ["bert", "deberta", "deberta, all of it", "modernbert", "esm", "mpnet"]
"""Models of the ``lms`` fixture."""

# A small pool, so that texts, and copies of texts that differ in one word, meet often.
POOL = [
    *sentences(6, seed=3),
    "The cat follow.",
    "The dogs follow.",
    "The dogs follow the cat.",
    "A",
    "Unbelievable unbelievable unbelievable ☃ repainting!",
]

texts = st.lists(st.sampled_from(POOL), min_size=1, max_size=6)
metrics = st.sampled_from(ALL_METRICS)
budgets = st.one_of(st.integers(1, 60), st.integers(61, 2000))
spans = st.one_of(st.none(), st.tuples(st.integers(0, 6), st.integers(7, 40)))


def within(span: tuple[int, int] | None, text: str) -> tuple[int, int] | None:
    """The part of a drawn span that lies in a text; None, all of the text, if that may hold no token."""
    return None if span is None or span[0] >= len(text) - 1 else (span[0], min(span[1], len(text)))
