"""Results -> ``report.json``, ``report.md`` and a table on the terminal: models side by side, published ones last."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlmfast.icl import gpt2
from mlmfast.writers import replace

# Of these lm_eval's values are shown as they are; all others are parts of 1 and shown in percent.
UNSCALED = ("bleu", "sacrebleu", "chrf", "ter", "perplexity", "word_perplexity", "bits_per_byte", "bits_per_character")
DIGITS = {"perplexity": 2, "word_perplexity": 2, "bits_per_byte": 3, "bits_per_character": 3}
AVERAGE = "average of table "
PUBLISHED = Path(__file__).with_name("published.json")
NAMES = {
    "acc": "accuracy",
    "f1": "F1",
    "exact_match": "exact match",
    "em": "exact match",
    "sacrebleu": "BLEU",
    "bleu": "BLEU",
    "word_perplexity": "perplexity by words of the original",
    "bits_per_byte": "bits per byte of the original",
    "bits_per_character": "bits per character of the original",
    "mean": "mean over its tasks of what each lists first",
    "rouge_avg": "average of ROUGE-1, 2 and L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def published() -> dict[str, Any]:
    """The paper's tables 1 to 4: ``tasks`` -> name -> ``scores`` -> model -> shots -> score as printed."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def reference(task: str, metric: str, first: bool) -> dict[str, dict[str, float]]:
    """Published scores beside a metric, model -> shots -> score; of the in-context paper's tasks beside the first."""
    if task.startswith(gpt2.PREFIX):
        return gpt2.published()["tasks"].get(task, {}).get(metric, {})
    return published()["tasks"].get(task, {"scores": {}})["scores"] if first else {}


def scaled(metric: str, value: float) -> float:
    """A value as it is shown."""
    return value if metric in UNSCALED else 100 * value


def shown(metric: str, numbers: dict[str, Any]) -> str:
    """``61.2 ± 0.8``: mean and standard deviation over repetitions, where there are several."""
    digits = DIGITS.get(metric, 1)
    if metric in DIGITS and numbers["mean"] >= 1e5:
        return f"{numbers['mean']:.2e}"
    mean = f"{scaled(metric, numbers['mean']):.{digits}f}"
    return mean if numbers["std"] is None else f"{mean} ± {scaled(metric, numbers['std']):.{digits}f}"


def write(folder: Path, report: dict[str, Any], samples: Iterable[dict[str, Any]] | None = None) -> None:
    """``report.json`` and ``report.md``, and ``samples.jsonl.gz`` if there are samples; each appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    if samples is not None:
        lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        replace(folder / "samples.jsonl.gz", gzip.compress(lines.encode("utf-8", "surrogatepass"), mtime=0))
    replace(folder / "report.md", markdown(report).encode())
    replace(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A table for each metric of each task: ``task``, ``metric``, ``note``, ``head`` and ``rows``, all text."""
    kinds = {model["label"]: model["kind"] for model in report["models"]}
    labels = [model["label"] for model in report["models"]]
    found = []
    for task in dict.fromkeys(result["task"] for result in report["results"]):
        results = [result for result in report["results"] if result["task"] == task]
        metrics = list(dict.fromkeys(name for result in results for name in result["metrics"]))
        for place, metric in enumerate(name for name in metrics if "@" not in name):
            beside = reference(task, metric, place == 0)
            # What does not depend on the model: a column of its own.
            baselines = [name for name in metrics if name.startswith(f"{metric}@")]
            rows = []
            for shots in sorted({result["shots"] for result in results}):
                cells = {result["model"]: result["metrics"] for result in results if result["shots"] == shots}
                own = [
                    shown(metric, cells[label][metric]) if metric in cells.get(label, {}) else "" for label in labels
                ]
                own += [shown(metric, next(iter(cells.values()))[name]) for name in baselines]
                rows.append([str(shots), *own, *(_printed(task, one, str(shots)) for one in beside.values())])
            if beside:
                for shots in ("0", "1", "few"):
                    if shots not in [row[0] for row in rows] and any(shots in scores for scores in beside.values()):
                        printed = [_printed(task, one, shots) for one in beside.values()]
                        rows.append([shots, *("" for _ in (*labels, *baselines)), *printed])
                rows.sort(key=lambda row: (row[0] == "few", int(row[0]) if row[0] != "few" else 0))
            # A PLL is no probability.
            pseudo = metric in gpt2.PERPLEXITIES
            own = [f"{label} (pseudo)" if pseudo and kinds[label] == "masked" else label for label in labels]
            own += [name.partition("@")[2] for name in baselines]
            head = ["shots", *own, *(f"{name} (published)" for name in beside)]
            found.append({"task": task, "metric": metric, "note": _note(metric, results), "head": head, "rows": rows})
    return found + [table for number in range(1, 5) if (table := average(report, number))]


