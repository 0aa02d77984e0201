"""``mlmfast esm marginals | pppl | mutations``: proteins and DNA from FASTA, mutants from a table; JSON Lines out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mlmfast
from mlmfast.commands import (
    Backend,
    BatchTokens,
    Device,
    DType,
    Quiet,
    Revision,
    ShardRows,
    write,
)
from mlmfast.errors import RequestError, TextError
from mlmfast.reporting import reporting
from mlmfast.sources import absolute, check_output

if TYPE_CHECKING:
    from mlmfast.model import MaskedLM
    from mlmfast.readers import Row
    from mlmfast.writers import Record, Tally

app = typer.Typer(help="Proteins and DNA under models with a token a residue, such as ESM-2.", no_args_is_help=True)

Model = Annotated[
    str, typer.Option(help="A Hub name such as facebook/esm2_t12_35M_UR50D, or a local folder.", show_default=False)
]
Window = Annotated[
    int | None, typer.Option(help="Most tokens read at once (ProteinGym: 1024); unless given, what the model holds.")
]
Fasta = Annotated[str, typer.Argument(metavar="[FASTA|-]", help="Sequences, also .gz, .bz2, .xz; - is standard input.")]
Output = Annotated[
    str, typer.Option("--output", "-o", help="A file, a folder (existing, or ending in /), or - for standard output.")
]


@app.callback()
def esm() -> None:
    """Proteins and DNA under models with a token a residue, such as ESM-2."""


@app.command()
def marginals(
    model: Model,
    source: Fasta = "-",
    metric: Annotated[
        str, typer.Option(help="original (each residue masked alone) or unmasked (one pass: wild-type marginals).")
    ] = "original",
    residues: Annotated[str, typer.Option(help="Whose log-probabilities are written; ACGT for DNA.")] = (
        "ACDEFGHIKLMNPQRSTVWY"
    ),
    window: Window = None,
    output: Output = "-",
    shard_rows: ShardRows = 10_000,
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """What the model predicts at each residue of each sequence.

    Writes JSON Lines, one object a sequence, in order: text, name, tokens, residues and logprobs, a list of as many
    natural logarithms as residues for each token; or text, name and error. Files, what is continued and the exit
    status are as for score.
    """
    with reporting():
        from mlmfast import proteins
        from mlmfast.corpus import refused

        options: dict[str, Any] = {"command": "esm marginals", "metric": metric, "residues": residues, "window": window}
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend, "batch_tokens": batch_tokens}
        if not residues:
            raise RequestError("--residues is empty: name the residues whose log-probabilities are wanted")
        if metric not in proteins.METRICS:
            raise RequestError(f"--metric {metric} does not apply here; choose {' or '.join(proteins.METRICS)}")

        def prepare(lm: MaskedLM) -> Callable[[Sequence[Row]], list[Record]]:
            ids = proteins.residue_ids(lm, residues)
            unknown = [letter for letter in residues if letter not in ids]
            if unknown:
                raise RequestError(f"--residues {residues}: {model} has no token for {unknown[0]!r}")
            columns = [ids[letter] for letter in residues]

            def record(row: Row, outcome: Any) -> Record:
                if isinstance(outcome, TextError):
                    return refused(row, outcome)
                logprobs = [[float(str(x)) for x in line] for line in outcome[:, columns]]
                return {"text": row.text, "tokens": list(row.text or ""), "residues": residues, "logprobs": logprobs}

            compute = partial(proteins.masked_marginals, lm, metric=metric, window=window, on_error="return")
            return _of_fasta(compute, record)

        failed = _run_fasta(
            source, model, options, loading | {"revision": revision}, output, shard_rows, quiet, prepare
        )
    raise typer.Exit(1 if failed else 0)


@app.command()
def pppl(
    model: Model,
    source: Fasta = "-",
    window: Window = None,
    output: Output = "-",
    shard_rows: ShardRows = 10_000,
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """The pseudo-perplexity of each sequence, every residue masked alone.

    Writes JSON Lines, one object a sequence, in order: text, name, pll (natural logarithm), tokens, logprobs,
    perplexity; or text, name and error. Files, what is continued and the exit status are as for score.
    """
    with reporting():
        from mlmfast import proteins
        from mlmfast.corpus import record_of

        options: dict[str, Any] = {"command": "esm pppl", "window": window}
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend, "batch_tokens": batch_tokens}

        def prepare(lm: MaskedLM) -> Callable[[Sequence[Row]], list[Record]]:
            compute = partial(proteins.score, lm, window=window, on_error="return")
            return _of_fasta(compute, record_of)

        failed = _run_fasta(
            source, model, options, loading | {"revision": revision}, output, shard_rows, quiet, prepare
        )
    raise typer.Exit(1 if failed else 0)


@app.command()
def mutations(
    model: Model,
    source: Annotated[
        str, typer.Argument(metavar="[FILE|-]", help="Mutants such as A42G or A42G:L50P; - is standard input.")
    ] = "-",
    sequence: Annotated[str | None, typer.Option(help="The wild type.")] = None,
    fasta: Annotated[str | None, typer.Option(help="A FASTA file with the wild type as its only sequence.")] = None,
    field: Annotated[
        str | None, typer.Option(help="The column or key that holds the mutant, `mutant` unless given.")
    ] = None,
    format: Annotated[str, typer.Option(help="auto (by the suffix), text, jsonl, csv, tsv or parquet.")] = "auto",
    strategy: Annotated[str, typer.Option(help="masked-marginals, wt-marginals or pseudo-ppl.")] = "masked-marginals",
    offset: Annotated[int, typer.Option(help="Number of the wild type's first residue.")] = 1,
    window: Window = None,
    output: Output = "-",
    shard_rows: ShardRows = 10_000,
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """The effect of mutations in a wild type: above 0 the model prefers the mutant (pseudo-ppl: its own likelihood).

        mlmfast esm mutations scan.csv --model facebook/esm2_t12_35M_UR50D --fasta wild_type.fasta

    Writes JSON Lines, one object a mutant, in order: text (the mutant), effect and strategy; or text and error. Files,
    what is continued and the exit status are as for score.
    """
    with reporting():
        from mlmfast import proteins
        from mlmfast.corpus import open_sink, records, refused
        from mlmfast.readers import format_of, read_rows

        if (sequence is None) == (fasta is None):
            raise RequestError("give the wild type as --sequence or as --fasta, and not both")
        if strategy not in proteins.STRATEGIES:
            raise RequestError(f"--strategy {strategy} is not known; choose one of {', '.join(proteins.STRATEGIES)}")
        if fasta is not None:
            check_output(output, fasta)
        if source == fasta == "-":
            raise RequestError("mutants and wild type cannot both be read from standard input; one needs a file")
        wild = _only_sequence(fasta) if fasta is not None else sequence or ""
        kind = format_of(source, format)
        if field is None:
            field = "text" if kind == "text" else "mutant"
        options: dict[str, Any] = {"strategy": strategy, "offset": offset, "window": window, "sequence": wild}
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend, "batch_tokens": batch_tokens}
        loading["revision"] = revision
        check_output(output, source)
        request = {"mlmfast": mlmfast.__version__, "command": "esm mutations", "input": absolute(source)}
        request |= {"format": kind, "field": field, "model": model} | options | loading
        rows = read_rows(source, format=format, field=field)
        sink = open_sink(output, request, shard_rows, sys.stdout.buffer)

        def record(row: Row, outcome: Any) -> Record:
            if isinstance(outcome, TextError):
                return refused(row, outcome)
            return {"text": row.text, "effect": outcome, "strategy": strategy}

        def prepare(lm: MaskedLM) -> Callable[[Sequence[Row]], list[Record]]:
            effects = proteins.Effects(lm, wild, strategy=strategy, offset=offset, window=window)
            return partial(records, compute=partial(effects, on_error="return"), record=record)

        manner = f"scored in {{seconds:.1f}} s; model {model}{{own}}, {strategy}"
        tally = _write(source, rows, sink, model, loading, output, quiet, manner, prepare)
    raise typer.Exit(1 if tally.errors else 0)


def _run_fasta(
    source: str,
    model: str,
    options: dict[str, Any],
    loading: dict[str, Any],
    output: str,
    shard_rows: int,
    quiet: bool,
    prepare: Callable[[MaskedLM], Callable[[Sequence[Row]], list[Record]]],
) -> bool:
    """Writes a record a sequence; whether some have ``error``."""
    from mlmfast.corpus import open_sink
    from mlmfast.fasta import read_fasta

    check_output(output, source)
    request = {"mlmfast": mlmfast.__version__, "input": absolute(source), "model": model} | options | loading
    rows = _begun(read_fasta(source), source)
    sink = open_sink(output, request, shard_rows, sys.stdout.buffer)
    manner = f"scored in {{seconds:.1f}} s; model {model}{{own}}"
    return bool(_write(source, rows, sink, model, loading, output, quiet, manner, prepare).errors)


def _write(
    source: str,
    rows: Iterator[Row],
    sink: Any,
    model: str,
    loading: dict[str, Any],
    output: str,
    quiet: bool,
    manner: str,
    prepare: Callable[[MaskedLM], Callable[[Sequence[Row]], list[Record]]],
) -> Tally:
    """Writes a record a row, computed in this process."""
    from mlmfast.corpus import one_by_one
    from mlmfast.workers import in_this_process

    def ready() -> Any:
        lm = mlmfast.load(model, **loading)
        return lm, one_by_one(prepare(lm))

    tally, _ = write(
        [(Path(source).name, rows)], sink, output, quiet, manner, partial(in_this_process, sink, ready, {}, None)
    )
    return tally


def _begun(rows: Iterator[Row], source: str) -> Iterator[Row]:
    """The same rows, of which the first has been read: what is wrong with a file is found before a model is loaded."""
    from itertools import chain

    first = next(rows, None)
    if first is None:
        raise RequestError(f"{source} holds no sequence")
    return chain([first], rows)


def _of_fasta(
    compute: Callable[[list[str]], Sequence[Any]], record: Callable[[Row, Any], Record]
) -> Callable[[Sequence[Row]], list[Record]]:
    """Makes a window's records, each with the name that its row has in the FASTA file."""
    from mlmfast.corpus import records

    def records_of(rows: Sequence[Row]) -> list[Record]:
        found = records(rows, compute=compute, record=record)
        return [one | {"name": getattr(row, "name", "")} for row, one in zip(rows, found)]

    return records_of


def _only_sequence(fasta: str) -> str:
    """The sequence of a file that has one."""
    from mlmfast.fasta import read_fasta

    rows = list(read_fasta(fasta))
    if len(rows) != 1 or rows[0].text is None:
        raise RequestError(f"--fasta {fasta} holds {len(rows)} sequences; the wild type should be its only one")
    if rows[0].error is not None:
        raise RequestError(f"--fasta {fasta}: {rows[0].error}")
    return rows[0].text
