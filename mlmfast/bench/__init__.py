"""``mlmfast bench``: speeds side by side with what people use today, printed only where the results agree."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmfast.reporting import reporting, say

if TYPE_CHECKING:
    from mlmfast.bench.pll import Measurement, Row

app = typer.Typer(help="Measure speed against other implementations, side by side.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed against other implementations, side by side."""


@app.command()
def pll(
    shapes: Annotated[
        str,
        typer.Option(
            help="deberta-v3-base, deberta-v2-xlarge, deberta-v2-xxlarge, deberta-v1-base, roberta-base, "
            "roberta-large, xlm-roberta-base, modernbert-base, esm2-t12-35m, esm2-t30-150m, esm2-t33-650m, "
            "toy-deberta, toy-deberta-v1, toy-roberta, toy-modernbert, toy-esm; commas between."
        ),
    ] = "deberta-v3-base,roberta-base",
    lengths: Annotated[str, typer.Option(help="Tokens a text, special ones included; commas between.")] = "24,64,128",
    copies: Annotated[int, typer.Option(min=1, help="Masked copies in a pass.")] = 64,
    copy_tokens: Annotated[
        int, typer.Option(min=1, help="Fewer copies where they would have more tokens than this together.")
    ] = 8192,
    texts: Annotated[
        str | None, typer.Option(help="Also real texts of mixed lengths from this file, all their copies in a pass.")
    ] = None,
    field: Annotated[str, typer.Option(help="Column or key of the texts in it.")] = "text",
    text_count: Annotated[int, typer.Option(min=1, help="How many, spread evenly over the file.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of all sides that name no other.")] = "float32",
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved rounds of all sides; medians are shown.")] = 7,
    against: Annotated[
        str,
        typer.Option(
            help="hf (eager attention), hf-scored (its head on scored rows), hf-compile, disentangled-flash, "
            "flashdeberta (on a GPU, texts of one length), minicons, onnxruntime, openvino; commas between; "
            "hf:float32 compares with float32 whatever the dtype."
        ),
    ] = "hf",
    peer_batch: Annotated[
        str, typer.Option(help="Most copies that a peer computes in one pass; auto: what is fastest for it; all.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of all sides; torch's choice unless given.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or one that `mlmfast doctor` lists.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda, of all sides.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, a row a case and peer.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write rows, quartiles, machine and versions here.")] = None,
) -> None:
    """Time pseudo-log-likelihoods of random texts, random weights in the shapes of published models.

    All sides compute the same log-probabilities from the same weights; where a peer and mlmfast differ by more than
    rounding, the row says so and has no speeds. A ratio above 1 is a win for mlmfast; losses are printed too. Exit
    status: 0 all rows measured, 1 some disagree, 2 the request is wrong.
    """
    with reporting():
        from mlmfast.bench.pll import Measurement, record, run
        from mlmfast.bench.sentences import read_sentences

        sizes = _numbers("--lengths", lengths)
        header: dict[str, Any] = {}
        measurements: list[Measurement] = []
        _check_folder(output)
        settings: dict[str, Any] = {"copies": copies, "copy_tokens": copy_tokens, "dtype": dtype, "pairs": pairs}
        settings |= {"against": _listed(against), "backend": backend, "threads": threads, "device": device}
        settings["peer_batch"] = _batch(peer_batch)
        settings["sentences"] = [] if texts is None else read_sentences(texts, field=field, count=text_count)
        for item in run(_listed(shapes), sizes, **settings):
            if not isinstance(item, Measurement):
                header = item
                continue
            measurements.append(item)
            if as_json:
                typer.echo(json.dumps(asdict(item.row)))
            else:
                say(f"measured {item.row.shape}, length {item.row.length}, against {item.row.peer}")
            if output is not None:  # after each case, so that an interrupted run leaves what it has
                output.write_text(json.dumps(record(header, measurements), indent=1) + "\n", encoding="utf-8")
        if not as_json:
            _show(header, measurements)
    raise typer.Exit(0 if all(m.details["agrees"] for m in measurements) else 1)


