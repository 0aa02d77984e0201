"""The approximate metric ``strided`` against the exact ``original``: how fast, how wrong, which choices change, by K.

    python benchmarks/strided.py --data blimp.jsonl.gz --running texts.jsonl.gz --field premise \\
        --output benchmarks/results/strided_tiny

``--data`` is BLiMP as :mod:`blimp` reads it, ``--running`` a file with longer texts, which the model should not have
been trained on. ``--parts timing`` measures the speeds alone (a few minutes on a machine with nothing else to do) and
keeps the agreement that ``OUTPUT.json`` holds, and the other way round. Writes ``OUTPUT.json`` and ``OUTPUT.md``.

K copies of a text with at most K tokens are the exact metric. Wherever that is so the two must be equal, to 1e-4 times
max(1, |log-probability|) a token, or there is no result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from agreement import choices, errors, pearson, spearman
from blimp import FIELDS, judge, read_pairs
from record import beside, machine_line, table, write

STRIDES = (4, 8, 16, 32)
# Texts are grouped by their number of tokens, these bounds included: BLiMP's, and running texts.
SHORT = ((1, 8), (9, 16), (17, 32))
RUNNING = ((33, 63), (64, 127), (128, 255))
BOUND = 1e-4
PARTS = ("agreement", "timing")


def band(tokens: int, bands: Sequence[tuple[int, int]]) -> str | None:
    """The group that a text of so many tokens belongs to."""
    return next((f"{low}-{high}" for low, high in bands if low <= tokens <= high), None)


def grouped(lm: Any, texts: Sequence[str], bands: Sequence[tuple[int, int]], most: int) -> dict[str, list[str]]:
    """Different texts by their number of tokens, at most so many of each group, spread evenly over those there are."""
    groups: dict[str, list[str]] = {f"{low}-{high}": [] for low, high in bands}
    texts = list(dict.fromkeys(texts))
    for text, ids in zip(texts, lm.tokenizer(texts, add_special_tokens=False)["input_ids"]):
        name = band(len(ids), bands)
        if name is not None:
            groups[name].append(text)
    return {name: spread(found, most) for name, found in groups.items() if found}


def spread(texts: Sequence[str], most: int) -> list[str]:
    """At most so many of some texts, spread evenly over them."""
    return [texts[i] for i in np.linspace(0, len(texts) - 1, min(most, len(texts))).round().astype(int)]


def check_exact(exact: Sequence[Any], strided: Sequence[Any], stride: int) -> None:
    """Texts of at most ``stride`` tokens must have their exact scores.

    Raises:
        SystemExit: one has not.
    """
    for right, found in zip(exact, strided):
        off = np.abs(found.logprobs - right.logprobs) / np.maximum(1, np.abs(right.logprobs))
        if len(right) <= stride and not off.max(initial=0) <= BOUND:
            raise SystemExit(
                f"{right.text!r} has {len(right)} tokens, but strided at K = {stride} is off by {off.max()}"
            )


def compare(exact: Sequence[Any], strided: Sequence[Any], stride: int) -> dict[str, Any]:
    """Agreement of some texts' scores, tokens and totals.

    ``approximated`` are the errors in texts of more than K tokens alone, None where there are none.
    """
    right, found = (np.concatenate([score.logprobs for score in scores]) for scores in (exact, strided))
    longer = np.concatenate([np.full(len(score), len(score) > stride) for score in exact])
    return {
        "stride": stride,
        "texts": len(exact),
        "tokens": len(right),
        "exact_share": float(np.mean([len(score) <= stride for score in exact])),
        "errors": errors(found, right),
        "approximated": errors(found[longer], right[longer]) if longer.any() else None,
        "pearson": pearson(found, right),
        "spearman": spearman(found, right),
        "spearman_totals": spearman([s.total for s in strided], [s.total for s in exact]),
        "spearman_means": spearman([s.mean for s in strided], [s.mean for s in exact]),
    }


def measure_agreement(
    lm: Any, pairs: Sequence[dict[str, str]], running: dict[str, list[str]], strides: Sequence[int]
) -> dict[str, Any]:
    """BLiMP's choices and every group's errors."""
    sentences = [pair[field] for field in FIELDS for pair in pairs]
    texts = sentences + [text for group in running.values() for text in group]
    exact = lm.score(texts, progress=False)
    places: dict[str, list[int]] = {f"{low}-{high}": [] for low, high in SHORT}
    for i in range(len(sentences)):
        name = band(len(exact[i]), SHORT)
        if name is not None:
            places[name].append(i)
    groups = {"BLiMP": list(range(len(sentences)))} | {f"BLiMP {name}": members for name, members in places.items()}
    start = len(sentences)
    for name, group in running.items():
        groups[f"running {name}"] = list(range(start, start + len(group)))
        start += len(group)
    rows: list[dict[str, Any]] = []
    blimp = []
    right = totals(exact, len(pairs))
    judged = judge(pairs, right[0].tolist(), right[1].tolist())
    for stride in strides:
        strided = lm.score(texts, metric="strided", stride=stride, progress=False)
        check_exact(exact, strided, stride)
        for name, members in groups.items():
            if members:
                rows.append(
                    {"group": name} | compare([exact[i] for i in members], [strided[i] for i in members], stride)
                )
        found = totals(strided, len(pairs))
        longest = np.array([max(len(exact[i]), len(exact[i + len(pairs)])) for i in range(len(pairs))])
        blimp.append(
            {"stride": stride, "accuracy": judge(pairs, found[0].tolist(), found[1].tolist())["mean"]}
            | {"all": choices(right, found), "approximated": choices(right, found, longest > stride)}
        )
    rows.sort(key=lambda row: list(groups).index(row["group"]))  # a reader knows the texts, and looks for K
    return {"groups": rows, "blimp": {"accuracy": judged["mean"], "paradigms": len(judged["paradigms"]), "by": blimp}}


def totals(scores: Sequence[Any], pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """PLLs of the good sentences and of the bad ones, which stand after them."""
    found = np.array([score.total for score in scores[: 2 * pairs]])
    return found[:pairs], found[pairs:]


def measure_timing(lm: Any, groups: dict[str, list[str]], strides: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Whole passes, text to scores, exact and strided in turn; ratios of medians, and quartiles of single rounds'."""
    from mlmfast.bench.timing import interleaved, summary

    rows = []
    for name, texts in groups.items():
        exact = lm.score(texts, progress=False)
        for stride in strides:
            check_exact(exact, lm.score(texts, metric="strided", stride=stride, progress=False), stride)
        sides = [partial(lm.score, texts, progress=False)]
        sides += [partial(lm.score, texts, metric="strided", stride=k, progress=False) for k in strides]
        times = interleaved(sides, rounds)
        asked = lm.plan(texts).tokens
        for stride, seconds in zip(strides, times[1:]):
            ratios = summary([a / b for a, b in zip(times[0], seconds)])
            rows.append(
                {"group": name, "stride": stride, "texts": len(texts), "tokens": sum(map(len, exact))}
                | {"ratio": float(np.median(times[0]) / np.median(seconds)), "ratios": ratios}
                | {"rows_ratio": asked / lm.plan(texts, metric="strided", stride=stride).tokens}
                | {"exact_seconds": summary(times[0]), "seconds": summary(seconds)}
            )
    return rows


