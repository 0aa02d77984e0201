"""Models x tasks x shots x repetitions -> a report. Same prompts and same examples for masked and causal models."""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lm_eval
import torch

from mlmfast.checkpoint import quiet_transformers
from mlmfast.errors import MLMFastError, RequestError
from mlmfast.icl import blimp, gpt2, tasks
from mlmfast.icl.answers import Answering, Answers
from mlmfast.icl.checkpoints import NEWLINE, kind_of, split, written
from mlmfast.icl.judging import judged, loaded
from mlmfast.icl.models import METRIC, Opened, Settings, open_model
from mlmfast.icl.outcomes import Outcome, together
from mlmfast.identity import versions
from mlmfast.masking import check_metric

BLIMP = "blimp"
# Where the metric of masked models is not the paper's three masks: texts that stand alone have one.
METRICS = dict.fromkeys((BLIMP, *gpt2.WHOLE), "original")
# What the paper ran once (section 5): besides all with no shots.
ONCE = ("record", "storycloze", "wmt", gpt2.PREFIX)
SPLITS = ("test", "train")


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        models: names or folders, each perhaps after ``masked:`` or ``causal:``.
        tasks: names of tasks and groups, ``blimp`` among them.
        data: task -> split (``test``, ``train``) -> file or folder.
        shots: numbers of demonstrations.
        repetitions: draws of demonstrations; one where there is nothing to draw, and where the paper has one.
        seed: of the first draw; each further one has the next.
        limit: the first so many examples, of BLiMP in each paradigm; None for all.
        separator: of prompts' lines; ``auto``: by each model's tokenizer.
        settings: how models are loaded; ``metric`` None for the paper's.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    data: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    shots: Sequence[int] = (0,)
    repetitions: int = 5
    seed: int = 42
    limit: int | None = None
    separator: str = "auto"
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Run:
    """One row of the report before it is computed: a task under so many shots, once a seed."""

    task: str
    shots: int
    seeds: tuple[int, ...]


def runs_of(plan: Plan) -> list[Run]:
    """What is run of each model, in order.

    Raises:
        RequestError: an unknown task, numbers that cannot be, data of what is not asked for.
    """
    if not plan.models:
        raise RequestError("--model is missing: name at least one")
    if not plan.tasks:
        raise RequestError(f"--tasks is missing: choose from {', '.join(known_tasks())}")
    if plan.repetitions < 1 or (plan.limit is not None and plan.limit < 1):
        raise RequestError("--repetitions and --limit are whole numbers from 1")
    if not plan.shots or min(plan.shots) < 0:
        raise RequestError("--shots are whole numbers from 0, such as 0,1,4")
    names = members(plan.tasks)
    unasked = [name for name in plan.data if name not in names]
    if unasked:
        raise RequestError(f"--data {unasked[0]}=...: the tasks asked for are {', '.join(names)}")
    if BLIMP in names and "test" not in plan.data.get(BLIMP, {}):
        raise RequestError("task blimp needs its file: --data blimp=FILE (UID, sentence_good, sentence_bad)")
    if not written(plan.separator).strip(" "):
        raise RequestError(f"--separator {plan.separator!r}: spaces part no lines of the tasks' prompts")
    found = []
    for name in names:
        own = gpt2.shots_of(name, plan.shots) if name.startswith(gpt2.PREFIX) else plan.shots
        for shots in sorted({0} if name == BLIMP else set(own)):
            once = shots == 0 or name.startswith(ONCE)
            found.append(Run(name, shots, tuple(plan.seed + i for i in range(1 if once else plan.repetitions))))
    return found


def notes(plan: Plan, asked: Sequence[Run]) -> list[str]:
    """What was not done as it was asked for, and why: numbers of demonstrations that a task does not have."""
    found = []
    for task in dict.fromkeys(run.task for run in asked):
        shots = sorted({run.shots for run in asked if run.task == task})
        if shots != sorted(set(plan.shots)):
            given, taken = (", ".join(map(str, sorted(set(one)))) for one in (plan.shots, shots))
            found.append(f"{task}: its protocol has {taken} shots, whatever --shots says ({given})")
    return found


def known_tasks() -> list[str]:
    """Tasks and groups."""
    groups, single = tasks.catalogue()
    return sorted(name.removeprefix(tasks.PREFIX) for name in (*single, *groups)) + [BLIMP]


def members(names: Sequence[str]) -> list[str]:
    """The tasks that names of tasks and groups stand for, each once.

    Raises:
        RequestError: an unknown name.
    """
    found: list[str] = []
    for name in names:
        if name == BLIMP:
            found.append(name)
            continue
        if name.removeprefix(tasks.PREFIX) not in known_tasks():
            raise RequestError(f"--tasks {name} is not known; choose from {', '.join(known_tasks())}")
        found += [member.removeprefix(tasks.PREFIX) for member in tasks.members(name)]
    return list(dict.fromkeys(found))


