"""What bfloat16 changes: errors of tokens and texts, ranks, and BLiMP's choices; mlmfast's and Hugging Face's.

    python benchmarks/bfloat16.py --data blimp.jsonl.gz --output benchmarks/results/bfloat16

``--data`` is BLiMP as :mod:`blimp` reads it. The bundled model scores all pairs; published shapes with random weights,
and Hugging Face's eager model, a few of its sentences. The truth is mlmfast in float32, which must agree with Hugging
Face in float32 on those few, to 1e-4 times max(1, |log-probability|) a token, or there is no result. Writes
``OUTPUT.json`` and ``OUTPUT.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from agreement import choices, errors, spearman
from blimp import FIELDS, judge, read_pairs
from record import machine_line, table, write

BASE_SHAPES = ("deberta-v3-base", "roberta-base")
BATCH = 32  # copies of a pass of Hugging Face's
BOUND = 1e-4


@dataclass(frozen=True)
class Scored:
    """Some texts' tokens, scored in one way.

    Attributes:
        logprobs: float32 ``[N]``, of all texts one after another.
        ranks: int64 ``[N]``, 1 for the model's first choice.
        lengths: int64 ``[S]``, scored tokens of each text.
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    lengths: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """PLLs, float64 ``[S]``."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        return np.add.reduceat(self.logprobs.astype(np.float64), starts)

    def first(self, texts: int) -> Scored:
        """Those of the first texts alone."""
        tokens = int(self.lengths[:texts].sum())
        return Scored(self.logprobs[:tokens], self.ranks[:tokens], self.lengths[:texts])


def score(lm: Any, texts: Sequence[str]) -> Scored:
    """With mlmfast."""
    scores = lm.score(texts, ranks=True, progress=False)
    return Scored(
        np.concatenate([one.logprobs for one in scores]),
        np.concatenate([one.ranks for one in scores]),
        np.array([len(one) for one in scores]),
    )


def score_huggingface(lm: Any, texts: Sequence[str]) -> Scored:
    """With the Hugging Face model under ``lm``: eager, padded, a float32 log-softmax over its logits."""
    import torch

    from mlmfast.bench.peers.subject import padded_batches

    plan = lm.plan(texts)
    logprobs, places = np.empty(len(plan.targets), np.float32), np.empty(len(plan.targets), np.int64)
    with torch.inference_mode():
        for batch in padded_batches(plan, lm.tokenizer.pad_token_id, BATCH):
            logits = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
            found = logits[batch.rows].float()  # [n, V]
            own = found.gather(1, batch.targets[:, None])
            logprobs[batch.order] = found.log_softmax(1).gather(1, batch.targets[:, None])[:, 0].numpy()
            places[batch.order] = (found > own).sum(1).numpy() + 1
    return Scored(logprobs, places, np.diff(plan.score_offsets))


def compare(found: Scored, right: Scored) -> dict[str, Any]:
    """Errors of tokens and of totals in nats, and how many tokens have another rank, or enter or leave the first."""
    other = found.ranks != right.ranks
    first = (found.ranks == 1) != (right.ranks == 1)
    moved = np.abs(np.log2(found.ranks) - np.log2(right.ranks))
    return {
        "errors": errors(found.logprobs, right.logprobs),
        "totals": errors(found.totals, right.totals),
        "texts": len(right.lengths),
        "spearman": spearman(found.logprobs, right.logprobs),
        "spearman_totals": spearman(found.totals, right.totals),
        "other_rank": float(other.mean()),
        "other_rank_of_100": float(other[right.ranks <= 100].mean()) if (right.ranks <= 100).any() else None,
        "first_changed": float(first.mean()),
        "rank_factor_p99": float(2 ** np.percentile(moved, 99)),
    }


def check(found: Scored, right: Scored, name: str) -> float:
    """The largest relative distance of two float32 sides.

    Raises:
        SystemExit: they do not agree.
    """
    off = np.abs(found.logprobs - right.logprobs) / np.maximum(1, np.abs(right.logprobs))
    if not off.max() <= BOUND:
        raise SystemExit(f"{name}: float32 and Hugging Face's differ by {off.max():.1e}, more than {BOUND}")
    return float(off.max())


def measure(name: str, texts: Sequence[str], few: int) -> tuple[dict[str, Any], dict[str, Scored]]:
    """A model in both dtypes: all texts with mlmfast, the first few with Hugging Face, too.

    Returns:
        The comparisons, and the scores by way: ``float32``, ``bfloat16``, ``hf``.
    """
    import torch

    import mlmfast
    from mlmfast.bench.shapes import SHAPES
    from mlmfast.bench.texts import loaded

    wide = loaded(name)
    right = score(wide, texts)
    agreement = check(score_huggingface(wide, texts[:few]), right.first(few), name)
    if name in SHAPES:  # narrowed in place: the wide one is not needed any more, and base models are big
        narrow = mlmfast.load(wide.model.to(torch.bfloat16), wide.tokenizer)
    else:
        narrow = mlmfast.load(name, dtype="bfloat16")
    found, theirs = score(narrow, texts), score_huggingface(narrow, texts[:few])
    ways = {"mlmfast": (found.first(few), right.first(few)), "Hugging Face": (theirs, right.first(few))}
    if few < len(texts):
        ways = {"mlmfast, all texts": (found, right)} | ways
    compared = {way: compare(*pair) for way, pair in ways.items()}
    result = {"model": name, "float32_agreement": agreement, "ways": compared}
    return result, {"float32": right, "bfloat16": found, "hf": theirs}


def choose(pairs: Sequence[dict[str, str]], right: Scored, found: Scored) -> dict[str, Any]:
    """BLiMP's choices in two dtypes; a pair's sentences stand one after the other."""
    sides = {name: (scored.totals[::2], scored.totals[1::2]) for name, scored in (("right", right), ("found", found))}
    judged = {name: judge(pairs, good.tolist(), bad.tolist()) for name, (good, bad) in sides.items()}
    return choices(sides["right"], sides["found"]) | {
        "accuracy": judged["right"]["mean"],
        "accuracy_bfloat16": judged["found"]["mean"],
        "ties_bfloat16": judged["found"]["ties"],
        "paradigms": len(judged["right"]["paradigms"]),
    }


def by_place(pairs: Sequence[dict[str, str]], most: int | None = None) -> list[dict[str, str]]:
    """Every paradigm's first pair, then every one's second, and so on; at most so many of each."""
    taken: dict[str, int] = {}
    placed = []
    for pair in pairs:
        place = taken[pair["UID"]] = taken.get(pair["UID"], -1) + 1
        if most is None or place < most:
            placed.append((place, pair))
    return [pair for _, pair in sorted(placed, key=lambda entry: entry[0])]


def markdown(result: dict[str, Any]) -> list[str]:
    blimp = result["blimp"]
    return [
        "# bfloat16 against float32",
        "",
        "The same weights, rounded, and the same texts: BLiMP's sentences, one mask a copy (`original`). bfloat16 "
        "minus float32, in nats. The shapes have random weights. Hugging Face is its eager model in bfloat16 with a "
        "float32 log-softmax over its logits.",
        "",
        *table(
            ["model", "scored by", "texts", "tokens", "bias", "mean error", "99th percentile", "largest"]
            + ["mean error of a text's total", "largest of a total", "rank correlation of tokens", "of totals"],
            [
                [row["model"], way, f"{c['texts']:,}", f"{c['errors']['count']:,}", f"{c['errors']['bias']:+.4f}"]
                + [f"{c['errors'][name]:.4f}" for name in ("mean", "p99", "max")]
                + [f"{c['totals']['mean']:.3f}", f"{c['totals']['max']:.2f}"]
                + [f"{c['spearman']:.5f}", f"{c['spearman_totals']:.5f}"]
                for row in result["models"]
                for way, c in row["ways"].items()
            ],
        ),
        "",
        "Rank of the token that stood there, among the vocabulary:",
        "",
        *table(
            ["model", "scored by", "tokens with another rank", "of those ranked 100 or better"]
            + ["first place gained or lost", "rank off by a factor of (99th percentile)"],
            [
                [row["model"], way, f"{c['other_rank']:.1%}"]
                + ["none" if c["other_rank_of_100"] is None else f"{c['other_rank_of_100']:.1%}"]
                + [f"{c['first_changed']:.2%}", f"{c['rank_factor_p99']:.2f}"]
                for row in result["models"]
                for way, c in row["ways"].items()
            ],
        ),
        "",
        "BLiMP with the bundled model: the sentence with the higher total is chosen.",
        "",
        *table(
            ["scored by", "pairs", "choices that change", "accuracy, float32", "bfloat16", "ties", "right to wrong"]
            + ["wrong to right", "widest float32 margin that changed sign, nats"],
            [
                [way, f"{c['pairs']:,}", f"{1 - c['equal']:.2%}", f"{c['accuracy']:.4f}"]
                + [f"{c['accuracy_bfloat16']:.4f}", f"{c['ties_bfloat16']}", f"{c['lost']}", f"{c['won']}"]
                + [f"{c['widest']:.3f}"]
                for way, c in blimp.items()
            ],
        ),
        "",
        machine_line(result["header"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BLiMP as JSON Lines, may be gzipped")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of each paradigm, from its beginning")
    parser.add_argument("--few", type=int, default=5, help="of those, how many Hugging Face scores, too")
    parser.add_argument("--shapes", nargs="*", default=list(BASE_SHAPES), help="of mlmfast bench pll")
    parser.add_argument("--sentences", type=int, default=24, help="that a shape scores")
    parser.add_argument("--output", type=Path, required=True, help="where to write, without a suffix")
    args = parser.parse_args()
    if not 1 <= args.few <= args.pairs or args.sentences < 1:
        parser.error("--few must be between 1 and --pairs, --sentences 1 or more")
    pairs = read_pairs(args.data, args.pairs)
    if not pairs:
        parser.error(f"{args.data} holds no pairs")

    from mlmfast.bench import machine
    from mlmfast.bench.shapes import named

    header = machine.describe()
    for name in args.shapes:
        named(name)  # an unknown one is refused before the run
    pairs = by_place(pairs)
    few = len(by_place(pairs, args.few))
    texts = [pair[field] for pair in pairs for field in FIELDS]
    tiny, scored = measure("tiny", texts, 2 * few)
    blimp = {
        "mlmfast, all pairs": choose(pairs, scored["float32"], scored["bfloat16"]),
        "mlmfast": choose(pairs[:few], scored["float32"].first(2 * few), scored["bfloat16"].first(2 * few)),
        "Hugging Face": choose(pairs[:few], scored["float32"].first(2 * few), scored["hf"]),
    }
    sentences = [texts[i] for i in np.linspace(0, len(texts) - 1, args.sentences).round().astype(int)]
    models = [tiny, *(measure(name, sentences, len(sentences))[0] for name in args.shapes)]
    run = {"pairs_a_paradigm": args.pairs, "few": args.few, "sentences": args.sentences}
    result = {"header": header, "run": run, "models": models, "blimp": blimp}
    write(args.output, result, markdown(result))


if __name__ == "__main__":
    main()
