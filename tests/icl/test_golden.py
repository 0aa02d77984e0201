"""Each task's prompts, candidates, scored spans and metrics, as files to read.

After a change that is meant: ``python tests/icl/test_golden.py`` writes them anew, and the difference is to be read.
In the files a line ends after each separator, and ⟦ ⟧ is what is scored.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason='pip install "mlmfast[lm_eval]"')

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where pytest finds it by itself
import icl_rows

from mlmfast.icl import tasks

GOLDEN = Path(__file__).parent / "golden"


def shown(text: str) -> str:
    """A text over lines, indented."""
    lines = text.replace(tasks.SEPARATOR, tasks.SEPARATOR.rstrip() + "⏎").split("⏎")
    return "\n".join("    " + line for line in lines)


def asked(task: Any, place: int, shots: int) -> list[Any]:
    """The requests of one row."""
    doc = task.eval_docs[place]
    found = task.construct_requests(doc, task.fewshot_context(doc, shots), metadata=(task.config.task, place, 1))
    return found if isinstance(found, list) else [found]


def worth(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def ranked(task: Any, place: int, shots: int) -> list[str]:
    doc, requests = task.eval_docs[place], asked(task, place, shots)
    choices, gold = task.doc_to_choice(doc), task.doc_to_target(doc)
    lines = []
    for i, request in enumerate(requests):
        context, continuation = request.args
        alone = i >= len(choices)
        which = i % len(choices)
        title = f"without the question, to subtract from candidate {which}" if alone else f"candidate {which}"
        lines.append(f"  {title}{' (right)' if which == gold and not alone else ''}:")
        lines.append(shown(f"{context}⟦{continuation}⟧"))
        if not alone:
            won = [(float(j % len(choices) == i), False) for j in range(len(choices))]
            won += [(0.0, False)] * (len(requests) - len(choices))
            lines.append(f"    -> {worth(task.process_results(doc, won))}")
    return lines


def generated(task: Any, place: int, shots: int) -> list[str]:
    doc, (request,) = task.eval_docs[place], asked(task, place, shots)
    context, settings = request.args
    gold = task.doc_to_target(doc)
    lines = ["  prompt:", shown(context + "⟦"), f"  search: {settings}", f"  wanted: {gold!r}"]
    for answer in (f" {gold if isinstance(gold, str) else gold[-1]}", " nothing\\n of this"):
        lines.append(f"  {answer!r} -> {worth(task.process_results(doc, [answer]))}")
    return lines


def document(name: str, folder: Path) -> str:
    data = {name: folder}
    (task,) = tasks.load(name, data=data).values()
    lines = [f"{task.config.task}"]
    for place in range(2):
        for shots in (0, 2):
            one = ranked if name in icl_rows.RANKING else generated
            lines += ["", f"row {place + 1}, {shots} demonstrations", *one(task, place, shots)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", icl_rows.ROWS)
def test_golden(name: str, tmp_path: Path) -> None:
    assert document(name, icl_rows.write(tmp_path)) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_every_task_has_one() -> None:
    _, known = tasks.catalogue()
    # Those of the GPT-2 paper have files and a test of their own.
    own = [name.removeprefix("icl_") for name in known if not name.startswith("icl_gpt2_")]
    assert sorted(own) == sorted(icl_rows.ROWS)
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(icl_rows.ROWS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        for name in icl_rows.ROWS:
            (GOLDEN / f"{name}.txt").write_text(document(name, icl_rows.write(Path(made))), encoding="utf-8")
