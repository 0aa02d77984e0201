"""What commands share: options of the model, and a run over rows with a bar and a line of summary.

Only commands import torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlmfast.errors import RequestError
from mlmfast.reporting import say

if TYPE_CHECKING:
    from mlmfast.model import MaskedLM
    from mlmfast.readers import Row
    from mlmfast.writers import Record, Sink, Tally

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
# Of prompts' lines: mlmfast.icl.checkpoints.separator_of.
Separator = Annotated[
    str,
    typer.Option(
        help="The line break of prompts: newline, literal (a backslash, an n and a space, as in the paper), space, any "
        r"other text (\n in it is a line break), or auto: newline where the tokenizer keeps it, else literal; for tiny "
        "newline."
    ),
]
ShardRows = Annotated[int, typer.Option(help="Rows in each file of an output folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


def check_folder(output: Path) -> None:
    """Refuses a file where a folder is to be.

    Raises:
        RequestError: it is one.
    """
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output {output} is a file; give a folder")


def check_output(output: str, source: str) -> None:
    """Refuses to write over what is read."""
    if output != "-" and source != "-" and Path(output).resolve() == Path(source).resolve():
        raise RequestError(f"--output {output} is the input")


def write(
    records_of: Callable[[Sequence[Row]], list[Record]],
    rows: Any,
    sink: Sink,
    output: str,
    quiet: bool,
    manner: str,
    most: int | None = None,
) -> Tally:
    """Runs with a bar, says what an unfinished run has left, and ends with one line of summary."""
    from tqdm import tqdm

    from mlmfast.corpus import write_rows

    started = time.perf_counter()
    # disable=None: a bar on a terminal only
    with tqdm(unit=" rows", file=sys.stderr, disable=True if quiet else None, leave=False) as bar:

        def show(tally: Tally) -> None:
            bar.update(tally.rows - bar.n)
            bar.set_postfix(errors=tally.errors, refresh=False)

        try:
            tally = write_rows(rows, sink, records_of, show, most)
        except BaseException as error:
            left = sink.close()
            bar.close()
            added = sink.tally.rows > sink.tally.kept
            if left is not None and (added or isinstance(error, KeyboardInterrupt)):
                say(f"{sink.tally.rows:,} rows are kept in {left}; run the same command again to continue")
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise RequestError(f"cannot write {output}: {error.strerror or error}") from error
            raise
    if not quiet:
        kept = f" ({tally.kept:,} of them by an earlier run)" if tally.kept else ""
        said = manner.format(seconds=time.perf_counter() - started)
        tokens = f", {tally.tokens:,} tokens" if tally.tokens else ""  # a mutant has none of its own
        say(f"{tally.rows:,} rows{kept}, {tally.errors:,} with an error{tokens} {said}")
    return tally


def own_code(lm: MaskedLM) -> str:
    """What a summary says after the name of a model that its own code computes."""
    return " (generic: its own code, not mlmfast's kernels)" if lm.generic else ""
