"""``mlmfast compare``: two outputs of ``mlmfast score``, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmfast.reporting import reporting, say

if TYPE_CHECKING:
    from mlmfast.compare import Comparison


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="An output of mlmfast score: a file or a folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of the same input.")],
    top: Annotated[int, typer.Option(min=0, help="How many of the rows that differ most are shown.")] = 10,
    figure: Annotated[
        str | None, typer.Option(help="Draw the PLLs a token of A against B: a .png or .svg file; needs matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare two outputs of score, of two models or two settings on the same input.

        mlmfast compare roberta.jsonl deberta.jsonl --figure compare.png

    Rows are joined by place, and their texts must be equal. Prints how many rows either could not score, sums and means
    of the PLL, their differences, correlations, and the rows that differ most.

    Exit status: 0 they are compared, 2 the request is wrong.
    """
    with reporting():
        from mlmfast import compare as comparing
        from mlmfast.writers import replace

        if figure is not None:
            comparing.check_figure(figure, a, b)
        found = comparing.compare(a, b, top)
        if figure is not None:
            replace(Path(figure).resolve(), comparing.draw(found, Path(figure).suffix.lower().removeprefix(".")))
        if as_json:
            typer.echo(json.dumps(found.as_dict(), indent=1))
        else:
            _print(found)
        if figure is not None:
            say(f"{figure} is drawn")


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    told = found.as_dict()
    console.print(Text(f"A  {told['a']}\nB  {told['b']}"))
    errors = ", ".join(f"{count:,} in {name}" for count, name in zip(found.errors, ("A", "B", "either")))
    console.print(f"{found.rows:,} rows, {told['compared']:,} compared; with an error: {errors}", highlight=False)
    totals, means = told["pll"], told["pll_per_token"]
    table = Table(caption="nats")
    for name in ("", "PLL", "PLL a token"):
        table.add_column(name, justify="right" if name else "left")
    for i, side in enumerate("AB"):
        table.add_row(f"sum of {side}", _number(totals["sum"][i], ",.2f"), "")
        table.add_row(f"mean of {side}", _number(totals["mean"][i]), _number(means["mean"][i]))
    names = {"pearson": "Pearson correlation", "spearman": "Spearman correlation"}
    for name in ("mean_absolute_difference", "max_absolute_difference", "pearson", "spearman"):
        table.add_row(names.get(name, name.replace("_", " ")), _number(totals[name]), _number(means[name]))
    for name, what in (("a_higher", "rows where A is higher"), ("b_higher", "where B is"), ("equal", "equal")):
        table.add_row(what, f"{totals[name]:,}", f"{means[name]:,}")
    console.print(table)
    if found.differing:
        table = Table(title="Rows that differ most in PLL")
        for name in ("row", "A", "B", "A - B", "text"):
            table.add_column(name, justify="left" if name == "text" else "right", no_wrap=name != "text")
        for one in found.differing:
            numbers = (f"{value:.4f}" for value in (one.a, one.b, one.a - one.b))
            table.add_row(f"{one.row:,}", *numbers, Text(repr(one.text)))
        console.print(table)


def _number(value: Any, form: str = ",.4f") -> str:
    return "-" if value is None else format(value, form)
