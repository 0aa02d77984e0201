"""Results of ``mlmfast bench pll``, ``bench texts`` and ``gpu.py`` -> a figure and a table, with machine and versions.

    python benchmarks/figure.py RESULT.json ... --output benchmarks/results/cpu

Writes ``OUTPUT.md``, and ``OUTPUT.png`` where matplotlib is installed (elsewhere it can be drawn from the same files).
Bars stand on 1x: what hangs below it is slower than the peer. Runs of ``bench pll`` in one dtype, a peer each for
instance, share a table and rows of panels.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from result_tables import case_name, tabulate
from table_cells import machine, peer_name, unique

# Okabe and Ito's colours, told apart without colour vision.
COLOURS = {
    "hf-eager": "#0072B2",
    "hf-eager float32": "#D55E00",
    "hf-loop": "#0072B2",
    "hf-scored": "#F0E442",
    "disentangled-flash": "#882255",
    "flashdeberta": "#AA4499",
    "hf-compile": "#56B4E9",
    "minicons": "#CC79A7",
    "onnxruntime": "#E69F00",
    "openvino": "#009E73",
    "mlmfast": "#222222",
}
OTHER = "#999999"
# Panels side by side.
COLUMNS = 2

Results = list[dict[str, Any]]


def read(paths: Iterable[Path]) -> tuple[Results, Results, Results]:
    """The results of ``bench pll`` and the passes of ``gpu.py``, joined a dtype; those of ``bench texts``; and what
    ``gpu.py`` found besides."""
    passes: Results = []
    texts: Results = []
    gpus: Results = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        if "ops" in result:
            gpus.append(result)
            passes += by_dtype(result)
        else:
            (passes if "shape" in result["rows"][0] else texts).append(result)
    return joined(passes), texts, gpus


def by_dtype(result: dict[str, Any]) -> Results:
    """The passes of ``gpu.py``, which measures several dtypes, as ``bench pll`` writes them: a result a dtype."""
    found = []
    for dtype in unique(row["dtype"] for row in result["rows"]):
        pairs = [pair for pair in zip(result["rows"], result["details"]) if pair[0]["dtype"] == dtype]
        header = result["header"] | {"settings": result["header"]["settings"] | {"dtype": dtype}}
        rows, details = map(list, zip(*pairs))
        found.append({"header": header, "rows": rows, "details": details})
    return found


def joined(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A result a dtype: the runs' headers, and all their rows with those of one case side by side."""
    found = []
    for dtype in unique(result["header"]["settings"]["dtype"] for result in results):
        runs = [result for result in results if result["header"]["settings"]["dtype"] == dtype]
        rows = [pair for run in runs for pair in zip(run["rows"], run["details"])]
        shapes = unique(row["shape"] for row, _ in rows)
        rows.sort(key=lambda pair: (shapes.index(pair[0]["shape"]), pair[0]["case"], pair[0]["length"]))
        found.append(
            {
                "dtype": dtype,
                "headers": [run["header"] for run in runs],
                "rows": [row for row, _ in rows],
                "details": [details for _, details in rows],
            }
        )
    return found


# ---- the figure


