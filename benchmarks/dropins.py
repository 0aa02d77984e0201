"""The drop-ins against what they stand in for, from texts to scores, in one run: minicons, lm-pub-quiz, BabyLM,
bert-in-context.

    python benchmarks/dropins.py --data sentences.txt --output benchmarks/results/dropins

minicons and lm-pub-quiz run their own code; BabyLM's pipeline and bert-in-context, which are not on PyPI, are their
published conventions, in batches of the size that they use. A round gives its share of the texts to both sides in
turn, and all results are compared: where two totals differ by more than ``1e-4`` times max(1, |total|) there is no
ratio. Writes ``OUTPUT.json`` and ``OUTPUT.md``.
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine_line, table, write
from torch import Tensor

import mlmfast
from mlmfast.bench import machine
from mlmfast.bench.agreement import FLOAT32_BOUND
from mlmfast.bench.peers.minicons import repaired_scorer
from mlmfast.bench.sentences import read_sentences
from mlmfast.bench.texts import loaded
from mlmfast.bench.timing import summary
from mlmfast.integrations import babylm, bert_in_context
from mlmfast.integrations.lm_pub_quiz import MaskedLMEvaluator
from mlmfast.integrations.minicons import MaskedLMScorer

Side = Callable[[Sequence[str]], list[float]]
"""Texts -> their total scores."""

BABYLM_BATCH = 64  # items, and masked rows of a pass: the pipeline's defaults
IN_CONTEXT_BATCH = 8  # rows of a pass: what every script of bert-in-context passes
IN_CONTEXT_WORDS = 3  # scored at the end of a text


def minicons(lm: mlmfast.MaskedLM) -> tuple[Side, Side]:
    """``sequence_score`` of eight texts at a time."""
    sides = (repaired_scorer(lm.model, lm.tokenizer), MaskedLMScorer(lm.model, tokenizer=lm.tokenizer))

    def side(scorer: Any) -> Side:
        return lambda texts: [
            total
            for start in range(0, len(texts), 8)
            for total in scorer.sequence_score(list(texts[start : start + 8]), reduction=lambda x: x.sum(0).item())
        ]

    return side(sides[0]), side(sides[1])


def lm_pub_quiz(lm: mlmfast.MaskedLM) -> tuple[Side, Side]:
    """``evaluate_instance`` of a template whose answers are the texts, 20 a question, batches of 32 rows."""
    from lm_pub_quiz import MaskedLMEvaluator as Theirs

    def side(kind: Any) -> Side:
        evaluator = kind.from_model(lm.model, tokenizer=lm.tokenizer, device="cpu", pll_metric="within_word_l2r")
        return lambda texts: [
            total
            for start in range(0, len(texts), 20)
            for total in evaluator.evaluate_instance(
                template="It is known that [Y]", answers=texts[start : start + 20], reduction="sum", batch_size=32
            )
        ]

    return side(Theirs), side(MaskedLMEvaluator)


def babylm_zero_shot(lm: mlmfast.MaskedLM) -> tuple[Side, Side]:
    """Totals of whole sentences, 64 of them a batch of the dataloader, 64 masked rows and all their logits a pass."""

    def side(compute: Callable[[dict[str, Any]], list[float]]) -> Side:
        return lambda texts: [
            total
            for start in range(0, len(texts), BABYLM_BATCH)
            for total in compute(_completion_rows(lm.tokenizer, texts[start : start + BABYLM_BATCH]))
        ]

    def theirs(rows: dict[str, Any]) -> list[float]:
        found = []
        parts = ("tokens", "attn_mask", "indices", "targets")
        for ids, seen, at, targets in zip(*(rows[f"sentence_0_{part}"].split(BABYLM_BATCH) for part in parts)):
            logits = lm.model(input_ids=ids, attention_mask=seen).logits  # [64, L, V]
            found.append(logits[torch.arange(len(at)), at].log_softmax(1).gather(1, targets[:, None])[:, 0])
        return [float(part.sum()) for part in torch.cat(found).split(rows["sentence_0_examples_per_batch"])]

    def ours(rows: dict[str, Any]) -> list[float]:
        return babylm.completion_totals(lm, rows, [1.0])[:, 0, 0].tolist()

    return side(theirs), side(ours)


def _completion_rows(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """What the pipeline's dataloader makes of whole sentences, a row a token."""
    encoding = tokenizer(list(texts), return_special_tokens_mask=True, return_tensors="pt", padding=True)
    scored = encoding["special_tokens_mask"] == 0
    scored |= encoding["input_ids"] == tokenizer.unk_token_id
    which, positions = scored.nonzero(as_tuple=True)
    ids = encoding["input_ids"][which].clone()
    targets = ids[torch.arange(len(ids)), positions]
    ids[torch.arange(len(ids)), positions] = tokenizer.mask_token_id
    rows = {"tokens": ids, "attn_mask": encoding["attention_mask"][which], "indices": positions, "targets": targets}
    return {f"sentence_0_{name}": value for name, value in rows.items()} | {
        "sentence_0_examples_per_batch": scored.sum(1).tolist()
    }


