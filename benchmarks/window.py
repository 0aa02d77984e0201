"""The approximate window cache against exact greedy generation, and the draft's promise of the same tokens.

    python benchmarks/window.py --texts lines.txt.gz --output benchmarks/results/window_tiny

``--texts`` is a file as ``mlmfast score`` reads it; prompts are the beginnings of long lines of it, spread evenly. All
texts get as many new tokens as asked for: no token ends them. Writes ``OUTPUT.json``, ``OUTPUT.md`` and, where
matplotlib is installed, ``OUTPUT.png``. ``--parts draft`` measures that part alone and keeps the grid that
``OUTPUT.json`` holds, and the other way round.

With a window over all tokens a step is the exact pass. Unless that generates the exact tokens, up to candidates that
are equal within rounding, there is no result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import beside, machine_line, table, write
from strided import spread

from mlmfast.decoding import Frame, plan_of
from mlmfast.rules import Rules
from mlmfast.searches import Ask, GreedySearch

RECOMPUTE = (1, 2, 4, 8, 16, 32)
# With 32 new tokens a refresh every 32 steps is none.
REFRESH = ("never", "16", "8", "4")
# Tokens of a prompt: as many of each length between as can be.
SHORTEST, LONGEST = 16, 64
# Two candidates whose log-probabilities are no farther apart are a tie: rounding decides.
TIE = 1e-4
PARTS = ("grid", "draft")
DTYPES = ("float32", "bfloat16")
# Rows of a batch in which a copy or two are computed together, not dozens: what rounding alone may change.
SMALL_BATCH = 128


def beginnings(lm: Any, texts: Sequence[str], count: int) -> list[str]:
    """The first 16 to 64 tokens of lines that have more, so that none ends where its line does.

    Raises:
        SystemExit: too few such lines.
    """
    encoded = lm.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > LONGEST]
    if len(long) < count:
        raise SystemExit(f"only {len(long)} lines have more than {LONGEST} tokens; {count} prompts are asked for")
    # A stride that shares no divisor with the number of lengths visits each of them before any a second time.
    lengths = [SHORTEST + 20 * i % (LONGEST - SHORTEST + 1) for i in range(count)]
    chosen = [int(i) for i in spread([str(i) for i in long], count)]
    return [texts[i][: encoded["offset_mapping"][i][n - 1][1]] for i, n in zip(chosen, lengths)]


class Forced(GreedySearch):
    """Greedy search that is led along given tokens, and keeps what it would have chosen."""

    def __init__(self, prompt: Sequence[int], rules: Rules, tokens: Sequence[int]) -> None:
        super().__init__(prompt, rules)
        self._tokens = [int(token) for token in tokens]
        self.choices: list[int] = []

    def _append(self, token: int, logprob: float) -> None:
        super()._append(self._tokens[len(self.choices)], logprob)
        self.choices.append(token)


def generate(lm: Any, prompts: Sequence[str], tokens: int, **manner: Any) -> list[Any]:
    """Greedy, without an end before ``tokens``."""
    found: list[Any] = lm.generate(list(prompts), max_new_tokens=tokens, eos_token_id=[], progress=False, **manner)
    return found


def choices(lm: Any, prompts: Sequence[str], right: np.ndarray, **manner: Any) -> np.ndarray:
    """What each step chooses after the tokens ``right [P, n]`` before it, int64 ``[P, n]``."""
    request: dict[str, Any] = {"num_masks": 3, "final_token": "auto", "draft": None, "seed": None, "on_error": "raise"}
    request |= dict.fromkeys(("generation_config", "logits_processor", "stopping_criteria"))
    settings = {"max_new_tokens": right.shape[1], "eos_token_id": []}
    generating = lm._generating(list(prompts), **request, **manner, settings=settings)
    forced = [Forced(*each) for each in zip(generating.prompt_ids, generating.rules, right)]
    generating.searches = forced
    for _ in generating.run():
        pass
    return np.array([search.choices for search in forced])


def frame_of(lm: Any) -> Frame:
    """What ``generate`` puts around a continuation."""
    before, after = lm._encoder(lm.spec()).surroundings()
    return Frame(before, 3, after, lm.tokenizer.mask_token_id)


def logprobs(lm: Any, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> np.ndarray:
    """Exact log-probability of each token after its prefix, float32 ``[N]``; what is asked twice is computed once."""
    keys = [(*prefix, int(token)) for prefix, token in zip(prefixes, tokens)]
    distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    plan = plan_of(frame_of(lm), [Ask(list(key[:-1])) for key in distinct])
    found = lm.logprobs(replace(plan, targets=np.array([key[-1] for key in distinct], np.int64)))
    return found[[distinct[key] for key in keys]]


def prompt_ids(lm: Any, prompts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = lm.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    return found


def first_divergence(found: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many tokens of each text stand before the first that differs, ``n`` where none does: ``[P]``."""
    return np.logical_and.accumulate(found == right, 1).sum(1)


