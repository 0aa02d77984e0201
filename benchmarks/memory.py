"""Peak memory: of a whole process that scores one long text, and of a batch by its token budget.

    python benchmarks/memory.py --output benchmarks/results/memory

First, a 350-word text under XLM-R-base's shape (a vocabulary of 250,002) in float32, all in: a process of its own
imports mlmfast, loads the checkpoint with ``mlmfast.load`` and scores; another does so through the drop-in for
minicons. Then requests of one and of four times the token budget under DeBERTa-v3-base's shape, each budget and length
of texts in a process of its own. Weights are random, saved as checkpoints in a temporary folder (2 GB). Linux only:
memory is read from ``/proc``. Writes ``OUTPUT.json`` and ``OUTPUT.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import machine_line, table, write

MIB = 2**20
WORDS = 350
LIMIT = 4_000_000_000  # bytes: what the process must stay below
INTERFACES = ("mlmfast", "minicons")  # mlmfast.load, and the drop-in for minicons' scorer
BUDGETS = (2048, 4096, 8192)
LENGTHS = (64, 512)
FACTORS = (1, 4)  # a request, in budgets
SAMPLE_SECONDS = 0.005


# ---- in processes of their own


def memory(process: int | str = "self") -> dict[str, int]:
    """Bytes that a process holds now (``rss``, of which ``anonymous``) and at most so far (``peak``)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    names = {"rss": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


def made_up_words(count: int, seed: int) -> list[str]:
    """Different words of two to nine letters, consonants and vowels in turn."""
    draw = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        first = draw.randrange(2)
        letters = (draw.choice("aeiou" if (i + first) % 2 else "bcdfghjklmnprstvwz") for i in range(draw.randint(2, 9)))
        words["".join(letters)] = None
    return list(words)


def save_xlm_roberta(folder: Path) -> None:
    """A checkpoint in XLM-R-base's shape, its tokenizer with 250,002 pieces: they take memory, too."""
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaTokenizer

    from mlmfast.bench.shapes import BASE, ROBERTA, ROBERTA_TOKENS, Shape

    settings = {**ROBERTA, **BASE, "vocab_size": 250002, "max_position_embeddings": 514}
    shape = Shape(XLMRobertaForMaskedLM, XLMRobertaConfig, settings, ROBERTA_TOKENS, 512, 512)
    shape.model().save_pretrained(folder)
    special = list(ROBERTA_TOKENS.values())
    # Half the pieces begin a word and half go on with one. Likelier pieces come first, as in a trained vocabulary.
    pieces = [start + word for word in made_up_words(125000, seed=0) for start in ("▁", "")]
    pieces = ["▁", *pieces][: settings["vocab_size"] - len(special)]
    scored = [(piece, -10 - 5 * i / len(pieces)) for i, piece in enumerate(pieces)]
    XLMRobertaTokenizer(vocab=[*((token, 0.0) for token in special), *scored]).save_pretrained(folder)


def save_deberta(folder: Path) -> None:
    """A checkpoint in DeBERTa-v3-base's shape; the bundled tokenizer stands beside it so that it loads."""
    from mlmfast.bench.sentences import tiny_tokenizer
    from mlmfast.bench.shapes import named

    named("deberta-v3-base").model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def text() -> str:
    """350 words, some of them two pieces for :func:`save_xlm_roberta`'s tokenizer."""
    draw = random.Random(1)
    known = made_up_words(125000, seed=0)[:20000]
    return " ".join(draw.choice(known) + (draw.choice(known) if draw.random() < 0.3 else "") for _ in range(WORDS))


def score_text(folder: Path, through: str) -> dict[str, Any]:
    """Loads the checkpoint, scores the text through an interface of :data:`INTERFACES`, and says what was held when."""
    import numpy as np

    import mlmfast
    from mlmfast.cpu import products
    from mlmfast.integrations.minicons import MaskedLMScorer

    stages = {"imports": memory()}
    start = time.perf_counter()
    if through == "minicons":
        scorer = MaskedLMScorer(str(folder), "cpu")
        lm = scorer.lm
    else:
        lm = mlmfast.load(folder, dtype="float32")
    loading = time.perf_counter() - start
    stages["load"] = memory()
    start = time.perf_counter()
    if through == "minicons":
        logprobs = scorer.sequence_score(text(), reduction=lambda x: x.numpy())[0]
    else:
        logprobs = lm.score([text()], progress=False)[0].logprobs
    seconds = time.perf_counter() - start
    stages["score"] = memory()
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in lm.model.parameters()}
    kept = [packed.weight for packed in products._packed_weights._kept.values() if packed.weight is not None]
    return {
        "stages": stages,
        "maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weights": sum(held.values()),
        "packed": sum(weight.numel() * weight.dtype.itemsize for weight in kept),
        "packed_copies": len(kept),
        "words": len(text().split()),
        "tokens": len(logprobs),
        "total": float(logprobs.sum(dtype=np.float64)),
        "finite": bool(np.isfinite(logprobs).all()),
        "batch_tokens": lm.batch_tokens,
        "load_seconds": loading,
        "score_seconds": seconds,
    }


