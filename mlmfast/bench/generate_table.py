"""``mlmfast bench generate`` for readers: a table a case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from mlmfast.bench.generate import Measurement


def page(header: dict[str, Any], measurements: Sequence[Measurement]) -> str:
    """What a reader is shown, in Markdown: a table a case, and what disagrees."""
    settings = header["settings"]
    gpu = f"{header['device']['name']}; " if "device" in header else ""
    lines = [
        f"{gpu}{header['cpu']}, {header['threads']} threads, load {header['load']} at the start; torch "
        f"{header['torch']}, transformers {header['transformers']}, mlmfast {header['mlmfast']}, commit "
        f"{header['commit']}, {header['time']}",
        "",
        f"Seconds a token, medians of {settings['pairs']} interleaved rounds and the middle half of them. A ratio is "
        "the side's seconds over exact's, or over the window's: above 1x the side is the slower. With random "
        "weights, how often a draft is right says nothing. Prompts are counted without special tokens and masks.",
    ]
    for _, group in groupby(measurements, key=lambda m: (m.row.shape, m.row.prompt)):
        some = list(group)
        first = some[0].row
        masks = f"{settings['num_masks']} masks appended"
        lines += ["", f"{first.shape}, prompt of {first.prompt} tokens, {first.new_tokens} new, {masks}", ""]
        cells = [["side", "seconds", "tokens/s", "over exact", "over window", "notes"]]
        cells += [_cells(m) for m in some]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        cells.insert(1, ["-" * width for width in widths])
        lines += ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
    for m in measurements:
        if "bound" in m.details and not m.details["error"] <= m.details["bound"]:  # NaN, too
            found = f"{m.details['judged']}: error {m.details['error']:.2e}, bound {m.details['bound']:.2e}"
            case = f"{m.row.shape}, prompt of {m.row.prompt}"
            lines += ["", f"{case}: {m.row.side} {m.row.dtype} disagrees ({found}), so no speed is shown."]
    return "\n".join(lines)


def _cells(m: Measurement) -> list[str]:
    row, notes = m.row, []
    if row.approximate:
        notes.append("approximate")
    if row.same_tokens is not None:
        notes.append(f"{row.same_tokens:.0%} of tokens exact's")
    if row.max_abs_diff is not None:
        notes.append(f"diff {row.max_abs_diff:.0e}" + (" over all tokens" if row.approximate else ""))
    if row.steps < row.new_tokens:
        notes.append(f"{row.steps} of {row.new_tokens} steps, evenly spread")
    if row.peak_share is not None:
        notes.append(f"{row.peak_share:.1%} of peak")
    if row.bandwidth_share is not None:
        notes.append(f"{row.bandwidth_share:.1%} of copy bandwidth on weights")
    if "tokens_per_pass" in m.details:
        notes.append(f"{m.details['tokens_per_pass']:.2f} tokens a pass")
    if "way" in m.details:
        notes.append(m.details["way"])
    name = f"{row.side} {row.dtype}"
    if row.seconds_token is None:
        return [name, "disagree", "", "", "", ", ".join(notes)]
    return [
        name,
        _spread(row.seconds_token, row.seconds_token_quartiles),
        f"{row.tokens_second:,.2f}",
        "" if row.ratio is None else _spread(row.ratio, row.ratio_quartiles, "x"),
        "" if row.window_ratio is None else f"{row.window_ratio:.3g}x",
        ", ".join(notes),
    ]


def _spread(median: float, quartiles: tuple[float, float] | None, unit: str = "") -> str:
    assert quartiles is not None
    return f"{median:.3g}{unit} ({quartiles[0]:.3g}-{quartiles[1]:.3g})"
