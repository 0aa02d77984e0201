"""Ranking with ``cache="prefix"`` (approximate) against exact ranking: which choices change, by how much, how fast.

    python benchmarks/prefix.py --data rte_dev.jsonl.gz --output benchmarks/results/prefix_tiny

``--data`` is JSON Lines with a premise, a hypothesis and a label. Two ways to ask of each:

- **judge**: ``premise question: hypothesis True or False? answer:`` with the options `` True`` and `` False``;
- **match**: the premise, with its own hypothesis and those of four other rows as the options: longer ones, which differ
  in length, behind prompts of all lengths.

Speeds are of both ways in turn, question by question; they mean something on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from agreement import errors, spearman
from record import beside, machine_line, table, write

METRICS = ("window", "original", "global_l2r")
OTHERS = 4
# Prompts are grouped by their tokens, these bounds included.
BANDS = ((1, 31), (32, 63), (64, 127), (128, 511))

Question = tuple[str, list[str]]


def questions(rows: Sequence[dict[str, str]], way: str) -> list[Question]:
    """Prompts and options; in **match** the right one comes first."""
    if way == "judge":
        return [
            (f"{row['premise']}\n question: {row['hypothesis']} True or False?\n answer:", [" True", " False"])
            for row in rows
        ]
    found = []
    for i, row in enumerate(rows):
        others = [rows[(i + 1 + (n + 1) * len(rows) // (OTHERS + 1)) % len(rows)] for n in range(OTHERS)]
        found.append((row["premise"], [f" {one['hypothesis']}" for one in (row, *others)]))
    return found


def compare(lm: Any, asked: Sequence[Question], metric: str, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """A record a group of prompts, and one of all of them first."""
    exact: list[Any] = []
    near: list[Any] = []
    seconds = np.zeros((2, len(asked)))
    for i, (prompt, options) in enumerate(asked):
        for side, (cache, into) in enumerate((("none", exact), ("prefix", near))):
            begin = time.perf_counter()
            into.append(lm.rank(prompt, options, metric=metric, cache=cache, progress=False))
            seconds[side, i] = time.perf_counter() - begin
    groups = {"all": list(range(len(asked)))}
    groups |= {f"{low}-{high}": [i for i, n in enumerate(tokens) if low <= n <= high] for low, high in BANDS}
    found = []
    for name, members in groups.items():
        if not members:
            continue
        right, other = ([of[i] for i in members] for of in (exact, near))
        values = [np.concatenate([one.values for one in of]) for of in (right, other)]
        scores = [[score for one in of for score in one.scores] for of in (right, other)]
        logprobs = [np.concatenate([score.logprobs for score in of]) for of in scores]
        found.append(
            {
                "prompts": name,
                "questions": len(members),
                "prompt_tokens": float(np.mean([tokens[i] for i in members])),
                "option_tokens": float(np.mean([len(score) for score in scores[0]])),
                "equal": float(np.mean([a.order[0] == b.order[0] for a, b in zip(right, other)])),
                "first": [float(np.mean([one.order[0] == 0 for one in of])) for of in (right, other)],
                "errors": errors(logprobs[1], logprobs[0]),
                "spearman": spearman(*values),
                "ratio": float(np.median(seconds[0, members] / seconds[1, members])),
            }
        )
    return found


def page(result: dict[str, Any], picture: str | None) -> list[str]:
    """The result for readers, with a figure's name if there is one."""
    lines = [
        f'# Ranking with `cache="prefix"` (approximate) against exact, model `{result["model"]}`',
        "",
        f"{result['rows']} rows of {result['data']}. **judge**: True or False after premise and question; **match**: a "
        f"premise's own hypothesis, the right one, among {OTHERS} others. Errors in nats a token. **Times as fast**: "
        "the median over questions of exact's seconds to prefix's, text to ranking.",
        "",
        *([] if picture is None else [f"![choices and speed]({picture})", ""]),
    ]
    header = ["way, metric, prompt's tokens", "questions", "tokens a prompt", "tokens an option", "same choice"]
    header += ["right, exact", "right, prefix", "mean error", "bias", "99 %", "rank correlation", "times as fast"]
    rows = []
    for one in result["rows_by_group"]:
        right = [f"{share:.1%}" for share in one["first"]] if one["way"] == "match" else ["", ""]
        correlation = one["spearman"]
        rows.append(
            [
                f"{one['way']}, {one['metric']}, {one['prompts']}",
                str(one["questions"]),
                f"{one['prompt_tokens']:.0f}",
                f"{one['option_tokens']:.1f}",
                f"{one['equal']:.1%}",
                *right,
                f"{one['errors']['mean']:.3f}",
                f"{one['errors']['bias']:+.3f}",
                f"{one['errors']['p99']:.2f}",
                "" if correlation is None else f"{correlation:.4f}",
                f"{one['ratio']:.2f}",
            ]
        )
    return [*lines, *table(header, rows), "", machine_line(result["machine"])]


def draw(result: dict[str, Any], output: Path) -> None:
    """The share of equal choices by way and metric, and the speed by the prompts' tokens."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    colours = dict(zip(METRICS, ["#222222", "#0072B2", "#D55E00"]))  # Okabe and Ito's
    ways = ["judge", "match"]
    for place, metric in enumerate(METRICS):
        mine = [one for one in result["rows_by_group"] if one["metric"] == metric]
        shares = [next(100 * one["equal"] for one in mine if (one["way"], one["prompts"]) == (w, "all")) for w in ways]
        heights = [n + (place - 1) * 0.26 for n in range(len(ways))]
        left.barh(heights, shares, 0.22, color=colours[metric], label=metric)
        bands = [one for one in mine if one["way"] == "match" and one["prompts"] != "all"]
        right.plot(
            [one["prompt_tokens"] for one in bands],
            [one["ratio"] for one in bands],
            "o-",
            markersize=3,
            color=colours[metric],
        )
    left.set_yticks(range(len(ways)), ways)
    left.set_xlim(0, 100)
    left.xaxis.set_major_formatter("{x:g} %")
    left.set_title("questions with the same choice as exact's", loc="left", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("tokens a prompt")
    right.set_title("match: times as fast as exact", loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(output, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON Lines: premise, hypothesis, label")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", type=Path, required=True, help="without suffix")
    parser.add_argument("--most", type=int, default=1000, help="rows, spread evenly")
    given = parser.parse_args()

    import mlmfast
    from mlmfast.bench.machine import describe
    from mlmfast.readers import Malformed, read_objects

    rows = [row for row in read_objects(given.data) if not isinstance(row, Malformed)]
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(given.most, len(rows))).round().astype(int)]
    machine = describe()
    lm = mlmfast.load(given.model)
    found = []
    for way in ("judge", "match"):
        asked = questions(rows, way)
        tokens = [len(ids) for ids in lm.tokenizer([prompt for prompt, _ in asked])["input_ids"]]
        lm.rank(*asked[0], cache="prefix")  # what happens once
        for metric in METRICS:
            found += [{"way": way, "metric": metric} | one for one in compare(lm, asked, metric, tokens)]
    result = {
        "model": given.model,
        "data": Path(given.data).name,
        "rows": len(rows),
        "machine": machine,
        "rows_by_group": found,
    }
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        draw(result, beside(given.output, ".png"))
    write(given.output, result, page(result, beside(given.output, ".png").name if drawn else None))


if __name__ == "__main__":
    main()
