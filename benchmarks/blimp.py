"""BLiMP through ``mlmfast score``: accuracy by paradigm, rows a second, and the copies that are not computed twice.

    python benchmarks/blimp.py --data blimp.jsonl.gz --model tiny --pairs 100 --output benchmarks/results/blimp_tiny

BLiMP (Warstadt et al. 2020, arXiv 1912.00582) has 1000 minimal pairs in each of its paradigms: JSON Lines with ``UID``,
``field``, ``sentence_good`` and ``sentence_bad``. A pair is right if the good sentence has the higher PLL; a tie, or a
sentence that cannot be scored, counts as wrong. Writes ``OUTPUT.json`` and ``OUTPUT.md``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIELDS = ("sentence_good", "sentence_bad")
METRICS_COUNTED = ("original", "within_word_l2r", "window", "global_l2r")

# Four-option questions: a prompt, options of one common word, and options of several.
QUESTIONS: list[tuple[str, list[str], list[str]]] = [
    ("The sky on a clear day is", [" blue", " green", " red", " black"],
     [" as blue as the sea", " as green as the grass", " as red as a rose", " as black as the night"]),
    ("She put the kettle on to make some", [" tea", " bread", " music", " money"],
     [" tea for her guests", " bread for the birds", " music for the dance", " money for the rent"]),
    ("In winter the water in the pond turned to", [" ice", " fire", " gold", " wood"],
     [" a sheet of ice", " a ball of fire", " a bar of gold", " a piece of wood"]),
    ("He opened the door with his", [" key", " book", " shirt", " dog"],
     [" new brass key", " old school book", " best white shirt", " small brown dog"]),
    ("The cat was chasing a", [" mouse", " house", " river", " song"],
     [" mouse across the kitchen", " house beside the church", " river under the bridge", " song from the radio"]),
    ("The capital of France is", [" Paris", " London", " Rome", " Berlin"],
     [" the city of Paris", " the city of London", " the city of Rome", " the city of Berlin"]),
    ("A week has", [" seven", " three", " ten", " two"],
     [" seven days in it", " three days in it", " ten days in it", " two days in it"]),
    ("To see in the dark they lit a", [" candle", " stone", " spoon", " hat"],
     [" candle on the table", " stone on the road", " spoon on the plate", " hat on the chair"]),
    ("The farmer milked the", [" cow", " tree", " wall", " cart"],
     [" cow before sunrise", " tree after lunch", " wall in the yard", " cart without wheels"]),
    ("After the rain the streets were", [" wet", " dry", " loud", " sweet"],
     [" wet and shining", " dry and dusty", " loud and busy", " sweet and sticky"]),
    ("The baby began to", [" cry", " drive", " vote", " write"],
     [" cry for its mother", " drive to the office", " vote in the election", " write a long letter"]),
    ("You can borrow books from the", [" library", " bakery", " garden", " river"],
     [" library in the town", " bakery in the town", " garden in the town", " river in the town"]),
    ("The sun rises in the", [" east", " west", " north", " south"],
     [" east every morning", " west every morning", " north every morning", " south every morning"]),
    ("The bird built a nest in the", [" tree", " sea", " moon", " oven"],
     [" tall old tree", " deep blue sea", " bright full moon", " hot black oven"]),
    ("He was so tired that he fell", [" asleep", " open", " young", " rich"],
     [" asleep at once", " open at the page", " young at heart", " rich beyond measure"]),
    ("The opposite of hot is", [" cold", " warm", " long", " kind"],
     [" very cold indeed", " very warm indeed", " very long indeed", " very kind indeed"]),
    ("They crossed the river over the", [" bridge", " table", " letter", " window"],
     [" bridge that she had built", " table that she had built", " letter that she had sent", " window that she shut"]),
    ("The doctor worked in a", [" hospital", " bottle", " pocket", " shoe"],
     [" hospital near the harbour", " bottle near the harbour", " pocket near the harbour", " shoe near the harbour"]),
    ("A spider has eight", [" legs", " wings", " doors", " years"],
     [" legs and no wings", " wings and no legs", " doors and no roof", " years and no rest"]),
    ("Bread is made from", [" flour", " glass", " paper", " sand"],
     [" flour and water", " glass and water", " paper and water", " sand and water"]),
]  # fmt: skip


def read_pairs(path: Path, pairs: int | None) -> list[dict[str, str]]:
    """The first ``pairs`` pairs of each paradigm (None: all), in file order."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    taken: dict[str, int] = {}
    kept = []
    with opened as lines:
        for line in lines:
            pair = json.loads(line)
            taken[pair["UID"]] = taken.get(pair["UID"], 0) + 1
            if pairs is None or taken[pair["UID"]] <= pairs:
                kept.append(pair)
    return kept


