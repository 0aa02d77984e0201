"""What ``gpu.py`` found besides passes, as tables: ranking, generation, the ops' speeds, failures, what was not run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from table_cells import described, peer_name, refusal, spread, unique

OWN = ("exact", "window", "drafted")


def tabulate(gpu: dict[str, Any]) -> list[str]:
    """A section for each of them that there is."""
    settings = gpu["header"]["settings"]
    lines = ["## Ranking, generation and ops", "", described(gpu["header"]), ""]
    lines += ranking(gpu["ranking"]) if gpu["ranking"] else []
    lines += generation(gpu["generation"], settings) if gpu["generation"] else []
    lines += ops(gpu) if gpu["ops"] else []
    for peer, remedy in gpu["header"]["absent"].items():
        lines += ["", f"{peer} is not installed there, so it was not compared with: {remedy}."]
    return [*lines, *checks(gpu["checks"]), *left(gpu), ""]


def ranking(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Milliseconds a question; losses in bold."""
    lines = ["### Ranking", ""]
    lines += [
        "`rank` of a question, prompt and candidates from text on, against each candidate's copies on its own; medians "
        f"of {rows[0]['details']['pairs']} rounds of {rows[0]['details']['asked']} questions, one after another. "
        "*Copies* are all that the candidates ask for, and those that differ.",
        "",
        "| shape | dtype | question | copies | mlmfast | of peak | peer | peer's time | ratio | max diff |",
        "|---|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        details, speeds = row["details"], ["", "", refusal(row["details"]), ""]
        asked = details["asked"]
        if row["ratio"] is not None:
            ours, theirs = (
                spread(row[name] / asked * 1e3, [q / asked * 1e3 for q in row[f"{name}_quartiles"]], " ms")
                for name in ("seconds", "peer_seconds")
            )
            speeds = [ours, f"{row['peak_share']:.1%}", theirs]
            speeds.append(loss(spread(row["ratio"], row["ratio_quartiles"], "x"), row["ratio"] < 1))
        copies = f"{row['copies'] // asked}, {details['unique_copies'] / asked:.3g}"
        cells = [row["shape"], row["dtype"], row["case"], copies, *speeds[:2], peer_name(row), *speeds[2:]]
        apart = "" if row["max_abs_diff"] is None else format(row["max_abs_diff"], ".1e")
        lines.append(f"| {' | '.join([*cells, apart])} |")
    return [*lines, ""]


def generation(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Milliseconds a token; peers that are faster than mlmfast in bold."""
    lines = ["### Generation", ""]
    lines += [
        f"Greedy, {settings['new_tokens']} tokens after a prompt, the first pass over it among them; medians of "
        f"{rows[0]['details']['pairs']} rounds. A ratio is the side's time over exact's, or over the window's "
        "(approximate): above 1 that side is the slower. With random weights, how often a draft is right says nothing. "
        "*Same* are the tokens that are exact's.",
        "",
        "| shape | dtype | prompt | side | a token | tokens/s | over exact | over window | same | max diff | how |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        speeds = [refusal(row["details"]), "", "", ""]
        if row["seconds_token"] is not None:
            speeds = [spread(row["seconds_token"] * 1e3, [q * 1e3 for q in row["seconds_token_quartiles"]], " ms")]
            speeds.append(f"{row['tokens_second']:.4g}")
            for ratio in (row["ratio"], row["window_ratio"]):
                told = "" if ratio is None else f"{ratio:.3g}x"
                speeds.append(loss(told, ratio is not None and ratio < 1 and row["side"] not in OWN))
        same = "" if row["same_tokens"] is None else f"{row['same_tokens']:.0%}"
        apart = "" if row["max_abs_diff"] is None else format(row["max_abs_diff"], ".1e")
        cells = [row["shape"], row["dtype"], str(row["prompt"]), row["side"], *speeds, same, apart, manner(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def manner(row: dict[str, Any]) -> str:
    """How a side generates, and what its time is of the device's own rates."""
    found = [row["details"]["way"]] if "way" in row["details"] else []
    if row["steps"] < row["new_tokens"]:
        found.append(f"{row['steps']} steps, evenly spread")
    if row["peak_share"] is not None:
        found.append(f"{row['peak_share']:.1%} of products")
    if row["bandwidth_share"] is not None:
        found.append(f"{row['bandwidth_share']:.1%} of a copy on weights")
    return "; ".join(found)


def loss(text: str, lost: bool) -> str:
    return f"**{text}**" if lost else text


def ops(gpu: dict[str, Any]) -> list[str]:
    """A line an op, case and backend, and what backends did not take."""
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in gpu["header"]["matrix_rates"].items())
    lines = ["### The ops one by one", ""]
    lines += [
        f"The device's own: a copy moves {gpu['header']['copy_bandwidth'] / 1e12:.3g} TB/s, read and written; matrix "
        f"products run at {rates}. Bytes are the fewest that a call can move. Median of a call, quartiles in brackets.",
        "",
        "| op | dtype | case | backend | time, us | TFLOP/s | of products | TB/s | of a copy | timed by |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in gpu["ops"]:
        cells = [row["op"], row["dtype"], row["case"], row["backend"]]
        if "seconds" not in row:
            cells += [refusal(row), *[""] * 5]
        else:
            cells.append(spread(row["seconds"] * 1e6, [q * 1e6 for q in row["seconds_quartiles"]], ""))
            cells += [f"{row['tflops']:.3g}", f"{row['of_matrix_rate']:.1%}"] if row["flops"] else ["", ""]
            cells += [f"{row['tb_per_second']:.3g}", f"{row['of_copy_bandwidth']:.1%}", row["timed_by"]]
        lines.append(f"| {' | '.join(cells)} |")
    skipped = sorted(gpu["skipped"], key=reason_of)
    for (op, dtype, reason), rows in groupby(skipped, key=reason_of):
        lines += ["", f"{op} in {dtype} not measured so: {reason} ({len(unique(row['case'] for row in rows))} cases)."]
    return lines


def reason_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["dtype"], row["skipped"]


def checks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many, and those that failed."""
    wrong = [row for row in rows if not row["agrees"]]
    lines = ["", f"### Checks: {len(rows)} of ops against float64, {len(wrong)} wrong or failed", ""]
    for row in wrong:
        why = row.get("failure") or f"error {row['error']}, bound {row['bound']}"
        lines.append(f"- {row['op']}, {row['dtype']}, {row['case']}, {row['backend']}: {why}")
    return lines


def left(gpu: dict[str, Any]) -> list[str]:
    """Steps that failed or were not run."""
    lines = []
    for name, items in (
        ("Failed", [f"{f['step']}: {f['reason']}" for f in gpu["failed"]]),
        ("Not run", gpu["not_run"]),
    ):
        if items:
            lines += ["", f"### {name}", "", *(f"- {item}" for item in items)]
    return lines