def average(report: dict[str, Any], number: int) -> dict[str, Any] | None:
    """One of the paper's tables: the mean over its tasks; None where not all were evaluated."""
    known = published()["tasks"]
    tasks = [name for name, one in known.items() if one["table"] == number and not name.startswith(AVERAGE)]
    values: dict[tuple[str, int], list[float]] = {}
    for result in report["results"]:
        if result["task"] in tasks:
            metric, numbers = next(iter(result["metrics"].items()))
            values.setdefault((result["model"], result["shots"]), []).append(scaled(metric, numbers["mean"]))
    whole = {key: sum(one) / len(one) for key, one in values.items() if len(one) == len(tasks)}
    if not whole:
        return None
    labels = [model["label"] for model in report["models"]]
    beside = known[f"{AVERAGE}{number}"]["scores"]
    rows = []
    for shots in sorted({shots for _, shots in whole}):
        own = [f"{whole[label, shots]:.1f}" if (label, shots) in whole else "" for label in labels]
        rows.append([str(shots), *own, *(_printed("", one, str(shots)) for one in beside.values())])
    rows.append(["few", *("" for _ in labels), *(_printed("", one, "few") for one in beside.values())])
    head = ["shots", *labels, *(f"{name} (published)" for name in beside)]
    note = f"{len(tasks)} tasks: {', '.join(tasks)}."
    return {"task": f"{AVERAGE}{number}", "metric": "mean", "note": note, "head": head, "rows": rows}


def markdown(report: dict[str, Any]) -> str:
    """The report for readers."""
    lines = ["# In-context evaluation", ""]
    head = ["model", "kind", "parameters", "dtype", "masked together", "line break of its prompts"]
    models = [
        [
            model["label"],
            model["kind"],
            f"{model['parameters']:,}",
            model["dtype"],
            ", ".join(model["metrics"]) or "causal: nothing",
            {"\n": "a real one"}.get(model["separator"], f"the characters `{model['separator']}`"),
        ]
        for model in report["models"]
    ]
    lines += [*table(head, models), ""]
    lines += [
        f"Values are means over repetitions with other demonstrations (first seed {report['seed']}) ± their standard "
        "deviation; where there is no ±, there was one. Columns marked *published* are the paper's, not measured here: "
        f'{published()["source"]}. Its "few" is 4 to 64 shots, by task.',
        "",
    ]
    if any(result["task"].startswith(gpt2.PREFIX) for result in report["results"]):
        known = gpt2.published()
        lines += [
            f"Published scores of tasks whose names begin with {gpt2.PREFIX}: {known['source']}. {known['note']} "
            "Columns marked *pseudo* are of masked models, whose pseudo-log-likelihoods are no probabilities: a "
            "pseudo-perplexity is not to be compared with a perplexity.",
            "",
        ]
    lines += [line for note in report["notes"] for line in (f"{note}.", "")]
    if report["limit"] is not None:
        lines += [f"Only the first {report['limit']} examples were judged, of BLiMP those of each paradigm.", ""]
    for one in tables(report):
        lines += [f"## {one['task']}, {NAMES.get(one['metric'], one['metric'])}", "", one["note"], ""]
        lines += [*table(one["head"], one["rows"]), ""]
        parts = _parts(report, one["task"])
        if parts:
            lines += [*parts, ""]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    run = report["run"]
    lines += [
        f"{versions}.",
        "",
        f"This run: {run['seconds']:.1f} s, {run['computed']:,} requests computed, {run['found']:,} answered before.",
    ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first column to the left, numbers to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows)]


def show(report: dict[str, Any]) -> None:
    """The same tables on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for one in tables(report):
        drawn = Table(title=Text(f"{one['task']}, {NAMES.get(one['metric'], one['metric'])}"), title_justify="left")
        for name in one["head"]:
            drawn.add_column(Text(name), justify="right")
        for row in one["rows"]:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        console.print(Text(one["note"]))


def _note(metric: str, results: Sequence[dict[str, Any]]) -> str:
    """Examples, chance, how often, how exact, and what had to be cut."""
    examples = sorted({result["examples"] for result in results})
    chances = {result["metrics"][metric]["chance"] for result in results if metric in result["metrics"]} - {None}
    errors = [result["metrics"][metric]["standard_error"] for result in results if metric in result["metrics"]]
    said = [f"{' or '.join(f'{number:,}' for number in examples)} examples"]
    if chances:
        said.append("chance " + " or ".join(f"{scaled(metric, chance):.1f}" for chance in sorted(chances)))
    if any(error is not None for error in errors):
        most = max(error for error in errors if error is not None)
        said.append(f"standard error over examples at most {scaled(metric, most):.1f}")
    repetitions = {len(result["metrics"][metric]["repetitions"]) for result in results if metric in result["metrics"]}
    if max(repetitions) > 1:
        said.append(f"{max(repetitions)} repetitions")
    cut = [f"{result['model']}, {result['shots']} shots: {result['cut']:,}" for result in results if result["cut"]]
    note = "; ".join(said) + "."
    if cut:
        note += " Requests (candidates each count) that lost their beginnings, too long for the model: " + "; ".join(
            cut
        )
        note += "."
    return note


def _parts(report: dict[str, Any], task: str) -> list[str]:
    """A row for each paradigm of BLiMP's."""
    results = [result for result in report["results"] if result["task"] == task and "parts" in result]
    names = sorted({name for result in results for name in result["parts"]})
    if not names:
        return []
    rows = [
        [name, str(max(result["parts"].get(name, {"pairs": 0})["pairs"] for result in results))]
        + [f"{100 * result['parts'][name]['accuracy']:.1f}" if name in result["parts"] else "" for result in results]
        for name in names
    ]
    return table(["paradigm", "pairs", *(result["model"] for result in results)], rows)


def _printed(task: str, scores: dict[str, float], shots: str) -> str:
    if shots not in scores:
        return ""
    return f"{scores[shots]:g}" if task.startswith(gpt2.PREFIX) else f"{scores[shots]:.1f}"
