"""What was measured as tables in Markdown: every row, with machine, versions and commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpu_tables
from table_cells import described, peer_name, refusal, spread, unique


def case_name(row: dict[str, Any]) -> str:
    """What a case is called under its bars."""
    lengths = str(row["length"]) if row["shortest"] == row["length"] else f"{row['shortest']}-{row['length']}"
    return f"{lengths}\n{row['copies']} copies" if row["case"] == "random" else f"{lengths}\nreal texts"


def tabulate(
    passes: Sequence[dict[str, Any]],
    texts: Sequence[dict[str, Any]],
    figure: str,
    gpus: Sequence[dict[str, Any]] = (),
) -> str:
    """The same as Markdown: every row, losses in bold."""
    named = ", ".join(unique(gpu["header"]["device"]["name"] for gpu in gpus if "device" in gpu["header"]))
    lines = [f"# mlmfast side by side with its peers on {named or 'a CPU'}", ""]
    if passes or texts:
        lines += [f"![Ratios by peer, length and shape]({figure})", ""]
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
            speeds = ["", "", refusal(details), ""]
            if row["ratio"] is not None:
                ratio = spread(row["ratio"], row["ratio_quartiles"], "x")
                speeds = [
                    spread(row["seconds"], row["seconds_quartiles"], " s"),
                    f"{row['peak_share']:.1%}",
                    spread(row["peer_seconds"], row["peer_seconds_quartiles"], " s"),
                    ratio if row["ratio"] >= 1 else f"**{ratio}**",
                ]
            cells = [row["shape"], case, str(row["copies"]), *speeds[:2], peer_name(row), *speeds[2:]]
            apart = "" if row["max_abs_diff"] is None else format(row["max_abs_diff"], ".1e")
            lines.append(f"| {' | '.join([*cells, apart, details['peer_way']])} |")
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
    for gpu in gpus:
        lines += gpu_tables.tabulate(gpu)
    return "\n".join(lines)
