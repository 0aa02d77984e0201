"""InfoLM of mlmfast against torchmetrics' own, a published shape with random weights, from texts to scores.

    python benchmarks/infolm.py --output benchmarks/results/this-machine/infolm

Texts are of random words, no two of one length and sorted by it: only so does torchmetrics pair predictions with their
own references. Both sides must agree before anything is timed. Needs torchmetrics; takes a few minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine_line, table, write

SHORTEST = 8  # words of the shortest text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="without suffix")
    parser.add_argument("--shape", default="roberta-base")
    parser.add_argument("--pairs", type=int, default=8, help="of texts, each two words longer than the one before")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    import torchmetrics
    from torchmetrics.text.infolm import InfoLM as Theirs

    from mlmfast.bench.agreement import agreement
    from mlmfast.bench.machine import describe
    from mlmfast.bench.shapes import named
    from mlmfast.bench.timing import interleaved, summary
    from mlmfast.integrations.torchmetrics import InfoLM

    shape, machine = named(given.shape), describe()
    draw = np.random.default_rng(0)
    sides_texts = [
        [shape.spell(draw.integers(5, shape.settings["vocab_size"], SHORTEST + 2 * i)) for i in range(given.pairs)]
        for _ in range(2)
    ]
    options: dict[str, Any] = {"max_length": shape.max_length, "batch_size": given.pairs, "verbose": False}
    options["return_sentence_level_score"] = True
    with tempfile.TemporaryDirectory() as folder:
        shape.model().save_pretrained(folder)
        shape.tokenizer(spelled=True).save_pretrained(folder)
        metrics = [one(folder, **options) for one in (InfoLM, Theirs)]

    def scores(metric: Any) -> torch.Tensor:
        metric.reset()
        metric.update(*sides_texts)
        return metric.compute()[1]

    ours, theirs = metrics
    verdict = agreement(scores(ours).numpy(), scores(theirs).numpy())
    result: dict[str, Any] = {"machine": machine, "torchmetrics": torchmetrics.__version__, "shape": given.shape}
    result |= {"pairs": given.pairs, "error": verdict.error, "bound": verdict.bound}
    if not verdict.holds:
        raise SystemExit(f"the two sides disagree (error {verdict.error:.2e}), so no speed is measured")
    times = interleaved([partial(scores, ours), partial(scores, theirs)], given.rounds)
    seconds = [summary(side) for side in times]
    rounds = summary([b / a for a, b in zip(*times)])
    result |= {"seconds": seconds[0], "peer_seconds": seconds[1], "ratio": rounds}
    rows = [
        [
            f"{given.pairs} pairs of {SHORTEST} to {SHORTEST + 2 * (given.pairs - 1)} words",
            f"{seconds[0]['median']:.2f}",
            f"{seconds[1]['median']:.2f}",
            f"{rounds['median']:.2f}x ({rounds['q1']:.2f}-{rounds['q3']:.2f})",
            f"{verdict.error:.1e}",
        ]
    ]
    header = ["texts", "mlmfast, s", "torchmetrics, s", "ratio", "error"]
    lines = [f"# InfoLM against torchmetrics {torchmetrics.__version__}, {given.shape}'s shape, float32", ""]
    lines += [
        f"KL divergence with idf; medians of {given.rounds} interleaved rounds; above 1x mlmfast is the faster.",
        "",
    ]
    write(given.output, result, [*lines, *table(header, rows), "", machine_line(machine)])


if __name__ == "__main__":
    main()