def run_cli(arguments: Sequence[str]) -> int:
    """The command line in a process of its own; its exit status."""
    program = [sys.executable, "-c", "from mlmfast.cli import main; main()"]
    return subprocess.run([*program, *arguments], check=False).returncode


def score(source: Path, field: str, output: Path, options: Sequence[str]) -> tuple[list[float | None], float]:
    """Runs ``mlmfast score``; its PLLs (None: an error) and its seconds, imports and loading included."""
    start = time.perf_counter()
    status = run_cli(["score", str(source), "--field", field, "--output", str(output), *options])
    seconds = time.perf_counter() - start
    if status not in (0, 1):  # 1: some rows have an error
        raise SystemExit(f"mlmfast score ended with status {status}")
    with output.open(encoding="utf-8") as lines:
        return [json.loads(line).get("pll") for line in lines], seconds


def judge(pairs: Sequence[dict[str, str]], good: Sequence[float | None], bad: Sequence[float | None]) -> dict[str, Any]:
    """Accuracy of each paradigm and over fields, and their mean over paradigms; ties and errors counted as wrong."""
    if not len(pairs) == len(good) == len(bad):
        raise ValueError(f"{len(pairs)} pairs, but {len(good)} and {len(bad)} scores")
    paradigms: dict[str, dict[str, Any]] = {}
    for pair, better, worse in zip(pairs, good, bad):
        tally = paradigms.setdefault(
            pair["UID"], {"field": pair.get("field", ""), "pairs": 0, "right": 0, "ties": 0, "errors": 0}
        )
        tally["pairs"] += 1
        if better is None or worse is None:
            tally["errors"] += 1
        else:
            tally["right"] += better > worse
            tally["ties"] += better == worse
    for tally in paradigms.values():
        tally["accuracy"] = tally["right"] / tally["pairs"]
    by_field: dict[str, list[float]] = {}
    for tally in paradigms.values():
        by_field.setdefault(tally["field"], []).append(tally["accuracy"])
    return {
        "mean": sum(t["accuracy"] for t in paradigms.values()) / len(paradigms),
        "fields": {field: sum(values) / len(values) for field, values in sorted(by_field.items())},
        "pairs": len(pairs),
        "ties": sum(t["ties"] for t in paradigms.values()),
        "errors": sum(t["errors"] for t in paradigms.values()),
        "paradigms": dict(sorted(paradigms.items())),
    }


