"""Masked marginals against the batch-1 loop of esm's ``predict.py``, at ESM-2's shapes with random weights.

    python benchmarks/proteins.py --output benchmarks/results/this-machine/proteins

The loop is that script's: a pass of one copy for each token, BOS and EOS too, a log-softmax of all its rows, over
Hugging Face's model with torch's own attention. Both sides must agree before anything is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine_line, table, write
from transformers import EsmTokenizer

VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="without suffix")
    parser.add_argument("--shape", default="esm2-t12-35m")
    parser.add_argument("--lengths", default="64,128,256", help="residues; commas between")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    import mlmfast
    from mlmfast.bench.agreement import agreement
    from mlmfast.bench.machine import describe
    from mlmfast.bench.shapes import named
    from mlmfast.bench.timing import interleaved, summary
    from mlmfast.proteins import masked_marginals

    machine, shape = describe(), named(given.shape)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(VOCABULARY), encoding="utf-8")
        tokenizer = EsmTokenizer(str(vocabulary))
    model = replace(shape, settings=shape.settings | {"mask_token_id": tokenizer.mask_token_id}).model()
    model.set_attn_implementation("sdpa")
    lm = mlmfast.load(model, tokenizer)

    @torch.inference_mode()
    def loop(sequence: str) -> np.ndarray:
        tokens = torch.tensor([tokenizer(sequence)["input_ids"]])
        rows = []
        for i in range(tokens.shape[1]):
            masked = tokens.clone()
            masked[0, i] = tokenizer.mask_token_id
            rows.append(model(masked, torch.ones_like(masked)).logits.log_softmax(-1)[0, i])
        return torch.stack(rows)[1:-1].numpy()

    draw = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for length in map(int, given.lengths.split(",")):
        sequence = "".join(draw.choice(list(RESIDUES), length))
        verdict = agreement(masked_marginals(lm, [sequence])[0], loop(sequence))
        if not verdict.holds:
            raise SystemExit(
                f"{length} residues: the sides disagree (error {verdict.error:.2e}), so no speed is measured"
            )
        sides: list[Callable[[], object]] = [partial(masked_marginals, lm, [sequence]), partial(loop, sequence)]
        times = interleaved(sides, given.rounds)
        seconds = {"seconds": summary(times[0]), "peer_seconds": summary(times[1])}
        ratio = summary([b / a for a, b in zip(*times)])
        found.append({"residues": length, "error": verdict.error, "bound": verdict.bound, "ratio": ratio} | seconds)
    rows = [
        [
            str(one["residues"]),
            f"{one['seconds']['median']:.2f}",
            f"{one['peer_seconds']['median']:.2f}",
            f"{one['ratio']['median']:.2f}x ({one['ratio']['q1']:.2f}-{one['ratio']['q3']:.2f})",
            f"{one['error']:.1e}",
        ]
        for one in found
    ]
    header = ["residues", "mlmfast, s", "a copy at a time, s", "ratio", "error"]
    lines = [f"# Masked marginals of a protein, {given.shape}'s shape, float32", ""]
    lines += [f"Medians of {given.rounds} interleaved rounds; above 1x mlmfast is the faster.", ""]
    result = {"machine": machine, "shape": given.shape, "rows": found}
    write(given.output, result, [*lines, *table(header, rows), "", machine_line(machine)])


if __name__ == "__main__":
    main()
