"""lm-evaluation-harness with the model ``mlmfast`` on BLiMP and RTE from local files: its results, and its speed.

    python benchmarks/harness.py --blimp blimp.jsonl.gz --rte rte_dev.jsonl.gz --pairs 100 \
        --output benchmarks/results/lm_eval_tiny

Tasks are written for both files and run by ``python -m mlmfast.lm_eval``; the accuracies must be those of
``MaskedLM.score`` and ``MaskedLM.rank`` on the same texts. Then the same requests go to two sides in turn: the model
``mlmfast``, and a minimal model of lm_eval's that loops over the Hugging Face model one mask at a time, or that asks
minicons as BabyLM's ``hf-mlm`` of 2024 did. No speed is printed where two sides disagree. ``--tasks FOLDER`` writes the
tasks there and ends, for runs of your own: ``--include_path FOLDER --tasks own_blimp,own_rte``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blimp import judge, read_pairs
from prefix import Question, questions
from record import machine_line, table, write

from mlmfast.bench.timing import interleaved, summary

ROUNDS = 5
UNCONDITIONAL = "answer:"
BOUND = 1e-4  # times max(1, |value|)


def write_tasks(folder: Path, pairs: Sequence[dict[str, str]], rows: Sequence[dict[str, str]]) -> None:
    """The group ``own_blimp``, a task a paradigm, and the task ``own_rte``, with their data beside them."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for pair in pairs:
        kinds.setdefault(pair["UID"], []).append(pair)
    for name, own in kinds.items():
        settings: dict[str, Any] = {
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        }
        _write_task(folder, f"own_blimp_{name}", own, settings)
    group: dict[str, Any] = {"group": "own_blimp", "task": [f"own_blimp_{name}" for name in kinds]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": False}]
    (folder / "own_blimp.yaml").write_text(json.dumps(group), encoding="utf-8")  # JSON is YAML, too
    asked = [{"prompt": prompt, "label": row["label"]} for row, (prompt, _) in zip(rows, questions(rows, "judge"))]
    settings = {"doc_to_text": "{{prompt}}", "doc_to_target": "label", "doc_to_choice": ["True", "False"]}
    _write_task(folder, "own_rte", asked, settings)


def _write_task(folder: Path, name: str, rows: Sequence[dict[str, str]], settings: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")


def run_cli(folder: Path, tasks: str, model_args: dict[str, str]) -> tuple[dict[str, float], float]:
    """lm_eval's command line on tasks of a folder: accuracies by task or group, and its seconds."""
    output = folder / "out"
    command = [sys.executable, "-m", "mlmfast.lm_eval", "run", "--model", "mlmfast", "--tasks", tasks]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())]
    command += ["--include_path", str(folder), "--output_path", str(output), "--batch_size", "auto"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    newest = max(output.rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    written = json.loads(newest.read_text(encoding="utf-8"))
    found = written["results"] | written.get("groups", {})
    return {name: values["acc,none"] for name, values in found.items() if "acc,none" in values}, seconds


def ranked(lm: Any, asked: Sequence[Question], rows: Sequence[dict[str, str]], **settings: Any) -> float:
    """The accuracy of ``MaskedLM.rank`` on the same questions."""
    best = [lm.rank(prompt, options, progress=False, **settings).best.strip() for prompt, options in asked]
    return float(np.mean([one == row["label"] for one, row in zip(best, rows)]))


def looping(lm: Any) -> Callable[[Sequence[Any]], list[float]]:
    """A minimal model of lm_eval's: Hugging Face's model, one mask at a time."""
    model, tokenizer = lm.model, lm.tokenizer

    @torch.inference_mode()
    def value(context: str, continuation: str) -> float:
        text = context + (continuation if context else continuation.lstrip())
        encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids = torch.tensor([encoding["input_ids"]])
        total = 0.0
        for place, (offset, special) in enumerate(zip(encoding["offset_mapping"], encoding["special_tokens_mask"])):
            if not special and (offset[1] > len(context) or not context):
                masked = ids.clone()
                masked[0, place] = tokenizer.mask_token_id
                row = model(input_ids=masked, attention_mask=torch.ones_like(masked)).logits[0, place]
                total += float(row.log_softmax(0)[ids[0, place]])
        return total

    return lambda requests: [value(*request.args) for request in requests]


def asking_minicons(lm: Any) -> Callable[[Sequence[Any]], list[float]]:
    """As ``hf-mlm`` asks: a request a batch, since it groups them by their continuations."""
    from mlmfast.bench.peers.minicons import repaired_scorer

    scorer = repaired_scorer(lm.model, lm.tokenizer)

    def values(requests: Sequence[Any]) -> list[float]:
        pairs = [(context or f"{lm.tokenizer.eos_token}", new) for context, new in (one.args for one in requests)]
        return [scorer.conditional_score([context], [continuation])[0] for context, continuation in pairs]

    return values


def beside(model: str, requests: Sequence[Any], compatible: str | None) -> dict[str, Any]:
    """Seconds of both sides for the same requests, after a look at whether they agree."""
    from mlmfast.integrations.lm_eval import MLMFastLM

    ours = MLMFastLM(model, compatible=compatible)
    theirs = (looping if compatible is None else asking_minicons)(ours.lm)
    first = [value for value, _ in ours.loglikelihood(requests, disable_tqdm=True)], theirs(requests)
    mine, peer = (np.array(values) for values in first)
    error = float((np.abs(mine - peer) / np.maximum(1, np.abs(peer))).max())
    found: dict[str, Any] = {"requests": len(requests), "error": error, "agrees": error <= BOUND}
    if found["agrees"]:
        sides = [lambda: ours.loglikelihood(requests, disable_tqdm=True), lambda: theirs(requests)]
        times = interleaved(sides, ROUNDS)
        found |= {"seconds": [summary(one) for one in times]}
        found["ratio"] = found["seconds"][1]["median"] / found["seconds"][0]["median"]
    return found


def page(result: dict[str, Any]) -> list[str]:
    """The result for readers."""
    runs = [
        [one["name"], str(one["questions"]), f"{one['lm_eval']:.4f}", f"{one['direct']:.4f}", f"{one['seconds']:.1f}"]
        for one in result["runs"]
    ]
    speeds = []
    for one in result["speeds"]:
        cells = [one["name"], str(one["requests"]), f"{one['error']:.1e}"]
        if one["agrees"]:
            cells += [f"{side['median']:.2f}" for side in one["seconds"]] + [f"{one['ratio']:.1f}x"]
        speeds.append(cells + ["disagrees"] * (6 - len(cells)))
    return [
        f"# lm-evaluation-harness {result['lm_eval']}, model `{result['model']}`",
        "",
        f"`python -m mlmfast.lm_eval` on local files ({result['data']}), from its start to the written results, beside "
        "`MaskedLM.score` and `MaskedLM.rank` on the same texts. A paradigm's accuracy is the same in all "
        f"{result['paradigms']}.",
        "",
        *table(["run", "questions", "accuracy", "without lm_eval", "seconds"], runs),
        "",
        "The same `loglikelihood` requests to two models of lm_eval's, medians of "
        f"{ROUNDS} rounds in turn; the error is the largest difference of two values over max(1, |value|).",
        "",
        *table(["requests, against", "number", "error", "seconds, mlmfast", "seconds, other", "ratio"], speeds),
        "",
        machine_line(result["machine"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blimp", type=Path, required=True, help="JSON Lines: UID, sentence_good, sentence_bad")
    parser.add_argument("--rte", required=True, help="JSON Lines: premise, hypothesis, label (True or False)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, help="pairs of each paradigm, from its beginning; all unless given")
    parser.add_argument("--timed", type=int, default=120, help="requests of each kind that are timed")
    parser.add_argument("--tasks", type=Path, help="write the tasks to this folder, and end")
    parser.add_argument("--output", type=Path, help="without suffix")
    given = parser.parse_args()
    if (given.tasks is None) == (given.output is None):
        parser.error("pass --output, or --tasks to write the tasks alone")

    from mlmfast.readers import Malformed, read_objects

    pairs = read_pairs(given.blimp, given.pairs)
    rows = [row for row in read_objects(given.rte) if not isinstance(row, Malformed)]
    if given.tasks is not None:
        given.tasks.mkdir(parents=True, exist_ok=True)
        write_tasks(given.tasks, pairs, rows)
        return

    import lm_eval
    from lm_eval.api.instance import Instance

    import mlmfast
    from mlmfast.bench.machine import describe

    machine = describe()
    lm = mlmfast.load(given.model)
    asked = questions(rows, "judge")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, pairs, rows)
        blimp, blimp_seconds = run_cli(folder, "own_blimp", {"pretrained": given.model})
        rte, rte_seconds = run_cli(folder, "own_rte", {"pretrained": given.model})
        options = {"pretrained": given.model, "metric": "window", "unconditional_prompt": UNCONDITIONAL}
        normal, normal_seconds = run_cli(folder, "own_rte", options)
    good, bad = (
        [score.total for score in lm.score([pair[f"sentence_{side}"] for pair in pairs])] for side in ("good", "bad")
    )
    direct = judge(pairs, good, bad)
    for paradigm, tally in direct["paradigms"].items():
        if abs(blimp[f"own_blimp_{paradigm}"] - tally["accuracy"]) > 1e-9:
            raise SystemExit(f"{paradigm}: {blimp[f'own_blimp_{paradigm}']} by lm_eval, {tally['accuracy']} without")
    plain = ranked(lm, asked, rows, metric="original")
    corrected = ranked(lm, asked, rows, metric="window", normalize="unconditional", unconditional_prompt=UNCONDITIONAL)
    runs: list[dict[str, Any]] = [
        {"name": "BLiMP, mean of paradigms", "questions": len(pairs), "lm_eval": blimp["own_blimp"]}
        | {"direct": direct["mean"], "seconds": blimp_seconds},
        {"name": "RTE", "questions": len(rows), "lm_eval": rte["own_rte"], "direct": plain, "seconds": rte_seconds},
        {"name": f"RTE, metric window, unconditional_prompt={UNCONDITIONAL}", "questions": len(rows)}
        | {"lm_eval": normal["own_rte"], "direct": corrected, "seconds": normal_seconds},
    ]
    for run in runs:
        if abs(run["lm_eval"] - run["direct"]) > 1e-9:
            raise SystemExit(f"{run['name']}: {run['lm_eval']} by lm_eval, {run['direct']} without")

    def spread(requests: Sequence[tuple[str, str]]) -> list[Any]:
        places = np.linspace(0, len(requests) - 1, min(given.timed, len(requests))).round().astype(int)
        return [Instance("loglikelihood", {}, requests[place], 0) for place in places]

    sentences = [("", f" {pair[f'sentence_{side}']}") for pair in pairs for side in ("good", "bad")]
    answers = [(prompt, option) for prompt, both in asked for option in both]
    speeds = []
    for kind, requests in (("BLiMP", spread(sentences)), ("RTE", spread(answers))):
        for against, compatible in (("one mask at a time", None), ("minicons, as hf-mlm", "hf-mlm")):
            speeds.append({"name": f"{kind}, {against}"} | beside(given.model, requests, compatible))
    result = {
        "model": given.model,
        "lm_eval": lm_eval.__version__,
        "data": f"{given.blimp.name}, {Path(given.rte).name}",
        "paradigms": len(direct["paradigms"]),
        "machine": machine,
        "runs": runs,
        "speeds": speeds,
    }
    write(given.output, result, page(result))


if __name__ == "__main__":
    main()
