"""``mlmfast needle``: a number hidden in a long text, asked back from masked and causal models alike."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlmfast.commands import (
    Backend,
    BatchTokens,
    Device,
    DType,
    Objective,
    Quiet,
    RandomHead,
    Revision,
    Semantics,
    Separator,
    check_folder,
)
from mlmfast.errors import RequestError
from mlmfast.reporting import reporting, say


def needle(
    haystack: Annotated[str, typer.Option(help="Any long text: .txt, JSON Lines, CSV, Parquet; also .gz, .bz2, .xz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for all results; made if it is not there.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="tiny, a Hub name or a folder, masked or causal by its config; or masked:NAME, causal:NAME."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="In each model's tokens, by commas.")] = "128,256,512,1024,2048",
    placements: Annotated[int, typer.Option(help="Places of the needle, from before the text to after it.")] = 11,
    repetitions: Annotated[int, typer.Option(help="Needles a length and place.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the numbers.")] = 42,
    separator: Separator = "auto",
    field: Annotated[str, typer.Option(help="The column or key that holds the text; not for text files.")] = "text",
    num_masks: Annotated[int, typer.Option(help="Of masked models: masks at the end of each step.")] = 3,
    cache: Annotated[
        str, typer.Option(help="Of masked models: none (exact) or window (approximate: earlier rows are kept).")
    ] = "none",
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    semantics: Semantics = "trained",
    objective: Objective = "mlm",
    revision: Revision = None,
    allow_random_head: RandomHead = False,
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
        from mlmfast.identity import versions
        from mlmfast.writers import replace

        models = list(model or ["tiny"])
        if len(set(models)) < len(models):
            raise RequestError("--model: one is named twice")
        if cache not in ("none", "window"):
            raise RequestError(f"--cache {cache} is not known; choose none (exact) or window (approximate)")
        if num_masks < 1:
            raise RequestError(f"num_masks={num_masks} predicts nothing: 1 is the least, and DeBERTa wants 3")
        grid = Grid(_lengths(lengths), placements, repetitions, seed)
        sentences = read_haystack(haystack, field)
        check_folder(output)
        output.mkdir(parents=True, exist_ok=True)
        common: dict[str, Any] = versions() | {"haystack": digest(sentences), "seed": seed}
        common |= {"placements": placements, "repetitions": repetitions}
        loading: dict[str, Any] = {"semantics": semantics, "dtype": dtype, "device": device, "backend": backend}
        loading |= {"batch_tokens": batch_tokens, "revision": revision, "allow_random_head": allow_random_head}
        loading["objective"] = objective
        asking = {"num_masks": num_masks, "cache": cache, "loading": loading}
        found = [
            _measure(spec, grid, sentences, separator, output, common, asking, batch_tokens, quiet) for spec in models
        ]
        whole = report(common | {"lengths": list(grid.lengths), "haystack": Path(haystack).name}, found)
        replace(output / "needle.json", (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())
        page = markdown(whole)
        replace(output / "needle.md", page.encode())
        drawn = heatmap.draw(whole, output / "needle")
        if not quiet:
            typer.echo(page.split("## Published")[0].rstrip())
            if not drawn:
                say('no figure: matplotlib is missing (pip install "mlmfast[eval]", then the same command again)')
            names = ["needle.json", "needle.md", *(path.name for path in drawn)]
            say(f"written to {output}: {', '.join(names)} and every answer")


def _measure(
    spec: str,
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

    from mlmfast.icl.checkpoints import separator_of
    from mlmfast.icl.needle_models import load_asked
    from mlmfast.icl.needle_run import ask, summary
    from mlmfast.ledger import Ledger

    asked = load_asked(spec, **asking)
    joined = separator_of(separator, asked.tokenizer)
    settings = {"model": spec} | common | {"separator": joined} | asked.settings
    path = folder / f"needles-{_file(spec)}.jsonl"

    def finished(length: int, seconds: float, needles: int) -> None:
        if needles and not quiet:
            say(f"{spec}, length {length:,}: {needles} needles in {seconds:.1f} s")

    with Ledger(path, settings) as ledger:
        kept = len(ledger.records)
        if not quiet:
            note = f" ({asked.note})" if asked.note else ""
            say(f"{spec}: {asked.kind}{note}, separator {joined!r}" + (f"; {kept} needles are kept" if kept else ""))
        total = grid.placements * grid.repetitions * len(grid.lengths)
        # disable=None: a bar on a terminal only
        with tqdm(total=total, desc=spec, unit="needle", file=sys.stderr, disable=True if quiet else None) as bar:
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
    return {"name": spec, "kind": asked.kind, "note": asked.note, "settings": settings, "rows": rows}


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--lengths {text} is no list of numbers such as 128,256,512") from None


def _file(spec: str) -> str:
    """A file name for a model's needles; a path or an unusual name gets a digest, so that no two share a file."""
    from mlmfast.icl.checkpoints import slug

    plain = slug(spec)
    return plain if plain == spec else f"{plain[-40:]}-{hashlib.sha256(spec.encode()).hexdigest()[:6]}"
