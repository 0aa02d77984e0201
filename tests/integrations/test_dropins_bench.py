"""The benchmark of the drop-ins compares the same numbers, and shows no ratio where they are not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import sentences

from mlmfast.integrations import bert_in_context

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOOLS = ["minicons", "lm-pub-quiz", "BabyLM 2025", "bert-in-context"]


@pytest.fixture(scope="module")
def dropins() -> Any:
    for package in ("minicons", "lm_pub_quiz"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("benchmarks_dropins", BENCHMARKS / "dropins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tool", TOOLS)
def test_both_sides_agree(dropins: Any, tool: str) -> None:
    assert list(dropins.TOOLS) == TOOLS
    row = dropins.measured(tool, "tiny", sentences(6), 2)
    assert row["agrees"], row
    assert row["ratio"] == row["ours"]["median"] / row["theirs"]["median"]
    assert len(row["ratios"]["all"]) == 2
    result = {"header": dropins.machine.describe(), "settings": {"texts": 6, "rounds": 2}, "rows": [row]}
    assert f"{row['ratio']:.2f}x" in "\n".join(dropins.markdown(result))


def test_a_wrong_side_has_no_ratio(dropins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bert_in_context.score
    monkeypatch.setattr(bert_in_context, "score", lambda *arguments: honest(*arguments) + 0.01)
    row = dropins.measured("bert-in-context", "tiny", sentences(4), 2)
    assert not row["agrees"]
    assert "ratio" not in row
    result = {"header": dropins.machine.describe(), "settings": {"texts": 4, "rounds": 2}, "rows": [row]}
    assert "disagree" in "\n".join(dropins.markdown(result))