def ties(lm: Any, prompts: Sequence[str], found: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each text that differs, how far apart the two tokens are where it first does, in nats: ``[D]``."""
    at = first_divergence(found, right)
    gaps = []
    for ids, mine, theirs, place in zip(prompt_ids(lm, prompts), found, right, at):
        if place < len(theirs):
            prefix = [*ids, *theirs[:place].tolist()]
            a, b = logprobs(lm, [prefix, prefix], [mine[place], theirs[place]])
            gaps.append(abs(float(a) - float(b)))
    return np.array(gaps)


def compare(found: np.ndarray, forced: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Tokens ``[P, n]`` by the window's own way and led along the exact ones, against the exact ones."""
    same = found == right
    return {
        "equal": float(same.mean()),
        "equal_by_position": [float(share) for share in same.mean(0)],
        "equal_forced": float((forced == right).mean()),
        "equal_forced_by_position": [float(share) for share in (forced == right).mean(0)],
        "texts_equal": float(same.all(1).mean()),
        "first_divergence": float(first_divergence(found, right).mean()),
    }


def measure_grid(
    lm: Any, prompts: Sequence[str], tokens: int, recompute: Sequence[int], refresh: Sequence[str]
) -> dict[str, Any]:
    """Every pair of ``recompute`` and ``refresh``.

    Raises:
        SystemExit: with a window over all tokens the tokens differ from the exact ones by more than a tie.
    """
    exact = generate(lm, prompts, tokens)
    right = np.array([one.token_ids for one in exact])
    few = slice(0, 8)
    whole = generate(lm, prompts[few], tokens, cache="window", recompute=sys.maxsize, refresh=None)
    gaps = ties(lm, prompts[few], np.array([one.token_ids for one in whole]), right[few])
    if not (gaps <= TIE).all():
        raise SystemExit(f"with a window over all tokens, a choice differs by {gaps.max()} nats from the exact one")
    ids = prompt_ids(lm, prompts)
    rows = []
    texts: list[np.ndarray] = []
    for often in refresh:
        for last in recompute:
            manner = {"cache": "window", "recompute": last, "refresh": None if often == "never" else int(often)}
            found = np.array([one.token_ids for one in generate(lm, prompts, tokens, **manner)])
            forced = choices(lm, prompts, right, **manner)
            rows.append({"recompute": last, "refresh": often} | compare(found, forced, right))
            texts.append(found)
            print(f"recompute {last}, refresh {often}: {rows[-1]['equal']:.1%}", file=sys.stderr)
    every = [(prompt, text) for found in texts for prompt, text in zip(ids, found.tolist())]
    prefixes = [[*prompt, *text[:i]] for prompt, text in every for i in range(tokens)]
    scored = logprobs(lm, prefixes, [token for _, text in every for token in text]).reshape(len(texts), -1)
    for row, values in zip(rows, scored):
        row["logprob"] = float(values.mean(dtype=np.float64))
    lengths = [len(one) for one in ids]
    return {
        "prompts": len(prompts),
        "prompt_tokens": [min(lengths), max(lengths)],
        "tokens": tokens,
        "logprob": float(np.mean([one.logprobs for one in exact], dtype=np.float64)),
        "rows": rows,
    }


def measure_draft(lm: Any, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    """Whether drafted tokens are the plain ones, and how many a pass gives.

    Beside it, how many texts differ where plain generation itself is computed in other batches.
    """
    right = np.array([one.token_ids for one in generate(lm, prompts, tokens)])
    drafted = generate(lm, prompts, tokens, draft="masks")
    gaps = ties(lm, prompts, np.array([one.token_ids for one in drafted]), right)
    passes = sum(one.passes for one in drafted)
    lm.batch_tokens = SMALL_BATCH
    alone = np.array([one.token_ids for one in generate(lm, prompts, tokens)])
    lm.batch_tokens = None
    others = ties(lm, prompts, alone, right)
    return {
        "dtype": str(lm.dtype).removeprefix("torch."),
        "prompts": len(prompts),
        "tokens": tokens,
        "different": len(gaps),
        "ties": int((gaps <= TIE).sum()),
        "widest": float(gaps.max(initial=0)),
        "plain_different": len(others),
        "plain_widest": float(others.max(initial=0)),
        "tokens_per_pass": right.size / passes,
    }


def markdown(result: dict[str, Any], picture: str | None) -> list[str]:
    run = result["run"]
    lines = [f"# The window cache (approximate) against exact greedy generation, model `{run['model']}`", ""]
    if "grid" in result:
        lines += grid_table(result["grid"], picture)
    if "draft" in result:
        lines += draft_table(result["draft"])
    return lines


def grid_table(found: dict[str, Any], picture: str | None) -> list[str]:
    low, high = found["prompt_tokens"]
    return [
        f"{found['prompts']} prompts of {low} to {high} tokens, beginnings of lines of {found['source']}; "
        f"{found['tokens']} new tokens each, three masks, no token ends a text. "
        "**equal**: tokens that are the exact ones, position by position, each way going on from its own; after a "
        "first other token most differ. **equal, led**: at exact's own prefixes, steps that choose the exact token. "
        "**first other**: tokens before it, mean. **nats a token**: mean log-probability of the text under the exact "
        f"model, of which exact greedy's own texts have {found['logprob']:.3f}.",
        "",
        *([f"![shares by recompute and refresh]({picture})", ""] if picture else []),
        *table(
            ["refresh", "recompute", "equal, led", "equal", "texts equal", "first other", "nats a token"],
            [
                [r["refresh"], f"{r['recompute']}", f"{r['equal_forced']:.1%}", f"{r['equal']:.1%}"]
                + [f"{r['texts_equal']:.0%}", f"{r['first_divergence']:.1f}", f"{r['logprob']:.3f}"]
                for r in found["rows"]
            ],
        ),
        "",
        machine_line(found["header"]),
        "",
    ]


def draft_table(found: dict[str, Any]) -> list[str]:
    return [
        '## `draft="masks"`',
        "",
        f"Drafted tokens should be the plain ones, unless the best two candidates are within {TIE:g} nats of each "
        "other (a tie, which float32's rounding decides: a draft's copies are computed in other batches). bfloat16 "
        f"rounds coarser; beside it is how many texts of plain generation differ in batches of {SMALL_BATCH} rows, and "
        "at most how far apart the two tokens are where a text first differs.",
        "",
        *table(
            ["dtype", "prompts", "new tokens", "texts that differ", "of them by a tie", "widest, nats"]
            + ["plain in other batches", "widest, nats", "tokens a pass"],
            [
                [r["dtype"], f"{r['prompts']}", f"{r['tokens']}", f"{r['different']}", f"{r['ties']}"]
                + [f"{r['widest']:.1e}", f"{r['plain_different']}", f"{r['plain_widest']:.1e}"]
                + [f"{r['tokens_per_pass']:.2f}"]
                for r in found["rows"]
            ],
        ),
        "",
        machine_line(found["header"]),
        "",
    ]


def draw(found: dict[str, Any], output: Path) -> None:
    """Both shares by ``recompute``, a line a ``refresh``."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    titles = {"equal_forced": "steps at exact's prefixes that choose its token", "equal": "tokens equal to exact's"}
    # Okabe and Ito's colours, told apart without colour vision.
    colours = ["#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
    for panel, (name, title) in zip(panels, titles.items()):
        for place, refresh in enumerate(dict.fromkeys(row["refresh"] for row in found["rows"])):
            rows = [row for row in found["rows"] if row["refresh"] == refresh]
            steps = [row["recompute"] for row in rows]
            shares = [100 * row[name] for row in rows]
            panel.plot(steps, shares, "o-", markersize=3, color=colours[place % len(colours)], label=refresh)
        panel.set_xscale("log", base=2)
        panel.set_xticks(steps, [str(step) for step in steps])
        panel.set_xlabel("recompute")
        panel.set_title(title, loc="left", fontsize=9)
        panel.yaxis.set_major_formatter("{x:g} %")
    panels[1].legend(title="refresh", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", required=True, help="lines, as mlmfast score reads them")
    parser.add_argument("--field", default="text", help="of --texts")
    parser.add_argument("--model", default="tiny", help="as for mlmfast score")
    parser.add_argument("--prompts", type=int, default=50, help="of the grid")
    parser.add_argument("--drafted", type=int, default=200, help="prompts of the draft")
    parser.add_argument("--new-tokens", type=int, default=32, help="that every prompt gets")
    parser.add_argument("--recompute", type=int, nargs="+", default=list(RECOMPUTE))
    parser.add_argument("--refresh", nargs="+", default=list(REFRESH), help="numbers of steps, or never")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--threads", type=int, help="torch's choice unless given")
    parser.add_argument("--output", type=Path, required=True, help="where to write, without a suffix")
    args = parser.parse_args()
    if min(args.prompts, args.drafted, args.new_tokens, *args.recompute) < 1:
        parser.error("--prompts, --drafted, --new-tokens and --recompute must be 1 or more")
    if not all(often == "never" or (often.isdecimal() and int(often)) for often in args.refresh):
        parser.error("--refresh takes whole numbers from 1, and never")

    import torch

    import mlmfast
    from mlmfast.bench import machine
    from mlmfast.bench.sentences import read_sentences

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    header = machine.describe()
    texts = read_sentences(args.texts, field=args.field)
    source = Path(args.texts).name
    run = {"model": args.model if args.model == "tiny" else Path(args.model).name}
    result: dict[str, Any] = {"run": run}
    before = beside(args.output, ".json")
    if before.is_file():
        kept = json.loads(before.read_text(encoding="utf-8"))
        if kept["run"] == run:
            result |= {part: kept[part] for part in PARTS if part in kept}
    if "grid" in args.parts:
        lm = mlmfast.load(args.model, dtype="float32")
        prompts = beginnings(lm, texts, args.prompts)
        grid = measure_grid(lm, prompts, args.new_tokens, args.recompute, args.refresh)
        result["grid"] = {"header": header, "source": source} | grid
    if "draft" in args.parts:
        rows = []
        for dtype in DTYPES:
            lm = mlmfast.load(args.model, dtype=dtype)
            rows.append(measure_draft(lm, beginnings(lm, texts, args.drafted), args.new_tokens))
        result["draft"] = {"header": header, "source": source, "rows": rows}
    picture = None
    if "grid" in result and importlib.util.find_spec("matplotlib") is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(result["grid"], beside(args.output, ".png"))
        picture = beside(args.output, ".png").name
    write(args.output, result, markdown(result, picture))


if __name__ == "__main__":
    main()
