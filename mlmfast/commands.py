"""What commands share: options of the model, and a run over rows with a bar and a line of summary.

Only commands import torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmfast.errors import RequestError
from mlmfast.reporting import say
from mlmfast.writers import Tally

if TYPE_CHECKING:
    from mlmfast.corpus import Job
    from mlmfast.readers import Row
    from mlmfast.shards import ShardFolder
    from mlmfast.sources import Inputs
    from mlmfast.workers import Computing
    from mlmfast.writers import Record, Sink

Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of a Hub model.")]
DType = Annotated[str, typer.Option(help="auto (float32), float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Backend = Annotated[str, typer.Option(help="auto, or one that `mlmfast doctor` lists.")]
BatchTokens = Annotated[int | None, typer.Option(min=1, help="Tokens in one pass: bounds memory.")]
Semantics = Annotated[
    str, typer.Option(help="trained (as the model was trained) or upstream (what transformers computes); DeBERTa only.")
]
Objective = Annotated[
    str, typer.Option(help="mlm (a masked token is predicted at its place) or mntp (at the one before: GPT-BERT).")
]
RandomHead = Annotated[
    bool,
    typer.Option("--allow-random-head", help="Use a checkpoint without a trained prediction head: it answers noise."),
]
# Of prompts' lines: mlmfast.icl.checkpoints.separator_of.
Separator = Annotated[
    str,
    typer.Option(
        help="The line break of prompts: newline, literal (a backslash, an n and a space, as in the paper), any other "
        r"text (\n in it is a line break), or auto: newline where the tokenizer keeps it, else literal; for tiny "
        "newline."
    ),
]
Html = Annotated[
    str | None,
    typer.Option(
        "--html", help="Write a page too, tokens coloured by surprisal: one .html file that needs no network."
    ),
]
HtmlRows = Annotated[int, typer.Option(help="The page shows the first so many rows.")]
ShardRows = Annotated[int, typer.Option(help="Most rows in each file of an output folder.")]
OutputFormat = Annotated[str | None, typer.Option(help="Of the files in an output folder: jsonl or parquet.")]
Workers = Annotated[
    int,
    typer.Option(min=1, help="Processes, each with a model of its own; for an output folder. Cores are shared out."),
]
EngineName = Annotated[
    str, typer.Option("--engine", help="local (this machine), or ray (Ray Data: a laptop or a cluster).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


def check_folder(output: Path) -> None:
    """Refuses a file where a folder is to be.

    Raises:
        RequestError: it is one.
    """
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output {output} is a file; give a folder")


def run(
    job: Job,
    inputs: Inputs,
    sink: Sink | ShardFolder,
    output: str,
    quiet: bool,
    manner: str,
    workers: int,
    engine: str,
    passing: Callable[[list[Record]], None] | None = None,
) -> tuple[Tally, str]:
    """Does a job with every row of a source, here or in several processes.

    Returns:
        What :func:`write` returns.

    Raises:
        RequestError: more than one process, but no folder to write to; an unknown engine.
    """
    from mlmfast import workers as engines
    from mlmfast.readers import Meter
    from mlmfast.shards import ShardFolder

    meter = Meter(inputs.files)

    def means(advance: Callable[[Tally], None]) -> AbstractContextManager[Computing]:
        if engine not in ("local", "ray"):
            raise RequestError(f"--engine {engine} is not known; choose local or ray")
        if workers == 1 and engine == "local":
            return engines.in_this_process(sink, job.ready, job.columns, job.most, advance=advance)
        if not isinstance(sink, ShardFolder):
            raise RequestError("several processes write into a folder: end --output in /")
        if engine == "local":
            return engines.in_processes(sink, job, workers, advance=advance)
        from mlmfast.ray_engine import in_ray

        if list(inputs.files) == ["-"]:
            raise RequestError("--engine ray reads files, not standard input")
        return in_ray(sink, job, workers, inputs, advance=advance)

    def opened() -> Iterator[tuple[str, Iterator[Row]]]:
        if engine == "ray":
            inputs.reader(0)()  # for what may be wrong with it; others read, of whose progress the meter knows nothing
            return
        for number, name in enumerate(inputs.names):
            yield name, inputs.reader(number)(meter=meter)

    return write(
        opened(),
        sink,
        output,
        quiet,
        manner,
        means,
        most=job.most,
        several=inputs.several,
        expected=meter.total,
        passing=passing,
    )


def write(
    inputs: Iterable[tuple[str, Iterable[Row]]],
    sink: Sink | ShardFolder,
    output: str,
    quiet: bool,
    manner: str,
    engine: Callable[..., AbstractContextManager[Computing]],
    *,
    most: int | None = None,
    several: bool = False,
    expected: Callable[[], int | None] = lambda: None,
    passing: Callable[[list[Record]], None] | None = None,
) -> tuple[Tally, str]:
    """Runs with a bar, says what an unfinished run has left, and ends with one line of summary.

    Args:
        inputs: name and rows of each; opened one after the other, the first before a model is loaded.
        sink: where records go.
        output: its name.
        quiet: no bar and no summary.
        manner: the end of the summary; ``{seconds}`` and ``{own}``, which is :func:`own_code`'s, are filled in.
        engine: of :mod:`mlmfast.workers`, all but what to tell of progress; loads the model.
        most: rows of a window.
        several: names of shards tell inputs apart.
        expected: how many rows there will be, as far as can be said.
        passing: is given the records that go to standard output.

    Returns:
        The counts, and :func:`own_code`'s remark on the model.
    """
    from tqdm import tqdm

    from mlmfast.corpus import write_rows, write_shards
    from mlmfast.shards import ShardFolder, shards_of

    started = time.perf_counter()
    tally = Tally()
    begun = False
    # disable=None: a bar on a terminal only
    with tqdm(unit=" rows", file=sys.stderr, disable=True if quiet else None, leave=False) as bar:

        def advance(one: Tally) -> None:
            tally.add(one)
            bar.total = expected()
            if one.kept and not bar.disable:  # takes no time, so the rate must not count it
                bar.initial += one.rows
                bar.n += one.rows
                bar.refresh()
            else:
                bar.update(one.rows)
            bar.set_postfix(errors=tally.errors, refresh=False)

        try:
            if isinstance(sink, ShardFolder) and sink.damaged and not quiet:
                say(f"{len(sink.damaged)} shards are lost or cut off and made again: {', '.join(sink.damaged[:5])}")
            inputs = iter(inputs)
            inputs = chain(list(islice(inputs, 1)), inputs)  # what may be wrong with the first is found now
            with engine(advance=advance) as computing:
                begun = True
                if isinstance(sink, ShardFolder):
                    if sink.remarks and not quiet:
                        say(f"{output} was begun with {'; '.join(sink.remarks)}: last digits may differ")
                    write_shards(shards_of(inputs, sink.shard_rows, several=several), sink, computing.shards, advance)
                else:
                    rows = chain.from_iterable(rows for _, rows in inputs)
                    write_rows(rows, sink, computing.windows, advance, most, passing)
            sink.close()
        except BaseException as error:
            left = sink.close()
            bar.close()
            # Of an unfinished Parquet file nothing is kept.
            kept_rows = sink.tally.rows if isinstance(sink, ShardFolder) and sink.format == "parquet" else tally.rows
            if left is not None and (tally.rows > tally.kept or isinstance(error, KeyboardInterrupt)):
                say(f"{kept_rows:,} rows are kept in {left}; run the same command again to continue")
            if begun and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise RequestError(f"cannot write {output}: {error.strerror or error}") from error
            raise
    own = own_code(computing.generic)
    if not quiet:
        kept = f" ({tally.kept:,} of them by an earlier run)" if tally.kept else ""
        said = manner.format(seconds=time.perf_counter() - started, own=own)
        tokens = f", {tally.tokens:,} tokens" if tally.tokens else ""  # a mutant has none of its own
        say(f"{tally.rows:,} rows{kept}, {tally.errors:,} with an error{tokens} {said}")
    return tally, own


def own_code(generic: bool) -> str:
    """What a summary says after the name of a model that its own code computes."""
    return " (generic: its own code, not mlmfast's kernels)" if generic else ""


def manner_of(options: Mapping[str, Any]) -> str:
    """The metric of ``options``, with the number that belongs to it."""
    metric: str = options["metric"]
    more = {"window": ", {window} positions", "strided": ", {stride} copies a text (approximate)"}.get(metric, "")
    return metric + more.format(**options)