def score_batches(folder: Path, budget: int, length: int) -> list[dict[str, Any]]:
    """Peak memory of requests beyond what was held before them, packed weights included in that."""
    import ctypes

    import mlmfast
    from mlmfast.bench.shapes import named
    from mlmfast.masking import make_plan
    from mlmfast.packing import pack

    shape = named("deberta-v3-base")
    lm = mlmfast.load(folder, dtype="float32", batch_tokens=budget)
    mask = list(shape.special).index("mask_token")
    found = []
    for factor in (0, *FACTORS):  # 0: a first batch that packs the weights, not counted
        plan = make_plan(shape.texts(length, max(1, factor) * budget // length), mask)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory()
        start = time.perf_counter()
        lm.logprobs(plan)
        seconds = time.perf_counter() - start
        if factor:
            found.append(
                {"budget": budget, "length": length, "rows": plan.tokens, "batches": len(pack(plan, budget))}
                | {"held": before["rss"], "peak": memory()["peak"] - before["rss"], "seconds": seconds}
            )
    return found


def describe() -> dict[str, Any]:
    from mlmfast.bench import machine

    return machine.describe()


# ---- in the process that starts them, which stays small: a child's ru_maxrss begins with its parent's


def child(*arguments: str) -> tuple[Any, dict[str, int]]:
    """Runs a function above in a new interpreter; what it returned, and the highest of samples of its memory."""
    command = [sys.executable, __file__, "--child", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    highest = {"rss": 0, "anonymous": 0}

    def watch() -> None:
        nonlocal highest
        while process.poll() is None:
            try:
                now = memory(process.pid)
            except (OSError, KeyError):  # it has ended
                return
            if now["rss"] > highest["rss"]:
                highest = {name: now[name] for name in highest}
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}")
    return json.loads(output.splitlines()[-1]), highest


def split(found: dict[str, Any]) -> dict[str, int]:
    """Where a process's highest resident memory goes, in bytes: the parts add up to it."""
    peak = max(found["maxrss"], *(stage["peak"] for stage in found["stages"].values()))
    held = {name: stage["rss"] for name, stage in found["stages"].items()}
    parts = {
        "imports": held["imports"],
        "weights": found["weights"],
        "tokenizer, and what loading leaves": held["load"] - held["imports"] - found["weights"],
        "packed copies": found["packed"],
    }
    return parts | {"the pass itself": peak - sum(parts.values()), "peak": peak}


def markdown(result: dict[str, Any]) -> list[str]:
    one, scorer, header = result["text"], result["minicons"], result["header"]
    drop_in = scorer["split"]["peak"]
    stages, parts = one["stages"], one["split"]
    return [
        "# Peak memory",
        "",
        f"## One text of {one['words']} words, XLM-R-base's shape, float32",
        "",
        f"{one['tokens']} tokens scored, so {one['tokens']} masked copies, {one['batch_tokens']} rows a batch; a "
        f"vocabulary of 250,002. Peak resident memory of the process, everything included: "
        f"**{parts['peak'] / 1e9:.2f} GB** (ru_maxrss {one['maxrss'] / 1e9:.2f}, "
        f"highest sample {one['sampled']['rss'] / 1e9:.2f}, of which "
        f"{one['sampled']['anonymous'] / 1e9:.2f} not backed by files), "
        f"{'below' if parts['peak'] < LIMIT else '**above**'} {LIMIT / 1e9:.0f} GB.",
        "",
        *table(["at the peak", "GB"], [[name, f"{size / 1e9:.2f}"] for name, size in parts.items()]),
        "",
        *table(
            ["after", "held, GB", "most so far, GB"],
            [[name, f"{at['rss'] / 1e9:.2f}", f"{at['peak'] / 1e9:.2f}"] for name, at in stages.items()],
        ),
        "",
        "Through `mlmfast.integrations.minicons.MaskedLMScorer`, the drop-in for minicons' scorer, the process peaks "
        f"at **{drop_in / 1e9:.2f} GB**, {'below' if drop_in < LIMIT else '**above**'} {LIMIT / 1e9:.0f} GB; the "
        f"text's total is {scorer['total']:.3f} there and {one['total']:.3f} here.",
        "",
        "## A batch by its token budget, DeBERTa-v3-base's shape, float32",
        "",
        "Memory beyond what was held before the request (imports, weights, packed copies). A request of four times the "
        "budget is four batches or more.",
        "",
        *table(
            ["batch_tokens", "tokens a text", "rows of the request", "batches", "peak, MiB", "kB a row of the budget"],
            [
                [f"{b['budget']}", f"{b['length']}", f"{b['rows']:,}", f"{b['batches']}", f"{b['peak'] / MIB:.0f}"]
                + [f"{b['peak'] / 1e3 / b['budget']:.0f}"]
                for b in result["batches"]
            ],
        ),
        "",
        machine_line(header),
    ]


def run_child(arguments: Sequence[str]) -> Any:
    name, *rest = arguments
    if name == "batches":
        return score_batches(Path(rest[0]), int(rest[1]), int(rest[2]))
    if name == "machine":
        return describe()
    if name == "text":
        return score_text(Path(rest[0]), rest[1])
    return {"save-xlm": save_xlm_roberta, "save-deberta": save_deberta}[name](Path(rest[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="batch_tokens to measure")
    parser.add_argument("--output", type=Path, help="where to write, without a suffix")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(args.child)))
        return
    if args.output is None:
        parser.error("--output is missing")
    if min(args.budgets) < max(LENGTHS):
        parser.error(f"--budgets must be {max(LENGTHS)} or more: a text has up to as many tokens")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        parser.error("this needs Linux: memory is read from /proc")
    header, _ = child("machine")
    with tempfile.TemporaryDirectory() as folder:
        xlm, deberta = Path(folder) / "xlm", Path(folder) / "deberta"
        child("save-xlm", str(xlm))
        texts = {}
        for through in INTERFACES:
            found, sampled = child("text", str(xlm), through)
            texts[through] = found | {"sampled": sampled, "split": split(found)}
        child("save-deberta", str(deberta))
        batches = [
            row
            for budget in args.budgets
            for length in LENGTHS
            for row in child("batches", str(deberta), str(budget), str(length))[0]
        ]
    result = {"header": header, "limit": LIMIT, "text": texts["mlmfast"], "minicons": texts["minicons"]}
    result["batches"] = batches
    write(args.output, result, markdown(result))
    if any(not one["finite"] or one["split"]["peak"] >= LIMIT for one in texts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
