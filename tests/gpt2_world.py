"""What the GPT-2 paper's tasks are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import causal
import checkpoints
import gpt2_loops as loops
import gpt2_rows
from transformers import AutoTokenizer
from truth import forward_of

import mlmfast
from mlmfast.icl import evaluate
from mlmfast.icl.evaluate import Plan
from mlmfast.icl.models import Settings

Ran = tuple[dict[str, Any], list[dict[str, Any]]]
HELD = 256
KINDS = ("masked", "causal")


class World:
    """A small masked and a small causal model in folders, the loops over them, and the rows as files."""

    def __init__(self, folder: Path) -> None:
        for name in (*KINDS, "data"):
            (folder / name).mkdir()
        own = causal.gpt2_tokenizer()
        model = causal.small_gpt2(len(own), n_positions=HELD)
        checkpoints.save(folder / "causal", model, own)
        other = AutoTokenizer.from_pretrained(Path(mlmfast.__file__).with_name("tiny"))
        masked = checkpoints.small_deberta(len(other), seed=7)
        checkpoints.save(folder / "masked", masked, other)
        self.folder, self.data = folder, gpt2_rows.write(folder / "data")
        self.tokenizers = {"masked": other, "causal": own}
        self.loops: dict[str, Any] = {
            "masked": loops.Masked(forward_of(masked), other),
            "causal": loops.Causal(model, own, HELD),
        }

    def run(self, names: list[str], folder: Path, kinds: tuple[str, ...] = KINDS) -> Ran:
        """Report and samples of some tasks, the pairs of those that show some two."""
        data = {}
        for name in names:
            data[name] = {"test": self.data / f"{name}.jsonl"}
            if gpt2_rows.ROWS[name][1]:
                data[name]["train"] = self.data / f"{name}.train.jsonl"
        samples: list[dict[str, Any]] = []
        models = [str(self.folder / kind) for kind in kinds]
        # The loops are over transformers' own code, and some texts are longer than the model was trained on.
        plan = Plan(models=models, tasks=names, data=data, shots=(0, 2), settings=Settings(semantics="upstream"))
        return evaluate.run(plan, folder, samples=samples), samples