def count_copies(lm: Any, pairs: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Copies asked for and left after dropping identical ones: BLiMP pair by pair, and the questions one by one."""
    from mlmfast.bench.copies import savings

    rows = []
    for metric in METRICS_COUNTED:
        kinds: dict[str, list[Any]] = {
            "BLiMP pairs": [lm.plan([pair[field] for field in FIELDS], metric=metric) for pair in pairs]
        }
        single, longer = "four options of one token", "four longer options"
        kinds[single], kinds[longer] = [], []
        for prompt, words, phrases in QUESTIONS:
            for options in (words, phrases):
                spans = [(len(prompt), len(prompt) + len(option)) for option in options]
                plan = lm.plan([prompt + option for option in options], metric=metric, spans=spans)
                # What is one word to us may be several pieces to this tokenizer.
                kinds[single if len(plan.targets) == len(options) else longer].append(plan)
        for kind, plans in kinds.items():
            saved = savings(plans)
            rows.append(
                {"requests": kind, "metric": metric, "count": saved.requests, "requested": saved.requested}
                | {"unique": saved.unique, "saved": saved.share}
            )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The result as a page of tables."""
    header, run, blimp = result["header"], result["run"], result["blimp"]
    lines = [
        f"# BLiMP, model `{run['model']}`, metric `{run['metric']}`",
        "",
        f"Mean accuracy over {len(blimp['paradigms'])} paradigms: **{blimp['mean']:.4f}** "
        f"({blimp['pairs']:,} pairs; {blimp['ties']} ties and {blimp['errors']} errors counted as wrong). "
        f"{run['rows']:,} sentences in {run['seconds']:.1f} s, {run['rows_per_second']:.1f} a second, "
        "two processes one after the other, each with its imports and the loading of the model.",
        "",
        f"{header['cpu']}, {header['threads']} threads; Python {header['python']}, torch {header['torch']}, "
        f"transformers {header['transformers']}, mlmfast {header['mlmfast']}, commit {header['commit']}, "
        f"{header['time']}.",
        "",
        "| field | mean accuracy of its paradigms |",
        "|---|---:|",
        *(f"| {field or '-'} | {value:.3f} |" for field, value in blimp["fields"].items()),
        "",
        "| paradigm | accuracy | pairs | ties | errors |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {t['accuracy']:.3f} | {t['pairs']} | {t['ties']} | {t['errors']} |"
            for name, t in blimp["paradigms"].items()
        ),
        "",
        "## Identical copies",
        "",
        "A pair's two sentences, or a question's four options, are planned together; no copy is shared beyond that.",
        "",
        *copies_table(result["copies"]),
    ]
    return "\n".join(lines) + "\n"


def copies_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of :func:`count_copies`."""
    return [
        "| requests | number | metric | copies requested | computed | saved |",
        "|---|---:|---|---:|---:|---:|",
        *(
            f"| {r['requests']} | {r['count']:,} | {r['metric']} | {r['requested']:,} | {r['unique']:,} "
            f"| {r['saved']:.1%} |"
            for r in rows
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BLiMP as JSON Lines, may be gzipped")
    parser.add_argument("--model", default="tiny", help="as for mlmfast score")
    parser.add_argument("--pairs", type=int, help="pairs of each paradigm, from its beginning; all unless given")
    parser.add_argument("--metric", default="original", help="as for mlmfast score")
    parser.add_argument("--dtype", default="auto", help="as for mlmfast score")
    parser.add_argument("--output", type=Path, required=True, help="where to write, without a suffix")
    args = parser.parse_args()
    if args.pairs is not None and args.pairs < 1:
        parser.error("--pairs must be 1 or more")
    # What can be wrong is found before the run.
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pairs = read_pairs(args.data, args.pairs)
    if not pairs:
        parser.error(f"{args.data} holds no pairs")

    import mlmfast
    from mlmfast.bench import machine

    header = machine.describe()
    options = ["--model", args.model, "--metric", args.metric, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.jsonl"
        source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        scored = [score(source, field, Path(folder) / f"{field}.jsonl", options) for field in FIELDS]
    (good, good_seconds), (bad, bad_seconds) = scored
    rows, seconds = len(good) + len(bad), good_seconds + bad_seconds
    result: dict[str, Any] = {
        "header": header,
        "run": {
            "model": args.model if args.model == "tiny" else Path(args.model).name,
            "metric": args.metric,
            "dtype": args.dtype,
            "pairs_a_paradigm": args.pairs,
            "rows": rows,
            "seconds": seconds,
            "rows_per_second": rows / seconds,
        },
        "blimp": judge(pairs, good, bad),
        "copies": count_copies(mlmfast.load(args.model), pairs),
    }
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", markdown(result))):
        path = args.output.with_name(args.output.name + suffix)
        path.write_text(text, encoding="utf-8")
        print(path)
    blimp = result["blimp"]
    print(f"mean accuracy {blimp['mean']:.4f}, {blimp['ties']} ties, {rows / seconds:.1f} rows a second")
    print("\n".join(copies_table(result["copies"])))


if __name__ == "__main__":
    main()
