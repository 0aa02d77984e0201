"""The needle test's heat maps: lengths down, placements across, a panel a model."""

from __future__ import annotations

import importlib
import importlib.util
import math
from pathlib import Path
from typing import Any

from mlmfast.icl.figures import save


def draw(found: dict[str, Any], path: Path) -> list[Path]:
    """Writes ``path`` as PNG and SVG; nothing where matplotlib is not installed.

    Args:
        found: a report of :mod:`mlmfast.icl.needle_report`.
        path: the figure's, without a suffix.

    Returns:
        What was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    models = found["models"]
    rows = max(len(model["rows"]) for model in models)
    places = found["settings"]["placements"]
    with matplotlib.rc_context({"font.size": 8}):
        width, height = max(0.42 * places + 1.6, 4.5), 0.34 * rows + 1.5
        figure = figures.Figure(figsize=(width, height * len(models)), layout="constrained")  # draws without a screen
        for panel, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models):
            _panel(panel, model, places)
        figure.suptitle(f"Numbers found, per cent (chance {found['chance']['number']:.4%})")
        return save(figure, path)


def _panel(panel: Any, model: dict[str, Any], places: int) -> None:
    shares = [
        [math.nan if share is None else 100 * share for share in row.get("accuracy", [None] * places)]
        for row in model["rows"]
    ]
    panel.set_facecolor("0.85")  # shows where there is no number
    panel.imshow(shares, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for line, row in enumerate(model["rows"]):
        if "too_long" in row:
            panel.text((places - 1) / 2, line, "too long", ha="center", va="center", style="italic")
            continue
        for place, share in enumerate(shares[line]):
            if not math.isnan(share):
                colour = "black" if share > 60 else "white"  # the map runs from dark to light
                panel.text(place, line, f"{share:.0f}", ha="center", va="center", color=colour)
    panel.set_xticks(range(places), [f"{place / (places - 1):.1f}" for place in range(places)])
    panel.set_yticks(range(len(shares)), [str(row["length"]) for row in model["rows"]])
    panel.set_xlabel("place of the needle in the text")
    panel.set_ylabel("length in tokens")
    note = f", {model['note']}" if model["note"] else ""
    panel.set_title(f"{model['name']} ({model['kind']}{note})")
