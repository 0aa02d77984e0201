"""What evaluations are tested on: a masked and a causal model in folders, RTE and BLiMP rows of the tests' grammar."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import causal
import checkpoints
from transformers import PreTrainedTokenizerBase

TESTED, SHOTS, PAIRS = 6, 9, 5


@dataclass(frozen=True)
class Inputs:
    """Folders of models, files of data, and the rows in them."""

    masked: Path
    causal: Path
    rte: Path
    train: Path
    blimp: Path
    tested: list[dict[str, Any]]
    shots: list[dict[str, Any]]
    pairs: list[dict[str, str]]

    @property
    def data(self) -> list[str]:
        """As the command line takes it."""
        return ["--data", f"rte={self.rte}", "--data", f"rte.train={self.train}", "--data", f"blimp={self.blimp}"]


def make(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """``tokenizer`` drops line breaks; that of the causal model keeps them."""
    masked = checkpoints.small_bert(len(tokenizer), max_position_embeddings=400)
    other = causal.gpt2_tokenizer()
    (folder / "masked").mkdir()
    (folder / "causal").mkdir()
    checkpoints.save(folder / "masked", masked, tokenizer)
    checkpoints.save(folder / "causal", causal.small_gpt2(len(other)), other)
    rng = random.Random(3)
    texts = checkpoints.sentences(2 * (TESTED + SHOTS), seed=11)
    judged = [
        {"premise": premise, "hypothesis": hypothesis, "label": rng.choice(["True", "False"])}
        for premise, hypothesis in zip(texts[::2], texts[1::2])
    ]
    pairs = []
    for paradigm in ("order", "another_order", "one_more"):
        for sentence in checkpoints.sentences(PAIRS, seed=len(paradigm)):
            words = sentence.split()
            rng.shuffle(words)
            pairs.append({"UID": paradigm, "sentence_good": sentence, "sentence_bad": " ".join(words)})
    tested, shots = judged[:TESTED], judged[TESTED:]
    for name, rows in (("rte", tested), ("others", shots), ("blimp", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = [folder / f"{name}.jsonl" for name in ("rte", "others", "blimp")]
    return Inputs(folder / "masked", folder / "causal", *files, tested, shots, pairs)