@app.command()
def generate(
    shapes: Annotated[str, typer.Option(help="As of `bench pll`; commas between.")] = "deberta-v3-base",
    prompts: Annotated[
        str, typer.Option(help="Tokens a prompt, special ones and masks not counted; commas between.")
    ] = "32,128,512",
    new_tokens: Annotated[int, typer.Option(min=1, help="That every side generates; none ends a text.")] = 64,
    peer_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of the Hugging Face loop only so many of the steps in a round, after prefixes of exact's tokens "
            "spread evenly; its agreement is checked there.",
        ),
    ] = 16,
    sides: Annotated[
        str, typer.Option(help="mlmfast's own besides exact: window (approximate), drafted; commas between.")
    ] = "window",
    against: Annotated[
        str,
        typer.Option(
            help="hf (a loop over the model, eager attention, all logits), gpt2 (transformers' own generate with its "
            "cache, a causal model of equal size); commas between; hf:float32 as in `bench pll`."
        ),
    ] = "hf,gpt2",
    num_masks: Annotated[int, typer.Option(min=1, help="Appended masks, the first of which is read.")] = 3,
    recompute: Annotated[int | None, typer.Option(min=1, help="Of the window; generate's own unless given.")] = None,
    refresh: Annotated[str, typer.Option(help="Of the window: steps, never, or auto for generate's own.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of all sides that name no other.")] = "float32",
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved rounds of all sides; medians are shown.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of all sides; torch's choice unless given.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or one that `mlmfast doctor` lists.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda, of all sides.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, a row a case and side.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write rows, quartiles, machine and versions here.")] = None,
) -> None:
    """Time greedy generation after random prompts, random weights in the shapes of published models.

    Exact's choices are checked against plain torch and each loop; where they differ by more than rounding, there are
    no speeds. GPT-2 computes something else and is not checked. Losses are printed too. Exit status: 0 all sides
    measured, 1 some disagree, 2 the request is wrong.
    """
    with reporting():
        from mlmfast.bench.generate import Measurement, record, run
        from mlmfast.bench.generate_table import page

        header: dict[str, Any] = {}
        measurements: list[Measurement] = []
        _check_folder(output)
        settings: dict[str, Any] = {"new_tokens": new_tokens, "peer_tokens": peer_tokens, "num_masks": num_masks}
        settings |= {"recompute": recompute, "refresh": _refresh(refresh), "sides": _listed(sides)}
        settings |= {"against": _listed(against), "dtype": dtype, "pairs": pairs, "backend": backend}
        for item in run(_listed(shapes), _numbers("--prompts", prompts), **settings, threads=threads, device=device):
            if not isinstance(item, Measurement):
                header = item
                continue
            measurements.append(item)
            if as_json:
                typer.echo(json.dumps(asdict(item.row)))
            else:
                say(f"measured {item.row.shape}, prompt of {item.row.prompt}, {item.row.side}")
            if output is not None:  # after each side, so that an interrupted run leaves what it has
                output.write_text(json.dumps(record(header, measurements), indent=1) + "\n", encoding="utf-8")
        if not as_json:
            typer.echo(page(header, measurements))
    raise typer.Exit(0 if all(m.details["agrees"] for m in measurements) else 1)


