"""``mlmfast eval``: models beside each other on the paper's tasks, in context."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
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

NEEDED = ("lm_eval", "accelerate", "matplotlib")


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(help="tiny, a Hub name or a folder, masked or causal by its config; or masked:NAME, causal:NAME."),
    ],
    tasks: Annotated[list[str], typer.Option(help="Tasks and groups, with commas: rte,boolq; blimp.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report, and of the answers so far.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK=FILE, JSON Lines of test examples; TASK.train=FILE, of demonstrations; or a folder of "
            "TASK.jsonl and TASK.train.jsonl. Without one a task is loaded from the Hub."
        ),
    ] = None,
    shots: Annotated[str, typer.Option(help="Demonstrations before each example: 0,1,4.")] = "0",
    repetitions: Annotated[
        int, typer.Option(help="Draws of demonstrations; one for 0 shots, ReCoRD, StoryCloze and translation.")
    ] = 5,
    limit: Annotated[int | None, typer.Option(help="The first so many examples; of BLiMP in each paradigm.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first draw.")] = 42,
    metric: Annotated[
        str | None, typer.Option(help="Of masked models. Unless given: window; for blimp original.", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(help="Positions masked at once by metric window.")] = 3,
    separator: Separator = "auto",
    semantics: Semantics = "trained",
    samples: Annotated[
        bool, typer.Option("--samples", help="Write samples.jsonl.gz: prompts, scores and choice of each example.")
    ] = False,
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    objective: Objective = "mlm",
    revision: Revision = None,
    allow_random_head: RandomHead = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate masked and causal models in context, side by side, as in "BERTs are Generative In-Context Learners".

        mlmfast eval --model tiny --model gpt2 --tasks rte --shots 0,1,4 --data rte=rte.jsonl --output report

    Writes report.json, report.md and figures (score by shots, score by size; PNG and SVG) to the folder, and a table to
    the terminal, with the published scores for reference. If a run is interrupted, the same command continues where it
    stopped, and gives the same numbers.
    """
    with reporting():
        _check_installed()
        from mlmfast.icl import evaluate as evaluation
        from mlmfast.icl import figures, report
        from mlmfast.icl.models import Settings

        settings = Settings(
            metric, window, dtype, device, backend, batch_tokens, revision, semantics, objective, allow_random_head
        )
        names = [name for given in tasks for name in listed(given)]
        plan = evaluation.Plan(
            models=model,
            tasks=names,
            data=data_of(data or [], names),
            shots=numbers(shots),
            repetitions=repetitions,
            seed=seed,
            limit=limit,
            separator=separator,
            settings=settings,
        )
        check_folder(output)
        kept: list[dict[str, Any]] | None = [] if samples else None
        try:
            found = evaluation.run(plan, output, samples=kept, quiet=quiet)
        except KeyboardInterrupt:
            if (output / "answers").is_dir():
                say(f"what was answered is kept in {output / 'answers'}; run the same command again to continue")
            raise
        report.write(output, found, kept)
        figures.draw(output, found)
        if not quiet:
            for one in found["models"]:
                say(f"{one['label']}: {one['kind']}, line breaks in prompts are {one['separator']!r}")
            for note in found["notes"]:
                say(note)
            report.show(found)
            done = found["run"]
            say(
                f"{done['computed']:,} requests computed, {done['found']:,} answered before, in {done['seconds']:.1f} "
                f"s; report in {output}"
            )


def listed(given: str) -> list[str]:
    """``rte, boolq`` -> both."""
    return [name.strip() for name in given.split(",") if name.strip()]


def numbers(given: str) -> list[int]:
    """``0,1,4`` -> the three.

    Raises:
        RequestError: something else.
    """
    try:
        return sorted({int(number) for number in listed(given)})
    except ValueError:
        raise RequestError(
            f"--shots {given}: whole numbers with commas between them are meant, such as 0,1,4"
        ) from None


def data_of(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """The files of each task: its test examples, and its demonstrations where they are named.

    A folder stands for those tasks that have a file in it and are not named themselves.

    Raises:
        RequestError: a file that is not there, or no form of --data.
    """
    from mlmfast.icl.evaluate import BLIMP, SPLITS, members
    from mlmfast.icl.gpt2 import WHOLE
    from mlmfast.icl.tasks import PREFIX
    from mlmfast.icl.tasks.rows import SUFFIXES, TEXT

    found: dict[str, dict[str, Path]] = {}
    folders = []
    for one in given:
        name, equals, file = one.partition("=")
        if not equals:
            if not Path(one).is_dir():
                raise RequestError(f"--data {one}: there is no such folder; for a file write TASK=FILE")
            folders.append(Path(one))
            continue
        task, _, split = name.removeprefix(PREFIX).partition(".")
        if (split or "test") not in SPLITS:
            raise RequestError(f"--data {one}: {name} is neither TASK nor TASK.train")
        if not Path(file).exists():
            raise RequestError(f"--data {one}: there is no {file}")
        found.setdefault(task, {})[split or "test"] = Path(file)
    for task, files in found.items():
        if "test" not in files:
            raise RequestError(f"--data {task}.train={files['train']}: --data {task}=FILE is missing")
    for folder in folders:
        for task in members(names):
            ends = (*SUFFIXES, TEXT) if task in WHOLE else SUFFIXES
            path = next((folder / (task + end) for end in ends if (folder / (task + end)).is_file()), None)
            if path is not None:
                found.setdefault(task, {"test": path})
            elif task == BLIMP and (folder / BLIMP).is_dir():
                found.setdefault(task, {"test": folder / BLIMP})
    return found


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f'mlmfast eval needs {" and ".join(missing)}: pip install "mlmfast[eval]"')
