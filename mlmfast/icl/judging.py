"""One pass of lm_eval's over a task's examples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate

from mlmfast.errors import MLMFastError, RequestError
from mlmfast.icl import tasks
from mlmfast.icl.outcomes import Outcome, mean_error
from mlmfast.icl.tasks.task import SCORE


def loaded(name: str, data: Mapping[str, Path] | None, shots: int, seed: int, separator: str) -> Any:
    """A task of lm_eval's, from its files or, without any, from the Hub.

    Raises:
        RequestError: no data; the option that gives it is named.
    """
    files = None if data is None else {name: data}
    try:
        found = tasks.load([name], data=files, separator=separator, num_fewshot=shots, seed=seed)
    except MLMFastError as error:
        raise RequestError(f"--data {name}=FILE: {error}") from error
    except Exception as error:  # the Hub's libraries raise anything
        raise RequestError(
            f"task {name}: its data set cannot be had from the Hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); give a local file as --data {name}=FILE"
        ) from error
    return next(iter(found.values()))


def judged(lm: Any, task: Any, limit: int | None = None) -> Outcome:
    """What a model of lm_eval's makes of a task's examples, or of the first ``limit``."""
    name = task.config.task
    with _silent_harness():
        found = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    assert found is not None
    rows = found["samples"][name]
    values = {key.split(",")[0]: value for key, value in found["results"][name].items()}
    # In the task's own order: the first is the one that the paper's tables print.
    metrics = {metric: float(values[metric]) for metric in task._metric_fn_list if metric != SCORE}
    docs = [row["doc"] for row in rows]
    return Outcome(
        metrics=metrics,
        errors={metric: _error([row[metric] for row in rows], value) for metric, value in metrics.items()},
        chance={metric: _chance(task, metric, docs) for metric in metrics},
        examples=len(rows),
        samples=[_sample(task, row) for row in rows],
    )


def _sample(task: Any, row: dict[str, Any]) -> dict[str, Any]:
    """An example as ``--samples`` writes it; ``choice`` as the task itself chooses."""
    sample: dict[str, Any] = {"example": row["doc_id"], "arguments": [list(one) for one in row["arguments"]]}
    answers = [one[0] for one in row["resps"]]
    if task.OUTPUT_TYPE != "multiple_choice":
        return sample | {"responses": answers, "target": row["target"]}
    scores = [answer[0] for answer in answers]
    candidates = task.doc_to_choice(row["doc"])
    values = scores
    if len(scores) == 2 * len(candidates):
        values = [a - b for a, b in zip(scores[: len(candidates)], scores[len(candidates) :])]
    chosen = max(range(len(candidates)), key=lambda i: values[i])
    return sample | {"responses": scores, "candidates": candidates, "target": row["target"], "choice": chosen}


def _chance(task: Any, metric: str, docs: Sequence[dict[str, Any]]) -> float | None:
    """What a candidate chosen blindly gets, each as likely; None of generation, and of a metric that is no mean."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    values = []
    for doc in docs:
        number = len(task.doc_to_choice(doc))
        for chosen in range(number):
            # Twice as many answers as candidates where the text without the question is scored, too; these are alike.
            answers = [(float(i == chosen), False) for i in range(number)] + [(0.0, False)] * number
            answers = answers if task.unconditional is not None else answers[:number]
            value = task.process_results(doc, answers)[metric]
            if not isinstance(value, (bool, int, float)):
                return None
            values.append(value / number)
    return sum(values) / len(docs)


def _error(values: Sequence[Any], mean: float) -> float | None:
    """Of a metric that is the mean of its examples' values; None of another."""
    if not all(isinstance(value, (bool, int, float)) for value in values):
        return None
    numbers = [float(value) for value in values]
    return mean_error(numbers) if abs(sum(numbers) / len(numbers) - mean) < 1e-9 else None


@contextmanager
def _silent_harness() -> Iterator[None]:
    """lm_eval tells of each step and draws bars of its own; here hundreds of its runs follow each other."""
    import lm_eval.api.task as module
    import lm_eval.models.huggingface as model

    log, bar, other = logging.getLogger("lm_eval"), module.tqdm, model.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    module.tqdm = lambda items, **options: items
    model.tqdm = lambda *items, **options: other(*items, **(options | {"disable": True}))
    try:
        yield
    finally:
        log.setLevel(level)
        module.tqdm, model.tqdm = bar, other
