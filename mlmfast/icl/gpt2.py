"""The GPT-2 paper's tasks, as an evaluation and its report see them: demonstrations, and what was published."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

PREFIX = "gpt2_"
# These are shown solved examples; the paper does not say how many.
SHOWN = ("gpt2_translation_en_fr", "gpt2_translation_fr_en", "gpt2_questions")
SHOTS = 5
PUBLISHED = Path(__file__).with_name("published_gpt2.json")
# Texts that are scored whole, by masked models a mask at a time.
WHOLE = ("gpt2_wikitext2", "gpt2_wikitext103", "gpt2_ptb", "gpt2_1bw", "gpt2_enwik8", "gpt2_text8")
# Lower is better, and of a masked model it is no perplexity but a pseudo-perplexity.
PERPLEXITIES = ("perplexity", "word_perplexity", "bits_per_byte", "bits_per_character")


def shots_of(task: str, asked: Collection[int]) -> list[int]:
    """The numbers of demonstrations of one of these tasks: none, or for those that show some, those asked for."""
    if task not in SHOWN:
        return [0]
    return sorted(set(asked) - {0}) or [SHOTS]


def published() -> dict[str, Any]:
    """Section 3 of the paper: ``tasks`` -> name -> metric -> model -> shots (``0`` or ``few``) -> value as printed."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))
