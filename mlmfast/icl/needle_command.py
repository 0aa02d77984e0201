"""``mlmfast needle``: a number hidden in a long text, asked back from masked and causal models alike."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mlmfast
from mlmfast.commands import Backend, BatchTokens, Device, DType, Quiet, Revision
from mlmfast.errors import RequestError
from mlmfast.reporting import reporting, say


def needle(
    haystack: Annotated[str, typer.Option(help="Any long text: .txt, JSON Lines, CSV, Parquet; also .gz, .bz2, .xz.")],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder for all results; made if it is not there.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help='"tiny" (bundled), a Hub name or a folder, masked or causal; may be repeated.'),
    ] = None,
    lengths: Annotated[str, typer.Option(help="In each model's tokens, by commas.")] = "128,256,512,1024,2048",
    placements: Annotated[int, typer.Option(help="Places of the needle, from before the text to after it.")] = 11,
    repetitions: Annotated[int, typer.Option(help="Needles a length and place.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the numbers.")] = 42,
    separator: Annotated[
        str,
        typer.Option(
            help="Between sentences: newline, literal (a backslash, n and space, as in the paper), space, any other "
            "text, or auto: newline where the tokenizer keeps it, else literal."
        ),
    ] = "auto",
    field: Annotated[str, typer.Option(help="The column or key that holds the text; not for text files.")] = "text",
    num_masks: Annotated[int, typer.Option(help="Of masked models: masks at the end of each step.")] = 3,
    cache: Annotated[
        str, typer.Option(help="Of masked models: none (exact) or window (approximate: earlier rows are kept).")
    ] = "none",
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    semantics: Annotated[str, typer.Option(help="trained (far distances clamped) or upstream; DeBERTa only.")] = (
        "trained"
    ),
    objective: Annotated[str, typer.Option(help="mlm or mntp, of masked models.")] = "mlm",
    revision: Revision = None,
    allow_random_head: Annotated[
        bool, typer.Option("--allow-random-head", help="Ask although the checkpoint has no trained prediction head.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Hide a six-digit number in a long text and ask for it: length by place (Samuel 2024, section 3).

        mlmfast needle --model tiny --model gpt2 --haystack text.txt.gz --output folder/

    Writes needle.json, needle.md (the tables), needle.png and needle.svg (heat maps), and a JSON Lines file a model
    with every needle and answer. An interrupted run continues where it stopped, with the same command; lengths may be
    added.
    """
    with reporting():
        from mlmfast.icl import heatmap
        from mlmfast.icl.haystack import digest, read_haystack
        from mlmfast.icl.needle import Grid
        from mlmfast.icl.needle_report import markdown, report

        models = list(model or ["tiny"])
        if len(set(models)) < len(models):
            raise RequestError("--model: one is named twice")
        if cache not in ("none", "window"):
            raise RequestError(f"--cache {cache} is not known; choose none (exact) or window (approximate)")
        if num_masks < 1:
            raise RequestError(f"num_masks={num_masks} predicts nothing: 1 is the least, and DeBERTa wants 3")
        grid = Grid(_lengths(lengths), placements, repetitions, seed)
        sentences = read_haystack(haystack, field)
        folder = _folder(output)
        common = {"mlmfast": mlmfast.__version__, "haystack": digest(sentences), "seed": seed}
        common |= {"placements": placements, "repetitions": repetitions}
        loading: dict[str, Any] = {"semantics": semantics, "dtype": dtype, "device": device, "backend": backend}
        loading |= {"batch_tokens": batch_tokens, "revision": revision, "allow_random_head": allow_random_head}
        loading["objective"] = objective
        asking = {"num_masks": num_masks, "cache": cache, "loading": loading}
        found = [
            _measure(name, grid, sentences, separator, folder, common, asking, batch_tokens, quiet) for name in models
        ]
        whole = report(common | {"lengths": list(grid.lengths), "haystack": Path(haystack).name}, found)
        _replace(folder / "needle.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        page = markdown(whole)
        _replace(folder / "needle.md", page)
        if not heatmap.draw(whole, folder / "needle") and not quiet:
            say("no figure: matplotlib is not installed (pip install matplotlib, then the same command again)")
        if not quiet:
            typer.echo(page.split("## Published")[0].rstrip())
            say(f"written to {folder}: needle.json, needle.md, needle.png, needle.svg and every answer")


def _measure(
    name: str,
    grid: Any,
    sentences: list[str],
    separator: str,
    folder: Path,
    common: dict[str, Any],
    asking: dict[str, Any],
    batch_tokens: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """One model's part of the report."""
    from tqdm import tqdm

    from mlmfast.icl.ledger import Ledger
    from mlmfast.icl.needle import separator_of
    from mlmfast.icl.needle_models import load_asked
    from mlmfast.icl.needle_run import ask, summary

    asked = load_asked(name, **asking)
    joined = separator_of(separator, asked.tokenizer, name)
    settings = {"model": name} | common | {"separator": joined} | asked.settings
    path = folder / f"needles-{_slug(name)}.jsonl"

    def finished(length: int, seconds: float, needles: int) -> None:
        if needles and not quiet:
            say(f"{name}, length {length:,}: {needles} needles in {seconds:.1f} s")

    with Ledger(path, settings) as ledger:
        kept = len(ledger.records)
        if not quiet:
            note = f" ({asked.note})" if asked.note else ""
            say(f"{name}: {asked.kind}{note}, separator {joined!r}" + (f"; {kept} needles are kept" if kept else ""))
        total = grid.placements * grid.repetitions * len(grid.lengths)
        # disable=None: a bar on a terminal only
        with tqdm(total=total, desc=name, unit="needle", file=sys.stderr, disable=True if quiet else None) as bar:
            try:
                ask(
                    asked,
                    grid,
                    sentences,
                    joined,
                    ledger,
                    batch_tokens=batch_tokens,
                    advance=bar.update,
                    finished=finished,
                )
            except KeyboardInterrupt:
                bar.close()
                say(f"{len(ledger.records)} needles are kept in {path}; run the same command again to continue")
                raise
        rows = summary(asked, grid, ledger.records)
    return {"name": name, "kind": asked.kind, "note": asked.note, "settings": settings, "rows": rows}


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--lengths {text} is no list of numbers such as 128,256,512") from None


def _folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--output {output} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _slug(name: str) -> str:
    """A model's name as part of a file's: a path or an unusual name gets a digest, so that no two share a file."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return plain if plain == name else f"{plain[-40:]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _replace(path: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
