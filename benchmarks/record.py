"""What every measuring script here writes: OUTPUT.json, and a page of it for readers, OUTPUT.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(output: Path, result: dict[str, Any], page: Sequence[str]) -> None:
    """Writes both files and prints the page."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(page) + "\n"
    beside(output, ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside(output, ".md").write_text(text, encoding="utf-8")
    print(text)


def beside(output: Path, suffix: str) -> Path:
    """``output`` with a suffix added, whatever dots its name has."""
    return output.with_name(output.name + suffix)


def machine_line(header: dict[str, Any]) -> str:
    """Where and with what something was measured, of :func:`mlmfast.bench.machine.describe`."""
    return (
        f"{header['cpu']}, {header['threads']} threads, load {header['load']} at the start; Python {header['python']}, "
        f"torch {header['torch']}, transformers {header['transformers']}, mlmfast {header['mlmfast']}, "
        f"commit {header['commit']}, {header['time']}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is left-aligned and whose others are figures."""
    rule = ["---", *("---:" for _ in header[1:])]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
