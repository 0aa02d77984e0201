"""What an answer is worth, task by task: the paper's metrics, which are GPT-3's."""

from __future__ import annotations

from typing import Any


def accuracy(doc: dict[str, Any], choices: list[str], best: int, gold: int) -> dict[str, Any]:
    """Whether the best candidate is the right one."""
    return {"acc": float(best == gold)}
