"""What the needle test found, as JSON and as a Markdown table, with chance and the published figures beside it."""

from __future__ import annotations

from typing import Any

from mlmfast.icl.needle_run import CHANCE, DIGIT_CHANCE
from mlmfast.icl.report import table

# Samuel 2024 (arXiv 2406.04823), figure 3: accuracy in per cent at 11 placements, 212 needles each; not measured here.
DEBERTA = {
    256: (98, 95, 93, 95, 96, 97, 95, 96, 98, 96, 94),
    384: (98, 96, 93, 93, 95, 96, 91, 93, 96, 96, 94),
    512: (96, 92, 86, 89, 87, 90, 86, 92, 93, 95, 94),
    768: (89, 81, 78, 78, 83, 81, 82, 84, 88, 90, 95),
    1024: (88, 75, 75, 76, 79, 77, 75, 82, 81, 86, 95),
    1536: (86, 76, 75, 75, 75, 77, 66, 70, 75, 85, 96),
    2048: (88, 72, 70, 67, 68, 71, 63, 61, 66, 74, 95),
    3072: (82, 63, 58, 65, 63, 60, 55, 57, 56, 62, 94),
    4096: (81, 66, 56, 57, 60, 56, 49, 57, 51, 50, 93),
    6144: (79, 58, 55, 58, 49, 51, 42, 54, 44, 47, 92),
    8192: (69, 46, 43, 46, 45, 37, 32, 40, 34, 40, 88),
    12288: (9, 2, 3, 3, 3, 2, 3, 0, 3, 3, 32),
}
# Of OPT-1.3B the range over the placements.
OPT = dict.fromkeys((256, 384, 512, 768), "96 to 100") | {1024: "94 to 98", 1536: "90 to 99", 2048: "82 to 99"}
OPT |= dict.fromkeys((3072, 4096, 6144, 8192, 12288), "0")
SOURCE = "Samuel 2024 (arXiv 2406.04823), figure 3: published, not measured here"


def report(settings: dict[str, Any], models: list[dict[str, Any]]) -> dict[str, Any]:
    """All that was found.

    Args:
        settings: what was asked, the same for all models.
        models: of each ``name``, ``kind``, ``note``, ``settings`` and ``rows``, which are
            :func:`mlmfast.icl.needle_run.summary`'s.
    """
    rows = [
        {
            "length": length,
            "DeBERTa-1.5B": [share / 100 for share in shares],
            "OPT-1.3B, range in per cent": OPT[length],
        }
        for length, shares in DEBERTA.items()
    ]
    return {
        "settings": settings,
        "chance": {"number": CHANCE, "digit": DIGIT_CHANCE},
        "models": models,
        "published": {"source": SOURCE, "rows": rows},
    }


def markdown(found: dict[str, Any]) -> str:
    """A report as a page: a table a model, chance, and the published figures."""
    settings = found["settings"]
    places = settings["placements"]
    needles = places * settings["repetitions"]
    lines = ["# Needle in a haystack", ""]
    lines += [
        f"Share of six-digit numbers that were given back whole, in per cent, by where the needle stood in the text "
        f"(0.0: before it, 1.0: after it). {needles} needles a length, {settings['repetitions']} a cell, seed "
        f"{settings['seed']}; haystack {settings['haystack']}. Lengths are in each model's own tokens, special ones, "
        f"masks and the number included.",
        "",
        f"Chance: {found['chance']['number']:.5%} of the numbers (1 of 900,000), {found['chance']['digit']:.0%} of the "
        "digits.",
        "",
    ]
    head = [f"{place / (places - 1):.1f}" for place in range(places)]
    for model in found["models"]:
        note = f", **{model['note']}**" if model["note"] else ""
        lines += [f"## {model['name']} ({model['kind']}{note})", ""]
        rows = [[f"{row['length']}", *_cells(row, places)] for row in model["rows"]]
        lines += [*table(["length", *head, "mean", "digits"], rows), ""]
        cut = [f"{row['length']} ({row['truncated']:.0f} tokens)" for row in model["rows"] if row.get("truncated")]
        if cut:
            lines += [f"The beginning was cut off, as the model holds no more, at {', '.join(cut)}.", ""]
        lines += [f"Too long: {row['too_long']}." for row in model["rows"] if "too_long" in row]
        lines += [""] if lines[-1] else []
    lines += ["## Published, for reference", "", f"{SOURCE}. There: 212 needles a cell, essays of another author.", ""]
    head = ["length", *(f"{place / 10:.1f}" for place in range(11)), "mean", "OPT-1.3B"]
    rows = [
        [f"{length}", *map(str, shares), f"{sum(shares) / len(shares):.0f}", OPT[length]]
        for length, shares in DEBERTA.items()
    ]
    lines += [*table(head, rows), "", "DeBERTa-1.5B by placement, its mean, and the range of OPT-1.3B.", ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any], places: int) -> list[str]:
    if "too_long" in row:
        return ["too long", *[""] * (places + 1)]
    return [_percent(share) for share in [*row["accuracy"], row["mean"], row["digits"]]]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