def draw(passes: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]], output: Path) -> None:
    """A panel a dtype and shape, each dtype beginning a row, then a panel a model of texts a second."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    groups: list[list[Callable[[Any], None]]] = []
    for result in passes:
        shapes = unique(row["shape"] for row in result["rows"])
        groups.append([partial(draw_ratios, rows=rows_of(result, "shape", shape)) for shape in shapes])
    every = {"rows": [row for result in texts for row in result["rows"]]}
    models = unique(row["model"] for row in every["rows"])
    groups.append([partial(draw_rates, rows=rows_of(every, "model", model)) for model in models])
    lines = [group[i : i + COLUMNS] for group in groups for i in range(0, len(group), COLUMNS)]
    if not lines:
        return
    columns = max(map(len, lines))
    figure, axes = plt.subplots(len(lines), columns, figsize=(7.2 * columns, 3.6 * len(lines) + 0.9), squeeze=False)
    for row, line in zip(axes, lines):
        for panel, fill in zip(row, line):
            fill(panel)
        for panel in row[len(line) :]:
            panel.set_axis_off()
    headers = [header for result in passes for header in result["headers"]] + [result["header"] for result in texts]
    notes = unique(machine(header) for header in headers)
    bottom = 0.02 + 0.022 * len(notes)
    figure.tight_layout(rect=(0, bottom, 1, 1), h_pad=2.0)
    figure.text(0.01, 0.008, "\n".join(notes), fontsize=6, color="#444444", va="bottom")
    figure.savefig(output, dpi=160)
    plt.close(figure)


def rows_of(result: dict[str, Any], key: str, value: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row[key] == value]


def draw_ratios(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    """One shape: a group of bars a case, a bar a peer, all standing on or hanging from 1x."""
    cases = unique(case_name(row) for row in rows)
    names = unique(peer_name(row) for row in rows)
    width = 0.84 / len(names)
    for row in rows:
        name = peer_name(row)
        x = cases.index(case_name(row)) + (names.index(name) - (len(names) - 1) / 2) * width
        if row["ratio"] is None:
            said = "failed" if row["max_abs_diff"] is None else "disagrees"
            panel.annotate(said, (x, 1.02), rotation=90, ha="center", va="bottom", fontsize=6, color="#AA0000")
            continue
        ratio, (low, high) = row["ratio"], row["ratio_quartiles"]
        panel.bar(
            x,
            ratio - 1,
            width * 0.92,
            bottom=1,
            color=COLOURS.get(name, OTHER),
            hatch="//" if ratio < 1 else None,
            edgecolor="white",
            linewidth=0,
        )
        panel.plot([x, x], [low, high], color="black", linewidth=0.8)
        above = ratio >= 1
        panel.annotate(
            f"{ratio:.1f}" if ratio >= 9.95 else f"{ratio:.2f}",
            (x, max(ratio, high) if above else min(ratio, low)),
            xytext=(0, 2 if above else -2),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=6.5,
            color="black" if above else "#AA0000",
        )
    values = [v for row in rows if row["ratio"] is not None for v in (row["ratio"], *row["ratio_quartiles"])]
    panel.set_yscale("log", base=2)
    panel.set_ylim(min([0.8, *(v / 1.35 for v in values)]), max([2.0, *(v * 2 for v in values)]))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.axhspan(panel.get_ylim()[0], 1, color="#AA0000", alpha=0.06, linewidth=0)
    panel.axhline(1, color="black", linewidth=1)
    panel.text(len(cases) - 0.45, 0.97, "mlmfast slower", ha="right", va="top", fontsize=6.5, color="#AA0000")
    panel.set_xticks(range(len(cases)), cases)
    panel.set_xlim(-0.55, len(cases) - 0.4)
    panel.set_xlabel("tokens a copy")
    panel.set_ylabel("peer's seconds / mlmfast's")
    panel.set_title(f"{rows[0]['shape']} (random weights), mlmfast in {rows[0]['dtype']}", loc="left", weight="bold")
    patches = importlib.import_module("matplotlib.patches")
    handles = [patches.Patch(color=COLOURS.get(name, OTHER), label=name) for name in names]
    panel.legend(handles=handles, fontsize=7, ncols=5, frameon=False, loc="upper left")


def draw_rates(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    """One model from end to end: texts a second of mlmfast and of each peer."""
    agreeing = [row for row in rows if row["agrees"]]
    sides = [("mlmfast", row["texts_per_second"], row["texts_per_second_quartiles"], "") for row in agreeing[:1]]
    for row in agreeing:
        note = f"  (mlmfast {row['ratio']:.2f}x)"
        sides.append((row["peer"], row["peer_texts_per_second"], row["peer_texts_per_second_quartiles"], note))
    for place, (name, rate, (low, high), note) in enumerate(sides):
        panel.barh(place, rate, 0.7, color=COLOURS.get(name, OTHER))
        panel.plot([low, high], [place, place], color="black", linewidth=0.8)
        panel.text(max(rate, high), place, f" {rate:.1f}{note}", va="center", fontsize=8)
    panel.set_yticks(range(len(sides)), [side[0] for side in sides])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.3 * max([1.0, *(side[2][1] for side in sides)]))
    panel.set_xlabel(f"texts a second, end to end, {rows[0]['texts']:,} texts")
    panel.set_title(f"{rows[0]['model']}, float32", loc="left", weight="bold")


def write(paths: Sequence[Path], output: Path) -> None:
    """Both files, ``output`` being their path without a suffix; the table alone without matplotlib."""
    passes, texts, gpus = read(paths)
    picture = output.with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no figure: matplotlib is not installed; elsewhere: figure.py {paths[0]} --output ...", file=sys.stderr)
    else:
        draw(passes, texts, picture)
    output.with_suffix(".md").write_text(tabulate(passes, texts, picture.name, gpus), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of bench pll, bench texts and gpu.py")
    parser.add_argument("--output", required=True, type=Path, help="path of both files, without .png and .md")
    arguments = parser.parse_args()
    write(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
