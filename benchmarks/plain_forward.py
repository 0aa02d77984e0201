"""A plain forward of Hugging Face's models as they are and under ``mlmfast.accelerate``, in turn in one run.

    python benchmarks/plain_forward.py --output benchmarks/results/plain_forward

A batch is ``--texts`` random texts of ``--shortest`` to ``--longest`` tokens, padded on the right, as a ``fill-mask``
pipeline or an evaluation makes it. Measured are the encoder alone, as classifiers and embeddings use it, and the whole
masked LM, whose head stays Hugging Face's and projects every row. The attention is the one that transformers chooses.

Both sides must agree at attended positions, log-probabilities and states to 1e-4 times max(1, their size), or there is
no result. Writes ``OUTPUT.json`` and ``OUTPUT.md``.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine_line, table, write

BOUND = 1e-4


def padded(shape: Any, texts: int, shortest: int, longest: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``[texts, longest]`` of random tokens in lines of all lengths between."""
    lengths = np.linspace(shortest, longest, texts).round().astype(int)
    ids = np.full((texts, longest), list(shape.special).index("pad_token"), np.int64)
    mask = np.zeros((texts, longest), np.int64)
    order = np.random.default_rng(seed).permutation(texts)
    for line, length in zip(order, lengths):
        ids[line, :length] = shape.texts(int(length), 1, seed + int(line))[0].token_ids
        mask[line, :length] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def check(found: torch.Tensor, right: torch.Tensor, mask: torch.Tensor, logits: bool) -> float:
    """Largest difference at attended positions, for its size.

    Raises:
        SystemExit: it is not rounding.
    """
    found, right = found[mask.bool()], right[mask.bool()]
    if logits:
        found, right = found.log_softmax(1), right.log_softmax(1)
    off = float(((found - right).abs() / right.abs().clamp(min=1)).max())
    if not off <= BOUND:
        raise SystemExit(f"the two sides differ by {off}: no speed")
    return off


def measure(name: str, given: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Rows of one shape: its encoder, and its masked LM."""
    import mlmfast
    from mlmfast.bench.shapes import named
    from mlmfast.bench.timing import interleaved, summary

    shape = named(name)
    model = shape.model()
    if model._supports_sdpa:  # else transformers has only its eager code
        model.set_attn_implementation("sdpa")
    fast = copy.deepcopy(model)
    batch = padded(shape, given["texts"], given["shortest"], given["longest"])
    rows = []
    with torch.inference_mode(), mlmfast.accelerate(fast) as handle:
        for what, sides in (("encoder", (model.base_model, fast.base_model)), ("masked LM", (model, fast))):
            right, found = (side(**batch)[0] for side in sides)
            off = check(found, right, batch["attention_mask"], what == "masked LM")
            del right, found
            times = interleaved([partial(side, **batch) for side in sides], rounds)
            rows.append(
                {"shape": name, "what": what, "attention": model.config._attn_implementation, "error": off}
                | {"rows": batch["attention_mask"].numel(), "attended": int(batch["attention_mask"].sum())}
                | {"original": summary(times[0]), "accelerated": summary(times[1])}
                | {"ratio": float(np.median(times[0]) / np.median(times[1]))}
                | {"ratios": summary((np.array(times[0]) / np.array(times[1])).tolist())}
            )
        if handle.passed:
            raise SystemExit(f"{name} went to the original code: {handle.reason}")
    return rows


def page(result: dict[str, Any]) -> list[str]:
    """What a reader sees."""
    given = result["given"]
    lines = [
        f"float32, a batch of {given['texts']} random texts of {given['shortest']} to {given['longest']} tokens, "
        f"padded to the longest; medians of {given['rounds']} interleaved rounds, quartiles of single rounds' ratios. "
        + machine_line(result["machine"]),
        "",
    ]
    header = ["shape", "pass", "transformers' attention", "rows", "of them tokens", "transformers, s", "mlmfast, s"]
    rows = [
        [row["shape"], row["what"], row["attention"], f"{row['rows']:,}", f"{row['attended']:,}"]
        + [f"{row[side]['median']:.3f}" for side in ("original", "accelerated")]
        + [f"{row['ratio']:.2f}x", f"{row['ratios']['q1']:.2f}-{row['ratios']['q3']:.2f}"]
        for row in result["rows"]
    ]
    return lines + table([*header, "ratio", "quartiles"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="deberta-v3-base,roberta-base,modernbert-base,esm2-t30-150m")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--shortest", type=int, default=8)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    from mlmfast.bench.machine import describe

    given = {name: getattr(options, name) for name in ("texts", "shortest", "longest", "rounds")}
    result: dict[str, Any] = {"machine": describe(), "given": given, "rows": []}
    for name in options.shapes.split(","):
        result["rows"] += measure(name, given, options.rounds)
    write(options.output, result, page(result))


if __name__ == "__main__":
    main()
