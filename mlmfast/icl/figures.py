"""Scores by shots and by size, drawn from a report, published ones hollow beside them. Needs matplotlib."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from mlmfast.icl import gpt2
from mlmfast.icl.report import NAMES, published, reference, scaled


def draw(folder: Path, report: dict[str, Any]) -> list[Path]:
    """``shots.png``, ``shots.svg``, ``size.png``, ``size.svg``: a panel a task, its first metric."""
    figures = importlib.import_module("matplotlib.figure")
    tasks = list(dict.fromkeys(result["task"] for result in report["results"]))
    written = []
    for name, panel in (("shots", _by_shots), ("size", _by_size)):
        columns = min(3, len(tasks))
        rows = math.ceil(len(tasks) / columns)
        figure = figures.Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")  # draws without a screen
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for task, axis in zip(tasks, axes.flat):
            results = [result for result in report["results"] if result["task"] == task]
            metric = next(iter(results[0]["metrics"]))
            panel(axis, task, metric, results, report)
            chance = results[0]["metrics"][metric]["chance"]
            if chance is not None:
                axis.axhline(scaled(metric, chance), color="0.5", linestyle=":", linewidth=1, label="chance")
            axis.set_title(task)
            axis.set_ylabel(NAMES.get(metric, metric))
            axis.legend(fontsize="x-small")
        written += save(figure, folder / name)
    return written


def save(figure: Any, path: Path) -> list[Path]:
    """Writes ``path`` as PNG and SVG; the same figure is the same files."""
    matplotlib = importlib.import_module("matplotlib")
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with matplotlib.rc_context({"svg.hashsalt": "mlmfast"}):
        figure.savefig(written[0], dpi=200, metadata={"Software": None})
        figure.savefig(written[1], metadata={"Date": None})
    return written


def _by_shots(axis: Any, task: str, metric: str, results: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """A line a model; the bars are standard deviations over repetitions."""
    for model in report["models"]:
        own = sorted((one for one in results if one["model"] == model["label"]), key=lambda one: one["shots"])
        numbers = [one["metrics"][metric] for one in own]
        axis.errorbar(
            [one["shots"] for one in own],
            [scaled(metric, one["mean"]) for one in numbers],
            yerr=[scaled(metric, one["std"] or 0.0) for one in numbers],
            marker="o" if model["kind"] == "masked" else "s",
            capsize=2,
            label=model["label"],
        )
    # What the paper calls few is no number of shots, so it has no place on this axis.
    for name, scores in _scores(task, metric).items():
        known = [one for one in ("0", "1") if one in scores]
        if not known:
            continue
        axis.plot(
            [int(one) for one in known],
            [scores[one] for one in known],
            "--",
            marker="o",
            markerfacecolor="none",
            alpha=0.6,
        )
        axis.lines[-1].set_label(f"{name} (published)")
    shots = sorted({one["shots"] for one in results})
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(shots, [str(one) for one in shots])
    axis.minorticks_off()
    axis.set_xlabel("shots")


def _by_size(axis: Any, task: str, metric: str, results: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """A point a model; a colour for each number of shots."""
    known = published()["models"] | gpt2.published()["models"]
    sizes = {model["label"]: (model["parameters"], model["kind"]) for model in report["models"]}
    shots = sorted({one["shots"] for one in results})
    colours = {one: f"C{place}" for place, one in enumerate(shots)}
    for one in results:
        size, kind = sizes[one["model"]]
        value = scaled(metric, one["metrics"][metric]["mean"])
        marker = "o" if kind == "masked" else "s"
        axis.plot(size, value, marker, color=colours[one["shots"]])
        axis.annotate(one["model"], (size, value), fontsize="xx-small", xytext=(4, 2), textcoords="offset points")
    for name, scores in _scores(task, metric).items():
        for label, value in scores.items():
            # Few of theirs beside the most of ours.
            colour = "0.4" if label == "few" else colours.get(int(label), "0.7")
            marker = "o" if known[name]["kind"] == "masked" else "s"
            axis.plot(known[name]["parameters"], value, marker, color=colour, markerfacecolor="none")
        axis.annotate(
            f"{name} (published)",
            (known[name]["parameters"], max(scores.values())),
            fontsize="xx-small",
            xytext=(-30, 5),
            textcoords="offset points",
        )
    for one, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=f"{one} shots")
    if any("few" in scores for scores in _scores(task, metric).values()):
        axis.plot([], [], "o", color="0.4", markerfacecolor="none", label="few shots, published")
    axis.set_xscale("log")
    axis.set_xlabel("parameters")


def _scores(task: str, metric: str) -> dict[str, dict[str, float]]:
    """Published ones of models."""
    models = published()["models"] | gpt2.published()["models"]
    return {name: one for name, one in reference(task, metric, True).items() if name in models}
