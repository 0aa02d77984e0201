"""The command line: ``mlmfast score | compare | rank | generate | eval | needle | esm | doctor | bench``.

Exit status: 0 all rows scored, 1 some rows have ``error``, 2 the request itself is wrong, 70 a defect of mlmfast, 130
interrupted, 141 the reader of a pipe has gone. Only commands import torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import mlmfast
from mlmfast.bench import app as bench_app
from mlmfast.commands import (
    Backend,
    BatchTokens,
    Device,
    DType,
    EngineName,
    Html,
    HtmlRows,
    Objective,
    OutputFormat,
    Quiet,
    RandomHead,
    Revision,
    Semantics,
    ShardRows,
    Workers,
    manner_of,
    own_code,
    run,
)
from mlmfast.compare_command import compare
from mlmfast.errors import RequestError
from mlmfast.esm_commands import app as esm_app
from mlmfast.icl.commands import evaluate
from mlmfast.icl.needle_command import needle
from mlmfast.masking import check_metric
from mlmfast.reporting import reporting, say

if TYPE_CHECKING:
    from mlmfast.model import MaskedLM
    from mlmfast.results import Ranking

app = typer.Typer(
    help="Exact, fast scores of text under masked language models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.add_typer(esm_app, name="esm")
app.command()(compare)
app.command()(needle)
app.command("eval")(evaluate)

METRIC_HELP = (
    "Which tokens are masked together with the one that is scored: original (it alone), within_word_l2r, window, "
    "global_l2r, unmasked, or strided (approximate: not the exact PLL)."
)
Model = Annotated[str, typer.Option(help='"tiny" (bundled), a Hugging Face Hub name, or a local folder.')]
Metric = Annotated[str, typer.Option(help=METRIC_HELP)]
Window = Annotated[int, typer.Option(help="Positions masked at once by metric window.")]
Stride = Annotated[int, typer.Option(help="Masked copies a text of the approximate metric strided.")]
Temperature = Annotated[float, typer.Option(help="Divides the logits.")]


@app.callback(invoke_without_command=True)
def start(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        typer.echo(f"mlmfast {mlmfast.__version__}")
        raise typer.Exit


@app.command()
def score(
    source: Annotated[str, typer.Argument(metavar="[FILE|-]", help="What to score; - is standard input.")] = "-",
    model: Model = "tiny",
    metric: Metric = "original",
    window: Window = 3,
    stride: Stride = 8,
    temperature: Temperature = 1.0,
    ranks: Annotated[bool, typer.Option("--ranks", help="Write each token's rank too, 1 for the likeliest.")] = False,
    truncation: Annotated[
        str | None, typer.Option(help="right or left: cut texts that are too long. Without it they get an error.")
    ] = None,
    format: Annotated[str, typer.Option(help="auto (by the suffix), text, jsonl, csv, tsv or parquet.")] = "auto",
    field: Annotated[str, typer.Option(help="The column or key that holds the text; not for text files.")] = "text",
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="A file, a folder (existing, or ending in /), or - for standard output."),
    ] = "-",
    output_format: OutputFormat = None,
    shard_rows: ShardRows = 10_000,
    workers: Workers = 1,
    engine: EngineName = "local",
    html: Html = None,
    html_rows: HtmlRows = 2_000,
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
    """Score every row of a file: text (a line each), JSON Lines, CSV or Parquet; text formats also as .gz, .bz2, .xz.

        mlmfast score 'corpus/*.jsonl.gz' --output scores/ --workers 4

    A folder or a pattern stands for many files. Writes JSON Lines, one object an input row, in order: text, pll (in
    nats), tokens, logprobs, perplexity; or text and error for a row that cannot be scored. An output file appears
    when it is whole. If a run is interrupted, the same command continues where it stopped; an output folder is filled
    shard by shard.

    Exit status: 0 all rows scored, 1 some have an error, 2 the request is wrong.
    """
    with reporting():
        from mlmfast.corpus import Job, open_sink
        from mlmfast.html import Excerpt, Heading, check_page, write_page
        from mlmfast.identity import versions
        from mlmfast.outputs import read_records
        from mlmfast.readers import format_of
        from mlmfast.sources import absolute, inputs_of
        from mlmfast.writers import StreamSink

        check_metric(metric, window, stride)
        options: dict[str, Any] = {"metric": metric, "window": window, "stride": stride, "temperature": temperature}
        options |= {"ranks": ranks, "truncation": truncation}
        loading: dict[str, Any] = {"semantics": semantics, "dtype": dtype, "device": device, "backend": backend}
        loading |= {"batch_tokens": batch_tokens, "revision": revision, "allow_random_head": allow_random_head}
        loading["objective"] = objective
        inputs = inputs_of(source, format, field, output)
        request = {"mlmfast": mlmfast.__version__, "input": absolute(source)}
        request |= {"format": format_of(inputs.files[0], format), "field": field, "model": model} | options | loading
        if html is not None:
            check_page(html, html_rows, source, output)
        if source == "-" and sys.stdin.isatty():
            say("reading standard input, a text a line; Ctrl-D ends it")
        job = Job(model, loading, options, ahead=source != "-")
        sink = open_sink(output, request, shard_rows, sys.stdout.buffer, output_format)
        approximate = " (approximate)" if metric == "strided" else ""
        manner = f"scored in {{seconds:.1f}} s; model {model}{{own}}, metric {metric}{approximate}"
        excerpt = Excerpt(html_rows)
        passing = excerpt.take if html is not None and isinstance(sink, StreamSink) else None
        tally, own = run(job, inputs, sink, output, quiet, manner, workers, engine, passing)
        if html is not None:
            if not isinstance(sink, StreamSink):
                excerpt.take(read_records(output))  # rows that an earlier run has scored did not pass by here
            name = "standard input" if source == "-" else Path(source).name
            facts = {"Model": model + own, "Metric": manner_of(options), "Tokens": f"{tally.tokens:,}"}
            told = request | {"input": source}  # no folders of this machine on a page that is passed on
            heading = Heading("score", f"Scores of {name}", facts | versions(), told, tally.rows, tally.errors)
            said = write_page(html, excerpt, heading)
            if not quiet:
                say(said)
    raise typer.Exit(1 if tally.errors else 0)


@app.command()
def rank(
    prompt: Annotated[str | None, typer.Argument(help="What the options continue.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="Two or more continuations.")] = None,
    file: Annotated[
        str | None, typer.Option(help='JSON Lines of {"prompt": ..., "options": [...]}; - is stdin.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines also on a terminal.")] = False,
    html: Html = None,
    html_rows: HtmlRows = 2_000,
    model: Model = "tiny",
    metric: Metric = "window",
    window: Window = 3,
    stride: Stride = 8,
    temperature: Temperature = 1.0,
    normalize: Annotated[
        str, typer.Option(help="none, tokens (a token's mean), or unconditional (less the score without the prompt).")
    ] = "none",
    unconditional_prompt: Annotated[str, typer.Option(help="Stands for the prompt in unconditional.")] = "",
    cache: Annotated[
        str, typer.Option(help="none (exact) or prefix (approximate: the prompt is computed once, options masked).")
    ] = "none",
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    semantics: Semantics = "trained",
    objective: Objective = "mlm",
    revision: Revision = None,
    allow_random_head: RandomHead = False,
) -> None:
    """Rank continuations of a prompt, best first.

    Prompt and option are joined exactly as given, so options usually begin with a space:

        mlmfast rank "2 + 2 =" " 4" " 5"

    Prints a table on a terminal, else JSON Lines: prompt, options, values, probabilities (their softmax), best, order;
    or prompt, options and error. Exit status as for score.
    """
    with reporting():
        from mlmfast import ranking
        from mlmfast.html import Excerpt, Heading, check_page, write_page
        from mlmfast.identity import versions

        if (file is None) == (prompt is None):
            raise RequestError("give a prompt and options, or --file, and not both")
        check_metric(metric, window, stride)
        if normalize not in ranking.NORMALIZATIONS:
            raise RequestError(f"--normalize {normalize} is not known; choose {', '.join(ranking.NORMALIZATIONS)}")
        settings: dict[str, Any] = {"metric": metric, "window": window, "stride": stride, "temperature": temperature}
        settings |= {"normalize": ranking.NORMALIZATIONS[normalize], "unconditional_prompt": unconditional_prompt}
        settings["cache"] = cache
        loading: dict[str, Any] = {"semantics": semantics, "dtype": dtype, "device": device, "backend": backend}
        loading |= {"batch_tokens": batch_tokens, "revision": revision, "allow_random_head": allow_random_head}
        loading["objective"] = objective
        questions: Iterable[ranking.Question] | None = ranking.read_questions(file) if file else None
        if prompt is not None and not options:
            raise RequestError("give the options to rank after the prompt")
        if html is not None:
            check_page(html, html_rows, file or "-")
        lm = mlmfast.load(model, **loading)
        if questions is None:
            questions = [ranking.Question(prompt, options)]
        number = errors = 0
        excerpt = Excerpt(html_rows)
        for number, question in enumerate(questions, 1):
            outcome = ranking.answer(lm, question, settings)
            if isinstance(outcome, str) and not file:
                raise RequestError(outcome)
            errors += isinstance(outcome, str)
            record = ranking.record_of(question, outcome, number)
            if html is not None:
                excerpt.take([record | ranking.scores_of(outcome)])
            if as_json or file or not sys.stdout.isatty():
                _write_line(record)
            elif not isinstance(outcome, str):
                _print_ranking(outcome, metric)
        if html is not None:
            facts = {"Model": model + own_code(lm.generic), "Metric": manner_of(settings), "Normalize": normalize}
            facts["Cache"] = cache if cache == "none" else f"{cache} (approximate)"
            name = "standard input" if file == "-" else Path(file).name if file else "options"
            request = {"input": file or "arguments", "model": model} | settings | loading
            heading = Heading("rank", f"Ranking of {name}", facts | versions(), request, number, errors)
            say(write_page(html, excerpt, heading))
    raise typer.Exit(1 if errors else 0)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What is continued.")] = None,
    file: Annotated[str | None, typer.Option(help="Prompts: text, JSON Lines, CSV or Parquet; - is stdin.")] = None,
    format: Annotated[str, typer.Option(help="auto (by the suffix), text, jsonl, csv, tsv or parquet.")] = "auto",
    field: Annotated[str, typer.Option(help="The column or key that holds the prompt; not for text files.")] = "text",
    output: Annotated[str, typer.Option("--output", "-o", help="As for score; only with --file.")] = "-",
    output_format: OutputFormat = None,
    shard_rows: ShardRows = 1_000,
    workers: Workers = 1,
    engine: EngineName = "local",
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines also on a terminal.")] = False,
    model: Model = "tiny",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens that are generated.")] = 32,
    min_new_tokens: Annotated[int, typer.Option(help="No stop token before so many.")] = 0,
    num_masks: Annotated[int, typer.Option(help="Masks at the end of each step; DeBERTa wants 3.")] = 3,
    num_beams: Annotated[int, typer.Option(help="More than 1: beam search.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams: a score is over the length to this power.")] = 1.0,
    do_sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the best.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Sample among the best that have this much probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what there is already.")] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="No run of so many tokens twice; 0: any.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text where it appears; may be repeated.")] = None,
    cache: Annotated[str, typer.Option(help="none (exact) or window (approximate: earlier rows are kept).")] = "none",
    recompute: Annotated[int | None, typer.Option(help="Of the window: last tokens computed in a step.")] = None,
    refresh: Annotated[int | None, typer.Option(help="Of the window: all computed every so many steps; 0: never.")] = (
        None
    ),
    draft: Annotated[bool, typer.Option("--draft", help="Greedy: further masks draft tokens, exact all the same.")] = (
        False
    ),
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
    """Continue a prompt, or every row of a file, by appending masks.

        mlmfast generate "Once upon a time" --max-new-tokens 32

    On a terminal the text appears as it is chosen; else, and for a file, JSON Lines: text, continuation, tokens,
    logprobs (of the model), stopped; or text and error. Files are written and continued as by score. Exit status as for
    score.
    """
    failed = False
    with reporting():
        from mlmfast.corpus import Job, continuation_of, open_sink
        from mlmfast.readers import Row, format_of
        from mlmfast.sources import absolute, inputs_of

        if (file is None) == (prompt is None):
            raise RequestError("give a prompt or --file, and not both")
        if prompt is not None and output != "-":
            raise RequestError("--output is for the rows of --file; a prompt's continuation goes to standard output")
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        options |= {"num_masks": num_masks, "num_beams": num_beams, "length_penalty": length_penalty}
        options |= {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {"repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size}
        options |= {"seed": seed, "stop_strings": stop, "cache": cache, "recompute": recompute}
        options |= {"draft": "masks" if draft else None}
        options |= {} if refresh is None else {"refresh": refresh or None}
        loading: dict[str, Any] = {"semantics": semantics, "dtype": dtype, "device": device, "backend": backend}
        loading |= {"batch_tokens": batch_tokens, "revision": revision, "allow_random_head": allow_random_head}
        loading["objective"] = objective
        if file is not None:
            inputs = inputs_of(file, format, field, output)
            request = {"mlmfast": mlmfast.__version__, "command": "generate", "input": absolute(file)}
            request |= {"format": format_of(inputs.files[0], format), "field": field, "model": model}
            sink = open_sink(output, request | options | loading, shard_rows, sys.stdout.buffer, output_format)
            approximate = " (approximate)" if cache != "none" else ""
            manner = f"generated in {{seconds:.1f}} s; model {model}{{own}}, cache {cache}{approximate}"
            job = Job(model, loading, options, generates=True)
            tally, _ = run(job, inputs, sink, output, quiet, manner, workers, engine)
            failed = bool(tally.errors)
        elif prompt is not None:
            lm = mlmfast.load(model, **loading)
            if as_json or not sys.stdout.isatty():
                found = lm.generate(prompt, progress=False, **options)
                _write_line(continuation_of(Row(0, prompt), found))
                if found.stopped == "interrupted":
                    raise KeyboardInterrupt
            else:
                if cache != "none":
                    say(f"approximate: cache {cache}")
                if lm.generic:
                    say(f"model {model}{own_code(lm.generic)}")
                typer.echo(prompt, nl=False)
                _print_text(lm, prompt, options)
    raise typer.Exit(1 if failed else 0)


def _print_text(lm: MaskedLM, prompt: str, options: dict[str, Any]) -> None:
    """A continuation as it grows, or at the end of a search with beams."""
    try:
        grows = options["num_beams"] == 1
        for piece in lm.stream(prompt, **options) if grows else [lm.generate(prompt, **options).text]:
            typer.echo(piece, nl=False)
    finally:
        typer.echo()  # after Ctrl-C, too


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Say what is installed, what this machine has, and which backend serves which op here and why."""
    with reporting():
        from mlmfast import doctor as examination

        findings = examination.examine()
        if as_json:
            typer.echo(json.dumps(findings, indent=1))
        else:
            examination.show(findings)


def main() -> NoReturn:
    """The entry point."""
    try:
        app()
    except SystemExit:
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(70)  # not 1, which says that rows have errors
    sys.exit(0)


def _write_line(record: dict[str, Any]) -> None:
    from mlmfast.writers import encode

    sys.stdout.buffer.write(encode(record))
    sys.stdout.buffer.flush()


def _print_ranking(result: Ranking, metric: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    manner = f"metric {metric}, normalize {result.normalize or 'none'}"
    manner += "" if result.cache == "none" else f", cache {result.cache} (approximate)"
    manner += ", generic" if result.generic else ""
    table = Table(title=Text(repr(result.prompt)), caption=manner)
    for name in ("option", "value", "share", "tokens"):
        table.add_column(name, justify="left" if name == "option" else "right")
    for i in result.order:
        numbers = (f"{result.values[i]:.4f}", f"{result.probabilities[i]:.1%}", str(len(result.scores[i])))
        table.add_row(Text(repr(result.options[i])), *numbers)
    Console().print(table)
