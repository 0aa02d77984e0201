"""Results of ``mlmfast bench pll`` and ``bench texts`` -> a figure and a table, with machine, versions and commit.

    python benchmarks/figure.py RESULT.json ... --output benchmarks/results/cpu

Writes ``OUTPUT.png`` and ``OUTPUT.md``. Bars stand on 1x: what hangs below it is slower than the peer. Runs of ``bench
pll`` in one dtype, a peer each for instance, share a table and a row of panels.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart without colour vision.
COLOURS = {
    "hf-eager": "#0072B2",
    "hf-eager float32": "#D55E00",
    "hf-loop": "#0072B2",
    "hf-compile": "#56B4E9",
    "minicons": "#CC79A7",
    "onnxruntime": "#E69F00",
    "openvino": "#009E73",
    "mlmfast": "#222222",
}
OTHER = "#999999"


def read(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results of ``bench pll``, joined a dtype, and those of ``bench texts``."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return joined([r for r in results if "shape" in r["rows"][0]]), [r for r in results if "model" in r["rows"][0]]


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


def machine(header: dict[str, Any]) -> str:
    """Machine, versions and commit: what runs on one day have in common."""
    versions = ", ".join(f"{name} {header[name]}" for name in ("python", "torch", "transformers", "mlmfast"))
    cpu = f"{header['cpu']} ({header['instructions']}), {header['threads']} threads"
    return f"{cpu}; {versions}; commit {header['commit']}"


def described(header: dict[str, Any]) -> str:
    """A run: what it compared with, where and when."""
    against = header.get("peers") or dict.fromkeys(header["settings"]["against"], "")
    peers = ", ".join(f"{name} {version}".rstrip() for name, version in against.items())
    note = f" {header['note']}" if "note" in header else ""
    return f"{machine(header)}; against {peers}; {header['time']}, load {header['load']} at the start.{note}"


def case_name(row: dict[str, Any]) -> str:
    """What a case is called under its bars."""
    lengths = str(row["length"]) if row["shortest"] == row["length"] else f"{row['shortest']}-{row['length']}"
    return f"{lengths}\n{row['copies']} copies" if row["case"] == "random" else f"{lengths}\nreal texts"


def peer_name(row: dict[str, Any]) -> str:
    """The peer, with its dtype where that is another than ours."""
    return row["peer"] if row["peer_dtype"] == row["dtype"] else f"{row['peer']} {row['peer_dtype']}"


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


# ---- the figure


def draw(passes: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]], output: Path) -> None:
    """A row of panels a dtype with a panel a shape, then a panel a model of texts a second."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    models = [row["model"] for result in texts for row in result["rows"]]
    rows = len(passes) + bool(models)
    columns = max([len(unique(row["shape"] for row in r["rows"])) for r in passes] + [len(unique(models)), 1])
    figure, axes = plt.subplots(rows, columns, figsize=(7.2 * columns, 3.6 * rows + 0.9), squeeze=False)
    for line, result in zip(axes, passes):
        shapes = unique(row["shape"] for row in result["rows"])
        for panel, shape in zip(line, shapes):
            draw_ratios(panel, [row for row in result["rows"] if row["shape"] == shape])
        for panel in line[len(shapes) :]:
            panel.set_axis_off()
    if models:
        every = [row for result in texts for row in result["rows"]]
        for panel, model in zip(axes[-1], unique(models)):
            draw_rates(panel, [row for row in every if row["model"] == model])
        for panel in axes[-1][len(unique(models)) :]:
            panel.set_axis_off()
    headers = [header for result in passes for header in result["headers"]] + [result["header"] for result in texts]
    notes = unique(machine(header) for header in headers)
    bottom = 0.02 + 0.022 * len(notes)
    figure.tight_layout(rect=(0, bottom, 1, 1), h_pad=2.0)
    figure.text(0.01, 0.008, "\n".join(notes), fontsize=6, color="#444444", va="bottom")
    figure.savefig(output, dpi=160)
    plt.close(figure)


