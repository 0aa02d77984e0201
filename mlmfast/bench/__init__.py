"""``mlmfast bench``: speeds side by side with what people use today, printed only where the results agree."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmfast.reporting import reporting, say

if TYPE_CHECKING:
    from mlmfast.bench.pll import Measurement

app = typer.Typer(help="Measure speed against other implementations, side by side.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed against other implementations, side by side."""


@app.command()
def pll(
    shapes: Annotated[
        str, typer.Option(help="deberta-v3-base, roberta-base, toy-deberta, toy-roberta; commas between.")
    ] = "deberta-v3-base,roberta-base",
    lengths: Annotated[str, typer.Option(help="Tokens a text, special ones included; commas between.")] = "24,64,128",
    copies: Annotated[int, typer.Option(min=1, help="Masked copies in a pass.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of both sides.")] = "float32",
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved pairs of runs; medians are shown.")] = 7,
    against: Annotated[str, typer.Option(help="hf: Hugging Face's model with eager attention.")] = "hf",
    peer_batch: Annotated[int, typer.Option(min=1, help="Copies that the peer computes in one pass.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Of both sides; torch's choice unless given.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or one that `mlmfast doctor` lists.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, a row a case.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write rows, quartiles, machine and versions here.")] = None,
) -> None:
    """Time pseudo-log-likelihoods of random texts, random weights in the shapes of published models.

    Both sides compute the same log-probabilities from the same weights; where they differ by more than rounding, the
    row says so and has no speeds. A ratio above 1 is a win for mlmfast; losses are printed too. Exit status: 0 all
    rows measured, 1 some disagree, 2 the request is wrong.
    """
    with reporting():
        from mlmfast.bench.pll import Measurement, record, run
        from mlmfast.errors import RequestError

        try:
            sizes = [int(length) for length in _listed(lengths)]
        except ValueError:
            raise RequestError(f"--lengths {lengths} is not a list of whole numbers") from None
        header: dict[str, Any] = {}
        measurements: list[Measurement] = []
        if output is not None and not output.parent.is_dir():  # found now, not after minutes of measuring
            raise RequestError(f"--output {output}: there is no folder {output.parent}")
        settings: dict[str, Any] = {"copies": copies, "dtype": dtype, "pairs": pairs, "against": against}
        settings |= {"peer_batch": peer_batch, "backend": backend, "threads": threads}
        for item in run(_listed(shapes), sizes, **settings):
            if not isinstance(item, Measurement):
                header = item
                continue
            measurements.append(item)
            if as_json:
                typer.echo(json.dumps(asdict(item.row)))
            else:
                say(f"measured {item.row.shape}, length {item.row.length}")
            if output is not None:  # after each case, so that an interrupted run leaves what it has
                output.write_text(json.dumps(record(header, measurements), indent=1) + "\n", encoding="utf-8")
        if not as_json:
            _show(header, measurements)
    raise typer.Exit(0 if all(m.details["agrees"] for m in measurements) else 1)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _show(header: dict[str, Any], measurements: list[Measurement]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    settings, backends = header["settings"], sorted({m.row.backend for m in measurements})
    table = Table(
        title=f"{settings['copies']} masked copies, {settings['dtype']}, {header['threads']} threads: mlmfast "
        f"({', '.join(backends)}) and {measurements[0].row.peer}, medians of {settings['pairs']} interleaved pairs",
        caption=f"{header['cpu']}; torch {header['torch']}, transformers {header['transformers']}, mlmfast "
        f"{header['mlmfast']}, commit {header['commit']}; the peer computes {settings['peer_batch']} copies a pass",
        box=box.SIMPLE_HEAD,
    )
    for name in ("shape", "length", "seconds", "peer", "ratio", "of peak", "max diff"):
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    for m in measurements:
        row = m.row
        speeds = ["", "", "disagree", ""]
        if row.seconds is not None:
            speeds = [f"{row.seconds:.3f}", f"{row.peer_seconds:.3f}", f"{row.ratio:.2f}x", f"{row.peak_share:.1%}"]
        table.add_row(row.shape, str(row.length), *speeds, f"{row.max_abs_diff:.1e}")
    console = Console()
    console.print(table)
    for m in measurements:
        if not m.details["agrees"]:
            console.print(
                f"{m.row.shape}, length {m.row.length}: the two sides disagree (error {m.details['error']:.2e}, bound "
                f"{m.details['bound']:.2e}), so no speed is shown: whatever is faster computes something else."
            )
