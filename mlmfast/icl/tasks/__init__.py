"""The tasks of D. Samuel, *BERTs are Generative In-Context Learners* (2024), for lm-evaluation-harness.

A YAML file a task lies beside this one, named ``icl_<task>``, and a few groups with the paper's averages; the README
beside them tables template, split, scored span, metric and shots. :func:`load` makes them lm_eval's tasks; so does
``lm_eval`` itself, given this folder by ``--include_path`` (:data:`FOLDER`), with the same settings by ``--metadata``::

    python -m mlmfast.lm_eval run --model mlmfast --model_args pretrained=NAME,metric=window \
        --include_path .../mlmfast/icl/tasks --tasks icl_rte --num_fewshot 1 --seed 0,1234,1234,42 \
        --metadata '{"data": {"rte": "rte.jsonl"}, "separator": "\\n"}'

**How a task learns its settings.** lm_eval puts what its TaskManager is given as ``metadata`` into every task's
``config.metadata``. Two keys count there: ``separator``, which replaces ``<br>`` wherever a template has it, and
``data``, the local files. ``num_fewshot`` is the task's own config entry, the seed lm_eval's fewshot seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from mlmfast.errors import RequestError

FOLDER = Path(__file__).resolve().parent
PREFIX = "icl_"
# A backslash, an n and a space: DeBERTa's tokenizer drops real line breaks, so the paper writes them out.
SEPARATOR = "\\n "
SEED = 42

Source = str | PathLike[str]


def load(
    names: str | Sequence[str],
    *,
    data: Mapping[str, Source | Mapping[str, Source]] | None = None,
    separator: str = SEPARATOR,
    num_fewshot: int = 0,
    seed: int = SEED,
) -> dict[str, Any]:
    r"""lm_eval's tasks by their names, ready for ``lm_eval.evaluator.evaluate(lm, {"tasks": tasks})``.

    Args:
        names: tasks or groups, with or without ``icl_``: ``"rte"``, ``"icl_superglue"``.
        data: task (or ``"icl_" + task``) -> local JSON Lines (``.jsonl``, ``.jsonl.gz``) with the fields of the Hub's
            data set: a file of test rows; a folder with ``<task>.jsonl``; or ``{"test": file, "train": file}``. Rows to
            draw shots from stand beside a file ``rte.jsonl`` in ``rte.train.jsonl``; they are read only if shots are
            asked for. A task without an entry is loaded from the Hub.
        separator: stands for a line break in prompts. Real ones, ``"\n"``, are for models whose tokenizers keep them.
        num_fewshot: demonstrations before each example, drawn anew for each.
        seed: of the draws. What is drawn depends on it, on the task and on the example's row, on nothing else: an
            interrupted, limited or sharded run draws the same. (``lm_eval.simple_evaluate`` sets its own
            ``fewshot_random_seed`` over it.)

    Returns:
        Task name (``"icl_rte"``) -> task, in the order of ``names``. Answers are scored under the metric that the model
        was made with: the paper's is ``MLMFastLM(..., metric="window")``.

    Raises:
        RequestError: an unknown name; a file or a row that cannot be used, with file, line and field.
    """
    from lm_eval.tasks import TaskManager

    found = members(names)
    known = {name.removeprefix(PREFIX): value for name, value in (data or {}).items()}
    unknown = [name for name in known if PREFIX + name not in found]
    if unknown:
        raise RequestError(f"data is given for {', '.join(unknown)}, which {listing(found)} does not ask for")
    if not isinstance(num_fewshot, int) or num_fewshot < 0:
        raise RequestError(f"num_fewshot={num_fewshot!r} is not a whole number from 0")
    if not separator or not separator.strip(" "):
        raise RequestError(f"separator={separator!r} separates nothing")
    metadata = {"separator": separator, "data": known}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    tasks: dict[str, Any] = {}
    for name in found:
        task = manager.load([name])["tasks"][name]
        task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(seed)
        tasks[name] = task
    return tasks


def members(names: str | Sequence[str]) -> list[str]:
    """The tasks (``icl_rte``) that names of tasks and groups stand for, each once. Reads no data.

    Raises:
        RequestError: an unknown name.
    """
    groups, tasks = catalogue()
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        full = name if name.startswith(PREFIX) or name == PREFIX[:-1] else PREFIX + name
        if full not in groups and full not in tasks:
            raise RequestError(f"task {name!r} is not known; tasks are {listing(tasks)}; groups are {listing(groups)}")
        found |= dict.fromkeys(groups.get(full, [full]))
    return list(found)


def catalogue() -> tuple[dict[str, list[str]], list[str]]:
    """Group -> its tasks, groups within groups resolved; and all tasks."""
    from lm_eval.tasks._yaml_loader import load_yaml

    groups: dict[str, list[str]] = {}
    tasks = []
    for path in sorted(FOLDER.rglob("*.yaml")):
        config = load_yaml(path, resolve_func=False)
        if "group" in config:
            groups[config["group"]] = config["task"]
        elif "task" in config:
            tasks.append(config["task"])

    def leaves(name: str) -> list[str]:
        return [leaf for member in groups[name] for leaf in leaves(member)] if name in groups else [name]

    return {name: leaves(name) for name in groups}, tasks


def listing(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(name.removeprefix(PREFIX) for name in names)