def draw_ratios(panel: Any, rows: Sequence[dict[str, Any]]) -> None:
    """One shape: a group of bars a case, a bar a peer, all standing on or hanging from 1x."""
    cases = unique(case_name(row) for row in rows)
    names = unique(peer_name(row) for row in rows)
    width = 0.84 / len(names)
    for row in rows:
        name = peer_name(row)
        x = cases.index(case_name(row)) + (names.index(name) - (len(names) - 1) / 2) * width
        if row["ratio"] is None:
            panel.annotate("disagrees", (x, 1.02), rotation=90, ha="center", va="bottom", fontsize=6, color="#AA0000")
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


# ---- the table


def spread(value: float, quartiles: Sequence[float], unit: str) -> str:
    return f"{value:.3g}{unit} ({quartiles[0]:.3g}-{quartiles[1]:.3g})"


def tabulate(passes: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]], figure: str) -> str:
    """The same as Markdown: every row, losses in bold."""
    lines = ["# mlmfast side by side with its peers on a CPU", "", f"![Ratios by peer, length and shape]({figure})", ""]
    lines += [
        "Medians of interleaved rounds, quartiles in brackets; a ratio is that of the medians, its quartiles are those "
        "of single rounds' ratios. Above 1 is a win for mlmfast; **losses are bold**. Every row's log-probabilities "
        "were compared first; a row whose sides disagree has no speed. *Of peak* is the useful work over the machine's "
        "best matrix product in the same run.",
        "",
    ]
    for result in passes:
        lines += [f"## A pass, mlmfast in {result['dtype']}", ""]
        lines += [f"- {header['settings']['pairs']} rounds: {described(header)}" for header in result["headers"]]
        lines.append("")
        columns = ["shape", "tokens a copy", "copies", "mlmfast", "of peak", "peer", "peer's time", "ratio", "max diff"]
        lines += [f"| {' | '.join([*columns, 'how the peer computes'])} |"]
        lines += ["|---|---:|---:|---:|---:|---|---:|---:|---:|---|"]
        for row, details in zip(result["rows"], result["details"]):
            case = case_name(row).partition("\n")[0] + (" (real texts)" if row["case"] == "texts" else "")
            speeds = ["", "", "disagrees", ""]
            if row["ratio"] is not None:
                ratio = spread(row["ratio"], row["ratio_quartiles"], "x")
                speeds = [
                    spread(row["seconds"], row["seconds_quartiles"], " s"),
                    f"{row['peak_share']:.1%}",
                    spread(row["peer_seconds"], row["peer_seconds_quartiles"], " s"),
                    ratio if row["ratio"] >= 1 else f"**{ratio}**",
                ]
            cells = [row["shape"], case, str(row["copies"]), *speeds[:2], peer_name(row), *speeds[2:]]
            lines.append(f"| {' | '.join([*cells, format(row['max_abs_diff'], '.1e'), details['peer_way']])} |")
        lines.append("")
    for result in texts:
        header, settings = result["header"], result["header"]["settings"]
        lines += [f"## {settings['texts']:,} texts from end to end, float32", ""]
        lines += [f"Texts a second over {settings['rounds']} rounds. {described(header)}", ""]
        lines += ["| model | mlmfast | peer | peer's | ratio | texts at once |", "|---|---:|---|---:|---:|---:|"]
        for row in result["rows"]:
            speeds = ["", "disagrees", ""]
            if row["agrees"]:
                ratio = spread(row["ratio"], row["ratio_quartiles"], "x")
                speeds = [
                    spread(row["texts_per_second"], row["texts_per_second_quartiles"], ""),
                    spread(row["peer_texts_per_second"], row["peer_texts_per_second_quartiles"], ""),
                    ratio if row["ratio"] >= 1 else f"**{ratio}**",
                ]
            lines.append(
                f"| {row['model']} | {speeds[0]} | {row['peer']} | {speeds[1]} | {speeds[2]} | {row['peer_batch']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of bench pll and bench texts")
    parser.add_argument("--output", required=True, type=Path, help="path of both files, without .png and .md")
    arguments = parser.parse_args()
    passes, texts = read(arguments.results)
    draw(passes, texts, arguments.output.with_suffix(".png"))
    table = tabulate(passes, texts, arguments.output.with_suffix(".png").name)
    arguments.output.with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
