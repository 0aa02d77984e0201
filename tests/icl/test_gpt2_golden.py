"""What the GPT-2 paper's tasks ask and what answers are worth, two examples each, as files to read.

After a change that is meant: ``python tests/icl/test_gpt2_golden.py`` writes them anew, and the difference is to be
read. ⟦ ⟧ is what is scored.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason='pip install "mlmfast[lm_eval]"')

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where pytest finds it by itself
import gpt2_rows

from mlmfast.icl import tasks

GOLDEN = Path(__file__).parent / "golden_gpt2"


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.split("\n"))


def worth(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {round(value, 4) if isinstance(value, float) else value}"
        for name, value in values.items()
        if name != "score"
    )


def document(name: str, folder: Path) -> str:
    shots = 2 if gpt2_rows.ROWS[name][1] else 0
    (task,) = tasks.load(name, data={name: folder}, separator="\n", num_fewshot=shots).values()
    lines = [task.config.task]
    for place, doc in enumerate(task.eval_docs[:2]):
        found = task.construct_requests(doc, task.fewshot_context(doc, shots), metadata=(task.config.task, place, 1))
        gold = task.doc_to_target(doc)
        lines += ["", f"row {place + 1}, {shots} demonstrations"]
        for i, request in enumerate(found if isinstance(found, list) else [found]):
            if name in gpt2_rows.RANKING:
                lines.append(f"  candidate {i}{' (right)' if i == gold else ''}:")
            else:
                lines.append(f"  {request.request_type}:")
            if request.request_type == "generate_until":
                prompt, settings = request.args
                lines += [indented(f"{prompt}⟦"), f"  search: {settings}", f"  wanted: {gold!r}"]
                best = gold if isinstance(gold, str) else gold[-1]
                for answer in (f" {best}", " Nothing. At all.\nNo."):
                    lines.append(f"  {answer!r} -> {worth(task.process_results(doc, [answer]))}")
            else:
                *context, scored = request.args
                lines.append(indented(f"{''.join(context)}⟦{scored}⟧"))
        if name in gpt2_rows.RANKING:
            choices = task.doc_to_choice(doc)
            for chosen in range(2):
                won = [(float(chosen == i), False) for i in range(len(choices))]
                lines.append(f"  candidate {chosen} chosen -> {worth(task.process_results(doc, won))}")
        elif task.OUTPUT_TYPE == "loglikelihood":
            lines.append(f"  (-2.5, greedy) -> {worth(task.process_results(doc, [(-2.5, True)]))}")
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            lines.append(f"  -99.5 -> {worth(task.process_results(doc, [-99.5]))}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", gpt2_rows.ROWS)
def test_golden(name: str, tmp_path: Path) -> None:
    assert document(name, gpt2_rows.write(tmp_path)) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_every_task_has_one() -> None:
    _, known = tasks.catalogue()
    own = [name.removeprefix("icl_") for name in known if name.startswith("icl_gpt2_")]
    assert sorted(own) == sorted(gpt2_rows.ROWS) == sorted(path.stem for path in GOLDEN.glob("*.txt"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        GOLDEN.mkdir(exist_ok=True)
        for name in gpt2_rows.ROWS:
            (GOLDEN / f"{name}.txt").write_text(document(name, gpt2_rows.write(Path(made))), encoding="utf-8")