@app.command()
def texts(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Texts: a line each, JSON Lines, CSV or Parquet.")],
    field: Annotated[str, typer.Option(help="Column or key of the texts.")] = "text",
    count: Annotated[int, typer.Option(min=1, help="How many texts, spread evenly over the file.")] = 2000,
    models: Annotated[
        str, typer.Option(help="tiny, folders or Hub names, or a shape of `bench pll` with random weights.")
    ] = "tiny,deberta-v3-base",
    against: Annotated[str, typer.Option(help="hf (a text's copies a pass) and minicons; commas between.")] = (
        "hf,minicons"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="The texts are dealt to so many rounds; medians are shown.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of all sides; torch's choice unless given.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or one that `mlmfast doctor` lists.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write rows, quartiles, machine and versions here.")] = None,
) -> None:
    """Time scoring texts from end to end, tokeniser and all: texts a second, float32.

    A round gives its texts to every side in turn, and no text is scored twice but for the first, which check that the
    sides agree before anything is timed. Exit status: 0 all measured, 1 some disagree, 2 the request is wrong.
    """
    with reporting():
        from mlmfast.bench.sentences import read_sentences
        from mlmfast.bench.texts import record, run

        _check_folder(output)
        sentences = read_sentences(source, field=field, count=count)
        header: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        options: dict[str, Any] = {"rounds": rounds, "threads": threads, "backend": backend}
        for item in run(_listed(models), sentences, against=_listed(against), **options):
            if "cpu" in item:
                header = item
                say(f"{item['cpu']}, {item['threads']} threads, commit {item['commit']}")
                continue
            rows.append(item)
            if item["agrees"]:
                typer.echo(
                    f"{item['model']}: {item['texts_per_second']:.1f} texts a second, {item['peer']} "
                    f"{item['peer_texts_per_second']:.1f}: {item['ratio']:.2f}x "
                    f"({item['ratio_quartiles'][0]:.2f}-{item['ratio_quartiles'][1]:.2f})"
                )
            else:
                typer.echo(
                    f"{item['model']}: {item['peer']} disagrees (error {item['error']:.2e}), so no speed is shown"
                )
            if output is not None:
                output.write_text(json.dumps(record(header, rows), indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if all(row["agrees"] for row in rows) else 1)


def _check_folder(output: Path | None) -> None:
    """Found now, not after minutes of measuring."""
    from mlmfast.errors import RequestError

    if output is not None and not output.parent.is_dir():
        raise RequestError(f"--output {output}: there is no folder {output.parent}")


def _batch(text: str) -> int | None:
    """``--peer-batch``: None for auto."""
    from mlmfast.errors import RequestError

    if text in ("auto", "all"):
        return None if text == "auto" else sys.maxsize
    if not text.isdecimal() or not int(text):
        raise RequestError(f"--peer-batch {text} is not a whole number from 1, auto or all")
    return int(text)


def _refresh(text: str) -> int | str | None:
    """``--refresh``: None for never."""
    from mlmfast.errors import RequestError

    if text in ("auto", "never"):
        return "auto" if text == "auto" else None
    if not text.isdecimal() or not int(text):
        raise RequestError(f"--refresh {text} is not a whole number from 1, auto or never")
    return int(text)


def _numbers(option: str, text: str) -> list[int]:
    from mlmfast.errors import RequestError

    try:
        return [int(part) for part in _listed(text)]
    except ValueError:
        raise RequestError(f"{option} {text} is not a list of whole numbers") from None


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _show(header: dict[str, Any], measurements: list[Measurement]) -> None:
    versions = "".join(f", {name} {version}" for name, version in header["peers"].items())
    gpu = f"{header['device']['name']}; " if "device" in header else ""
    typer.echo(
        f"{gpu}{header['cpu']}, {header['threads']} threads; torch {header['torch']}, transformers "
        f"{header['transformers']}{versions}, mlmfast {header['mlmfast']}, commit {header['commit']}\n"
        f"medians of {header['settings']['pairs']} interleaved rounds and the middle half of them; above 1x mlmfast is "
        "the faster"
    )
    case: tuple[Any, ...] = ()
    for m in measurements:
        row = m.row
        if case != (case := _case(row)):
            spread = str(row.length) if row.shortest == row.length else f"{row.shortest} to {row.length}"
            typer.echo(f"\n{row.shape}, {row.copies} copies of {spread} tokens, {row.case}")
            if ours := next((n.row for n in measurements if _case(n.row) == case and n.row.ratio is not None), None):
                seconds = _spread(ours.seconds, ours.seconds_quartiles)
                typer.echo(f"  {'mlmfast ' + row.dtype:<22} {seconds:>24} s  {ours.peak_share:.1%} of peak")
        theirs = "disagree"
        if row.ratio is not None:
            seconds = _spread(row.peer_seconds, row.peer_seconds_quartiles)
            theirs = f"{seconds:>24} s {_spread(row.ratio, row.ratio_quartiles, 'x'):>18}"
        typer.echo(f"  {row.peer + ' ' + row.peer_dtype:<22} {theirs}  diff {row.max_abs_diff:.0e}")
    for m in measurements:
        if not m.details["agrees"]:
            typer.echo(
                f"\n{m.row.shape}, length {m.row.length}, {m.row.peer}: the two sides disagree ({m.details['side']}: "
                f"error {m.details['error']:.2e}, bound {m.details['bound']:.2e}), so no speed is shown: whatever is "
                "faster computes something else."
            )


def _case(row: Row) -> tuple[Any, ...]:
    return row.shape, row.case, row.length


def _spread(median: float | None, quartiles: tuple[float, float] | None, unit: str = "") -> str:
    """A median and its quartiles, to three digits."""
    assert median is not None
    assert quartiles is not None
    return f"{median:.3g}{unit} ({quartiles[0]:.3g}-{quartiles[1]:.3g})"