def run(plan: Plan, folder: Path, *, samples: list[dict[str, Any]] | None = None, quiet: bool = True) -> dict[str, Any]:
    """Computes what is not in ``folder`` yet and returns the report.

    Args:
        plan: what is evaluated.
        folder: answers are kept in ``folder/answers``, each as soon as it is there.
        samples: is given every example of every run.
        quiet: no bars on stderr.

    Raises:
        MLMFastError: what is wrong with the request, found before a model is loaded as far as it can be.
    """
    started = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError("mlmfast eval runs in one process: start it without torchrun or accelerate launch")
    check_metric(plan.settings.metric or METRIC, plan.settings.window, 8)
    asked = runs_of(plan)
    labels = labels_of(plan.models)
    for kind, name in map(split, plan.models):
        if kind is None:
            kind_of(name, plan.settings.revision)
    _check_data(plan, asked)
    described, results, tally = [], [], {"computed": 0, "found": 0}
    for spec, label in labels.items():
        opened = open_model(spec, plan.settings, plan.separator)
        metrics = _metrics(plan, opened, asked)
        described.append(_description(opened, label, metrics, plan.settings.revision))
        for metric in metrics or [""]:
            one = with_metric(opened, metric, plan.settings.window)
            mine = [run for run in asked if not metric or _metric_of(plan, run.task) == metric]
            with Answers(folder / "answers" / f"{one.file}.jsonl", one.identity) as answers:
                for each in mine:
                    results.append(_evaluated(plan, one, label, each, answers, samples, quiet, tally))
        del opened, one
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    order = {name: place for place, name in enumerate(dict.fromkeys(run.task for run in asked))}
    results.sort(key=lambda result: (list(labels.values()).index(result["model"]), order[result["task"]]))
    return {
        "versions": versions() | {"lm_eval": lm_eval.__version__},
        "notes": notes(plan, asked),
        "seed": plan.seed,
        "limit": plan.limit,
        "data": {task: {split: str(path) for split, path in one.items()} for task, one in plan.data.items()},
        "models": described,
        "results": results,
        "run": {"seconds": time.perf_counter() - started} | tally,
    }


def _evaluated(
    plan: Plan,
    opened: Opened,
    label: str,
    asked: Run,
    answers: Answers,
    samples: list[dict[str, Any]] | None,
    quiet: bool,
    tally: dict[str, int],
) -> dict[str, Any]:
    """One row of the report."""
    from tqdm import tqdm

    def advance(number: int) -> None:
        bar.update(number)

    outcomes: list[Outcome] = []
    cut = 0
    # disable=None: a bar on a terminal only
    with tqdm(unit=" requests", file=sys.stderr, disable=True if quiet else None, leave=False) as bar:
        task = None
        if asked.task != BLIMP:
            task = loaded(asked.task, plan.data.get(asked.task), asked.shots, asked.seeds[0], opened.separator)
        for repetition, seed in enumerate(asked.seeds):
            bar.set_description(f"{label}, {asked.task}, {asked.shots} shots, {repetition + 1} of {len(asked.seeds)}")
            lm = Answering(opened.lm, answers, opened.lengths, opened.limit, opened.prepare, advance)
            with quiet_transformers():  # of padding without a mask, which a causal model needs none for
                if task is None:
                    outcome = blimp.judged(lm, blimp.read_pairs(plan.data[BLIMP]["test"], plan.limit))
                else:
                    task.set_fewshot_seed(seed)
                    outcome = judged(lm, task, plan.limit)
            outcomes.append(outcome)
            tally["computed"] += lm.computed
            tally["found"] += lm.asked - lm.computed
            cut += lm.cut
            if samples is not None:
                place = {"model": label, "task": asked.task, "shots": asked.shots, "repetition": repetition}
                samples += [place | sample for sample in outcome.samples]
    head = {"model": label, "task": asked.task, "shots": asked.shots, "seeds": list(asked.seeds), "cut": cut}
    return head | together(outcomes)


def labels_of(models: Sequence[str]) -> dict[str, str]:
    """Model as asked for -> its name in the report: the last part of a path where no other ends like it."""
    models = list(dict.fromkeys(models))
    short = [Path(split(spec)[1]).name or spec for spec in models]
    return {spec: name if short.count(name) == 1 else spec for spec, name in zip(models, short)}


def with_metric(opened: Opened, metric: str, window: int) -> Opened:
    """The same masked model under another metric; its weights are shared."""
    if opened.kind == "causal" or opened.identity["metric"] == metric:
        return opened
    lm = copy.copy(opened.lm)
    lm.masking = lm.masking | {"metric": metric, "window": window}
    identity = {name: value for name, value in opened.identity.items() if name != "window"} | {"metric": metric}
    return replace(opened, lm=lm, identity=identity | ({"window": window} if metric == "window" else {}))


def _metric_of(plan: Plan, task: str) -> str:
    return plan.settings.metric or METRICS.get(task, METRIC)


def _metrics(plan: Plan, opened: Opened, asked: Sequence[Run]) -> list[str]:
    """Those that a masked model is asked under."""
    return [] if opened.kind == "causal" else list(dict.fromkeys(_metric_of(plan, run.task) for run in asked))


def _check_data(plan: Plan, asked: Sequence[Run]) -> None:
    """Reads what will be needed, so that a file that is wrong is found before a model is loaded."""
    for task in dict.fromkeys(run.task for run in asked):
        if task == BLIMP:
            blimp.read_pairs(plan.data[BLIMP]["test"], 1)
            continue
        most = max(run.shots for run in asked if run.task == task)
        one = loaded(task, plan.data.get(task), most, plan.seed, NEWLINE)
        try:
            one.fewshot_context(next(iter(one.test_docs())), most)
        except MLMFastError as error:
            raise RequestError(f"--data {task}=FILE, --data {task}.train=FILE: {error}") from error


def _description(opened: Opened, label: str, metrics: Sequence[str], revision: str | None) -> dict[str, Any]:
    return {
        "label": label,
        "name": opened.name,
        "revision": revision,
        "kind": opened.kind,
        "parameters": opened.parameters,
        "max_length": opened.limit,
        "dtype": opened.identity["dtype"].removeprefix("torch."),
        "device": opened.identity["device"],
        "separator": opened.separator,
        "metrics": list(metrics),
        "identity": opened.identity,
    }