def in_context(lm: mlmfast.MaskedLM) -> tuple[Side, Side]:
    """``score()`` of each text's last words, eight rows a pass, as its scripts call it."""

    def theirs(text: str) -> float:
        encoding = lm.tokenizer(text, add_special_tokens=False)
        words = encoding.word_ids()
        first = max(word for word in words if word is not None) + 1 - IN_CONTEXT_WORDS
        ids = torch.tensor([lm.tokenizer.cls_token_id, *encoding["input_ids"], lm.tokenizer.sep_token_id])
        places = torch.tensor([i + 1 for i, word in enumerate(words) if word is not None and word >= first])
        every = torch.arange(len(ids))
        masked = (every >= places[:, None]) & (every < places[:, None] + 3) & (every < len(ids) - 1)
        copies = torch.where(masked, lm.tokenizer.mask_token_id, ids)
        total = 0.0
        for rows, at in zip(copies.split(IN_CONTEXT_BATCH), places.split(IN_CONTEXT_BATCH)):
            logits: Tensor = lm.model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
            chosen = logits[torch.arange(len(at)), at].log_softmax(1)
            total += float(chosen.gather(1, ids[at][:, None]).sum())
        return total

    def ours(text: str) -> float:
        return bert_in_context.score(lm, text, IN_CONTEXT_WORDS, lm.tokenizer, "cpu", IN_CONTEXT_BATCH)

    return (lambda texts: [theirs(text) for text in texts]), (lambda texts: [ours(text) for text in texts])


TOOLS: dict[str, Callable[[mlmfast.MaskedLM], tuple[Side, Side]]] = {
    "minicons": minicons,
    "lm-pub-quiz": lm_pub_quiz,
    "BabyLM 2025": babylm_zero_shot,
    "bert-in-context": in_context,
}


@torch.inference_mode()
def measured(tool: str, name: str, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """One row: texts a second of both sides by rounds, their ratio, and the largest difference of two results."""
    lm = loaded(name)
    sides = TOOLS[tool](lm)
    for side in sides:  # warm
        side(texts[:20])
    rates: tuple[list[float], list[float]] = ([], [])
    error = 0.0
    for r in range(rounds):
        share = texts[r::rounds]
        found: dict[int, list[float]] = {}
        for which in (0, 1) if r % 2 == 0 else (1, 0):
            start = time.perf_counter()
            found[which] = sides[which](share)
            rates[which].append(len(share) / (time.perf_counter() - start))
        # Of totals, each of many tokens, no more is allowed than of one token.
        worst = np.abs(np.subtract(found[0], found[1])) / np.maximum(1, np.abs(found[0]))
        error = float(np.maximum(error, worst.max()))  # a NaN stays one
    row: dict[str, Any] = {"tool": tool, "model": name, "texts": len(texts), "error": error}
    row["agrees"] = bool(error <= FLOAT32_BOUND)
    if row["agrees"]:
        row |= {"theirs": summary(rates[0]), "ours": summary(rates[1])}
        row["ratios"] = summary([b / a for a, b in zip(*rates)])
        row["ratio"] = row["ours"]["median"] / row["theirs"]["median"]
    return row


def markdown(result: dict[str, Any]) -> list[str]:
    def cells(row: dict[str, Any]) -> list[str]:
        if not row["agrees"]:
            return [row["tool"], row["model"], "", "", "disagree", f"{row['error']:.0e}"]
        spread = f"{row['ratio']:.2f}x ({row['ratios']['q1']:.2f}-{row['ratios']['q3']:.2f})"
        rates = [f"{row[side]['median']:.1f}" for side in ("theirs", "ours")]
        return [row["tool"], row["model"], *rates, spread, f"{row['error']:.0e}"]

    settings = result["settings"]
    return [
        "# The drop-ins against what they stand in for",
        "",
        f"Texts a second from text to scores, float32, {settings['texts']} sentences dealt to {settings['rounds']} "
        "rounds; medians, and the middle half of the ratios. The difference is the largest of two totals, over "
        "max(1, |total|). BabyLM and bert-in-context: a batched loop in their published convention, logits of every "
        "position as there.",
        "",
        *table(["tool", "model", "its own", "drop-in", "ratio", "difference"], [cells(row) for row in result["rows"]]),
        "",
        machine_line(result["header"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="sentences: a line each, JSON Lines, CSV or Parquet")
    parser.add_argument("--field", default="text", help="column or key of the texts")
    parser.add_argument("--texts", type=int, default=400, help="how many, spread evenly over the file")
    parser.add_argument("--models", nargs="+", default=["tiny"], help="tiny, folders, or shapes of `mlmfast bench pll`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--output", type=Path, required=True, help="where to write, without a suffix")
    args: Namespace = parser.parse_args()
    texts = read_sentences(args.data, field=args.field, count=args.texts)
    header = machine.describe()
    rows = [measured(tool, name, texts, args.rounds) for name in args.models for tool in args.tools]
    result = {"header": header, "settings": {"texts": len(texts), "rounds": args.rounds}, "rows": rows}
    write(args.output, result, markdown(result))
    if not all(row["agrees"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