def markdown(result: dict[str, Any]) -> list[str]:
    run = result["run"]
    lines = [
        f"# `strided` at K copies a text against exact scores, model `{run['model']}`",
        "",
        "K copies of a text with at most K tokens *are* the exact metric; errors and correlations count those texts "
        "in, but for the column that leaves them out. In nats a token, approximate minus exact; totals and means are "
        "those of texts.",
        "",
    ]
    if "agreement" in result:
        lines += agreement_tables(result["agreement"])
    if "timing" in result:
        lines += timing_table(result["timing"])
    return lines


def agreement_tables(found: dict[str, Any]) -> list[str]:
    blimp = found["blimp"]
    return [
        "## Agreement",
        "",
        *table(
            ["texts", "K", "texts exact", "bias", "mean error", "without exact texts", "99th percentile", "largest"]
            + ["correlation", "rank correlation", "of totals", "of means"],
            [
                [f"{r['group']} ({r['texts']:,})", f"{r['stride']}", f"{r['exact_share']:.1%}"]
                + [f"{r['errors']['bias']:+.3f}", f"{r['errors']['mean']:.3f}"]
                + [f"{r['approximated']['mean']:.3f}" if r["approximated"] else "-"]
                + [f"{r['errors']['p99']:.2f}", f"{r['errors']['max']:.2f}"]
                + [correlation(r[name]) for name in ("pearson", "spearman", "spearman_totals", "spearman_means")]
                for r in found["groups"]
            ],
        ),
        "",
        f"BLiMP, {blimp['by'][0]['all']['pairs']:,} pairs of {blimp['paradigms']} paradigms; the sentence with the "
        f"higher total is chosen. Exact accuracy {blimp['accuracy']:.4f}.",
        "",
        *table(
            ["K", "pairs with a text of more than K tokens", "equal choices", "among those pairs", "accuracy"]
            + ["right to wrong", "wrong to right", "widest exact margin that changed sign, nats"],
            [
                [f"{b['stride']}", f"{b['approximated']['pairs'] / b['all']['pairs']:.1%}", f"{b['all']['equal']:.2%}"]
                + ["-" if b["approximated"]["equal"] is None else f"{b['approximated']['equal']:.2%}"]
                + [f"{b['accuracy']:.4f}", f"{b['all']['lost']}", f"{b['all']['won']}", f"{b['all']['widest']:.2f}"]
                for b in blimp["by"]
            ],
        ),
        "",
        machine_line(found["header"]),
        "",
    ]


def correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def timing_table(found: dict[str, Any]) -> list[str]:
    return [
        "## Speed",
        "",
        f"Exact over strided, medians of {found['rounds']} interleaved rounds, text to scores; beside it the middle "
        "half of single rounds.",
        "",
        *table(
            ["texts", "K", "faster", "rounds", "fewer rows", "exact, s", "strided, s"],
            [
                [f"{r['group']} ({r['texts']})", f"{r['stride']}", f"{r['ratio']:.1f}x"]
                + [f"{r['ratios']['q1']:.1f}-{r['ratios']['q3']:.1f}", f"{r['rows_ratio']:.1f}x"]
                + [f"{r['exact_seconds']['median']:.2f}", f"{r['seconds']['median']:.2f}"]
                for r in found["rows"]
            ],
        ),
        "",
        machine_line(found["header"]),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BLiMP as JSON Lines, may be gzipped")
    parser.add_argument("--running", help="longer texts, as mlmfast score reads them")
    parser.add_argument("--field", default="text", help="of --running")
    parser.add_argument("--model", default="tiny", help="as for mlmfast score")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of each paradigm, from its beginning")
    parser.add_argument("--most", type=int, default=100, help="texts of each group of running ones")
    parser.add_argument(
        "--timed", type=int, default=12, help="texts of each timed group; twenty times as many of BLiMP's"
    )
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of timing")
    parser.add_argument("--strides", type=int, nargs="+", default=list(STRIDES), help="each K")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--output", type=Path, required=True, help="where to write, without a suffix")
    args = parser.parse_args()
    if min(args.pairs, args.most, args.timed, args.rounds, *args.strides) < 1:
        parser.error("--pairs, --most, --timed, --rounds and --strides must be 1 or more")
    pairs = read_pairs(args.data, args.pairs)
    if not pairs:
        parser.error(f"{args.data} holds no pairs")

    import mlmfast
    from mlmfast.bench import machine
    from mlmfast.bench.sentences import read_sentences

    header = machine.describe()
    lm = mlmfast.load(args.model, dtype="float32")
    longer = read_sentences(args.running, field=args.field) if args.running else []
    run = {"model": args.model if args.model == "tiny" else Path(args.model).name, "pairs_a_paradigm": args.pairs}
    result: dict[str, Any] = {"run": run}
    before = beside(args.output, ".json")
    if before.is_file():
        kept = json.loads(before.read_text(encoding="utf-8"))
        if kept["run"] == run:
            result |= {part: kept[part] for part in PARTS if part in kept}
    if "agreement" in args.parts:
        running = grouped(lm, longer, RUNNING, args.most)
        result["agreement"] = {"header": header} | measure_agreement(lm, pairs, running, args.strides)
    if "timing" in args.parts:
        timed = {"BLiMP": spread([pair["sentence_good"] for pair in pairs], 20 * args.timed)}
        timed |= {f"running {name}": texts for name, texts in grouped(lm, longer, RUNNING, args.timed).items()}
        rows = measure_timing(lm, timed, args.strides, args.rounds)
        result["timing"] = {"header": header, "rounds": args.rounds, "rows": rows}
    write(args.output, result, markdown(result))


if __name__ == "__main__":
    main()
