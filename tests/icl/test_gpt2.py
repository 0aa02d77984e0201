"""The GPT-2 paper's tasks under a masked and a causal model, each against a loop written from the paper."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal
import checkpoints
import gpt2_loops as loops
import gpt2_rows
import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason='pip install "mlmfast[eval]"')

from gpt2_world import HELD, KINDS, Ran, World
from lm_eval.api.instance import Instance
from sacrebleu.metrics import BLEU

from mlmfast.errors import RequestError
from mlmfast.icl import evaluate, gpt2, last_word, report
from mlmfast.icl.evaluate import Plan
from mlmfast.icl.models import Settings, open_model
from mlmfast.icl.tasks.gpt2 import metrics, prompts, text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def ran(world: World, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return world.run(list(gpt2_rows.ROWS), tmp_path_factory.mktemp("report"))


def values(ran: Ran, kind: str, name: str) -> dict[str, float]:
    (result,) = [one for one in ran[0]["results"] if (one["model"], one["task"]) == (kind, name)]
    assert result["shots"] == (2 if name in gpt2.SHOWN else 0) and len(result["seeds"]) == 1
    return {metric: numbers["mean"] for metric, numbers in result["metrics"].items()}


def answers(ran: Ran, kind: str, name: str) -> list[dict[str, Any]]:
    return [one for one in ran[1] if (one["model"], one["task"]) == (kind, name)]


# ---- what is scored, written here by hand

STORY = "\"Where is the kite?\" said Mira. Ivo didn't know (he never did). The baker's boy, who was late, ran on."
CBT = {
    "gpt2_cbt_cn": [
        (f'{STORY} "There is the', '{}!" she cried.'),
        (STORY[: STORY.index(" The b")], "{} blew, and they went home."),
    ],
    "gpt2_cbt_ne": [
        (f"{STORY} Then", "{}'s kite was found."),
        (f'{STORY[STORY.index("Ivo") :]} "Ask', '{}," he said.'),
    ],
}
RUNNING = (
    '= The Harbour =\n\nThe harbour\'s keeper, Mr. Hall, said: "it is old-fashioned".\n'
    "It cost 1,200 crowns (in June).\n"
)
TEXTS = {
    "gpt2_wikitext2": [(RUNNING, 33 + 4), ("Owls sleep.\n", 3 + 1)],
    "gpt2_wikitext103": [(RUNNING * 3, 99 + 12), ("Larks sing.\n", 3 + 1)],
    "gpt2_ptb": [
        ("the keeper of <unk> says it isn't old\nprices fell N% to $N a share\n", 18 + 2),
        ("no <unk> sings\n", 3 + 1),
    ],
    "gpt2_1bw": [('"Ada\'s boat is red," Bruno said.', 11 + 1), ("It rained in Oslo (again).", 8 + 1)],
}


def pairs(name: str, row: dict[str, Any], place: int) -> list[tuple[str, str]]:
    if name in CBT:
        context, rest = CBT[name][place]
        # A quotation mark that the choice follows at once has no space after it.
        return [(context, (" " if context else "") + rest.format(choice)) for choice in row["options"]]
    start, end = row["pronoun_loc"], row["pronoun_loc"] + len(row["pronoun"])
    found = []
    for option in row["options"]:
        option = option.replace("The ", "the ") + ("'s" if row["pronoun"] == "his" else "")
        before, after = row["text"][:start] + option, row["text"][end:]
        found.append(("", before + after) if name == "gpt2_wsc_full" else (before, after))
    return found


def check_ranking(world: World, ran: Ran, kind: str, name: str) -> None:
    right = []
    samples = answers(ran, kind, name)
    for place, (row, sample) in enumerate(zip(gpt2_rows.ROWS[name][0], samples, strict=True)):
        asked = pairs(name, row, place)
        assert [tuple(one) for one in sample["arguments"]] == asked
        scores = [loops.total(world.loops[kind].tokens(*one)) for one in asked]
        assert sample["responses"] == pytest.approx(scores, rel=1e-4)
        gold = row["options"].index(row["answer"]) if "answer" in row else row["label"]
        right.append(int(np.argmax(scores)) == gold)
    assert values(ran, kind, name) == {"acc": pytest.approx(statistics.mean(right))}


def check_lambada(world: World, ran: Ran, kind: str, name: str) -> None:
    scores = [world.loops[kind].tokens(*split_last(row["text"])) for row in gpt2_rows.LAMBADA]
    totals = [loops.total(one) for one in scores]
    if name == "gpt2_lambada":
        assert [one["responses"][0][0] for one in answers(ran, kind, name)] == pytest.approx(totals, rel=1e-4)
        wanted = {
            "acc": statistics.mean(map(loops.greedy, scores)),
            "perplexity": loops.perplexity(totals, len(totals)),
        }
    else:
        allowed = beginnings(kind, world.tokenizers[kind])
        wanted = {"acc": statistics.mean(loops.greedy_among(one, allowed) for one in scores)}
    assert values(ran, kind, name) == {metric: pytest.approx(value, rel=1e-3) for metric, value in wanted.items()}


def split_last(passage: str) -> tuple[str, str]:
    last = passage.split(" ")[-1]
    return passage[: -len(last) - 1], " " + last


def beginnings(kind: str, tokenizer: Any) -> list[int]:
    """Tokens that a space begins, a letter or digit after it, that are no stop word; the list itself is mlmfast's."""
    found = []
    for i in range(len(tokenizer)):
        piece = tokenizer.decode([i]) if kind == "causal" else tokenizer.convert_ids_to_tokens(i).replace("▁", " ")
        begins = i not in tokenizer.all_special_ids and piece[:1] == " " and piece[1:2].isalnum()
        if begins and piece[1:].lower() not in last_word.STOP_WORDS:
            found.append(i)
    return found


def check_words(world: World, ran: Ran, kind: str, name: str) -> None:
    logprobs = [world.loops[kind].rolling(one) for one, _ in TEXTS[name]]
    originals = [next(iter(row.values())) for row in gpt2_rows.ROWS[name][0]]
    bits = -sum(logprobs) / math.log(2) / sum(len(one.encode()) for one in originals)
    wanted = {
        "word_perplexity": loops.perplexity(logprobs, sum(units for _, units in TEXTS[name])),
        "bits_per_byte": bits,
    }
    assert values(ran, kind, name) == {metric: pytest.approx(value, rel=2e-3) for metric, value in wanted.items()}


def check_letters(world: World, ran: Ran, kind: str, name: str) -> None:
    originals = [row["text"] for row in gpt2_rows.ROWS[name][0]]
    metric, sizes = {
        "gpt2_enwik8": ("bits_per_byte", [len(one.encode()) for one in originals]),
        "gpt2_text8": ("bits_per_character", [len(one) for one in originals]),
    }[name]
    assert name == "gpt2_text8" or sum(sizes) > sum(map(len, originals))
    bits = -sum(world.loops[kind].rolling(one) for one in originals) / math.log(2) / sum(sizes)
    assert values(ran, kind, name) == {metric: pytest.approx(bits, rel=1e-4)}


FIRST = {"Harbour": ["The old lighthouse at Oslo was sold on Monday.", "Mr. Hall, who had kept it, was sad!"]}
ARTICLES = [
    [
        *FIRST["Harbour"],
        '"I will miss the light," he said.',
        "Nobody knows the price.",
        "The harbour is to be closed in June.",
    ],
    ["A lark sang in the rain.", "The owl slept.", "The gardener listened?", "The roses got water."],
]
GOLD = [["The lighthouse at Oslo was sold.", "Mr. Hall will miss the light."], [gpt2_rows.NEWS[1]["highlights"]]]


def check_summary(world: World, ran: Ran, kind: str, name: str) -> None:
    line = "\n"  # of GPT-2's tokenizer, which keeps line breaks, and of the bundled one's
    found = values(ran, kind, name)
    own, lede = [], []
    for row, sample, sentences, gold in zip(gpt2_rows.NEWS, answers(ran, kind, name), ARTICLES, GOLD, strict=True):
        ((prompt, settings),) = sample["arguments"]
        assert prompt == row["article"] + line + ("TL;DR:" if name == "gpt2_summary" else "")
        assert settings == {"until": [], "max_gen_toks": 100, "do_sample": True, "temperature": 1.0, "top_k": 2}
        answer = sample["responses"][0].replace("\\n", "\n").replace("\\", "")
        own.append(loops.rouges(text.sentences(answer)[:3], gold))
        lede.append(loops.rouges(sentences[:3], gold))
    for metric in own[0]:
        assert found[metric] == pytest.approx(statistics.mean(one[metric] for one in own)), metric
        assert found[f"{metric}@Lede-3"] == pytest.approx(statistics.mean(one[metric] for one in lede)), metric
        possible = [
            [
                loops.rouges([some[i] for i in range(len(some)) if i != left and i != also], gold)[metric]
                for left in range(len(some))
                for also in ([left] if len(some) == 4 else range(left))
            ]
            for some, gold in zip(ARTICLES, GOLD)
        ]
        reached = [(a + b) / 2 for a in possible[0] for b in possible[1]]
        assert any(found[f"{metric}@random-3"] == pytest.approx(one) for one in reached), metric


def check_generated(world: World, ran: Ran, kind: str, name: str) -> None:
    line = "\n"  # of GPT-2's tokenizer, which keeps line breaks, and of the bundled one's
    test, train = gpt2_rows.ROWS[name]
    said, wanted = [], []
    for row, sample in zip(test, answers(ran, kind, name), strict=True):
        ((prompt, settings),) = sample["arguments"]
        assert settings["do_sample"] is False and "num_beams" not in settings
        if name == "gpt2_questions":
            *shown, asked = prompt.split(line * 2)
            solved = {f"Q: {one['question'].rstrip('?')}?{line}A: {one['answer'][0]}" for one in train}
            assert asked == f"Q: {row['question']}?{line}A:"
            wanted.append(row["answer"])
        else:
            source, target = name.split("_")[2:]
            *shown, asked = prompt.split(line)
            solved = {" = ".join([one["translation"][source], one["translation"][target]]) for one in train}
            assert asked == row["translation"][source] + " ="
            wanted.append(row["translation"][target])
        assert len(shown) == 2 == len(set(shown)) and set(shown) <= solved
        (answer,) = sample["responses"]
        said.append(answer)
        if kind == "causal":
            tokenizer, model = world.tokenizers[kind], world.loops[kind].model
            most = settings["max_gen_toks"]
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, -(HELD - most) :]
            with torch.inference_mode():
                out = model.generate(ids, do_sample=False, max_new_tokens=most, pad_token_id=0)
            whole = tokenizer.decode(out[0, ids.shape[1] :]).split(causal.END)[0].split("\n")[0]
            assert answer.strip() == whole.strip()
    if name == "gpt2_questions":
        assert values(ran, kind, name) == {"exact_match": 0.0}  # metrics.closed_book has tests of its own
    else:
        first = [next(iter(text.sentences(one.replace("\\", "").strip())), "") for one in said]
        bleu = BLEU(tokenize="intl").corpus_score(first, [wanted]).score
        assert values(ran, kind, name) == {"bleu": pytest.approx(bleu)}


CHECKS: dict[str, Callable[[World, Ran, str, str], None]] = (
    dict.fromkeys(gpt2_rows.RANKING, check_ranking)
    | dict.fromkeys(["gpt2_lambada", "gpt2_lambada_filtered"], check_lambada)
    | dict.fromkeys(gpt2_rows.WORDS, check_words)
    | dict.fromkeys(["gpt2_enwik8", "gpt2_text8"], check_letters)
    | dict.fromkeys(gpt2_rows.SUMMARIES, check_summary)
    | dict.fromkeys([*gpt2_rows.TRANSLATIONS, "gpt2_questions"], check_generated)
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", gpt2_rows.ROWS)
def test_each_task_is_the_loop(world: World, ran: Ran, name: str, kind: str) -> None:
    CHECKS[name](world, ran, kind, name)


FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "text as its tokenizer left it": ("gpt2_ptb", prompts, "detokenised", lambda line: line),
    "units of the running text": ("gpt2_wikitext2", metrics, "words", lambda one: len(text.detokenised(one).split())),
    "line ends that do not count": ("gpt2_1bw", metrics, "words", lambda one: len(one.split())),
    "characters for bytes": (
        "gpt2_enwik8",
        metrics,
        "text_of",
        lambda doc: doc["text"].encode("ascii", "ignore").decode(),
    ),
    "a choice among spaces": ("gpt2_cbt_cn", prompts, "treebank", lambda line: line),
    "a mean of perplexities": ("gpt2_lambada", metrics.math, "exp", lambda value: value),
    "four sentences": ("gpt2_summary", metrics, "SUMMARY", 4),
    "nats": ("gpt2_text8", metrics.math, "log", lambda value: 1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_loop_finds(world: World, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, where, attribute, other = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(where, attribute, other)
        ran = world.run([name], tmp_path, ("causal",))
    with pytest.raises(AssertionError):
        CHECKS[name](world, ran, "causal", name)


# ---- the filter


@pytest.mark.parametrize("kind", KINDS)
def test_the_filter_passes_over(world: World, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that the model itself would write: its first of all, its first among beginnings, and its second."""
    loop, tokenizer = world.loops[kind], world.tokenizers[kind]
    allowed = beginnings(kind, tokenizer)
    requests, wanted = [], []
    for context in checkpoints.sentences(40, seed=5):
        context = context.rstrip(".!?")
        row, _ = loop.tokens(context, " owl")[0]
        ranked = sorted(allowed, key=lambda i: -float(row[i]))
        for choice in (int(row.argmax()), *ranked[:2]):
            word = tokenizer.decode([choice]).strip()
            if not word.isalnum():
                continue
            tokens = loop.tokens(context, f" {word}")
            if len(tokens) <= 2:
                requests.append(Instance("loglikelihood", {}, (context, f" {word}"), 0))
                wanted.append((loops.total(tokens), loops.greedy_among(tokens, allowed), loops.greedy(tokens)))
    truths = [one[1] for one in wanted]
    assert 5 < sum(truths) < len(truths) - 5
    assert any(filtered and not plain for _, filtered, plain in wanted)  # what the filter is for
    lm = open_model(str(world.folder / kind), Settings(semantics="upstream")).lm
    found = last_word.last_words(lm, requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _, _ in wanted], rel=1e-4)
    assert [right for _, right in found] == truths
    monkeypatch.setattr(last_word, "passed_over", lambda tokenizer, size: np.zeros(size, bool))
    assert [right for _, right in last_word.last_words(lm, requests)] != truths


# ---- generation


def test_two_likeliest_tokens_a_hundred_times(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    own, drawn = HFLM._model_generate, []

    def spied(self: Any, context: torch.Tensor, **options: Any) -> torch.Tensor:
        found = own(self, context=context, **options)
        drawn.append((options["attention_mask"], context, found))
        return found

    monkeypatch.setattr(HFLM, "_model_generate", spied)
    world.run(["gpt2_summary"], tmp_path, ("causal",))
    firsts = []
    for mask, context, found in drawn:
        for marks, row in zip(mask, found):
            width = context.shape[1]
            ids = row[width - int(marks.sum()) :].tolist()
            start = len(ids) - (found.shape[1] - width)
            assert len(ids) - start == 100 or 0 in ids[start:]
            for place in range(start, start + 30):
                if ids[place - 1] == 0 and place > start:
                    break
                best = world.loops["causal"].after(ids[:place]).topk(2).indices.tolist()
                assert ids[place] in best
                firsts.append(ids[place] == best[0])
    assert 0.1 < statistics.mean(firsts) < 0.99


def test_draws_are_the_same_in_each_run(world: World, ran: Ran, tmp_path: Path) -> None:
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = world.run(["gpt2_summary"], tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    for kind in KINDS:
        first, second = (answers(one, kind, "gpt2_summary") for one in (ran, again))
        assert [one["responses"] for one in first] == [one["responses"] for one in second]


def test_rouge_of_a_summary() -> None:
    """The answer's first three sentences, whatever follows."""
    answer = " The lighthouse was sold. Hall misses the lights.\nIt is old. Mr. Hall will miss the light."
    doc = gpt2_rows.NEWS[0] | {"icl_index": 0}
    found = metrics.summary(doc, answer, doc["highlights"])
    wanted = loops.rouges(["The lighthouse was sold.", "Hall misses the lights.", "It is old."], GOLD[0])
    assert {metric: found[metric] for metric in wanted} == pytest.approx(wanted)
    assert 0 < wanted["rouge2"] < wanted["rougeL"] <= wanted["rouge1"] < 1


# ---- data, shots, report


def test_text_files(world: World, tmp_path: Path) -> None:
    """The same text as a file and as a row gives the same; a file of lines is a row a line."""
    (tmp_path / "gpt2_ptb.txt").write_text(gpt2_rows.PTB)
    (tmp_path / "gpt2_1bw.txt").write_text("\n".join(row["text"] for row in gpt2_rows.ROWS["gpt2_1bw"][0]) + "\n\n")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": gpt2_rows.PTB}))
    model = str(world.folder / "causal")
    found = []
    for ptb in ("gpt2_ptb.txt", "one.jsonl"):
        data = {"gpt2_ptb": {"test": tmp_path / ptb}, "gpt2_1bw": {"test": tmp_path / "gpt2_1bw.txt"}}
        plan = Plan(models=[model], tasks=list(data), data=data)
        found.append(evaluate.run(plan, tmp_path / "out")["results"])
    assert found[0] == found[1] and [one["examples"] for one in found[0]] == [1, 2]
    (tmp_path / "gpt2_ptb.txt").write_text(" \n")
    data = {"gpt2_ptb": {"test": tmp_path / "gpt2_ptb.txt"}}
    with pytest.raises(RequestError, match="has no text"):
        evaluate.run(Plan(models=[model], tasks=["gpt2_ptb"], data=data), tmp_path / "out")
    with pytest.raises(RequestError, match=r"not on the Hub.*|--data gpt2_text8=FILE"):
        evaluate.run(Plan(models=[model], tasks=["gpt2_text8"]), tmp_path / "out")


def test_shots_are_the_protocols() -> None:
    asked = {one.task: one.shots for one in evaluate.runs_of(Plan(models=["tiny"], tasks=["gpt2"]))}
    assert set(asked) == set(gpt2_rows.ROWS)
    assert {task: shots for task, shots in asked.items() if shots} == dict.fromkeys(gpt2.SHOWN, 5)
    plan = Plan(models=["tiny"], tasks=["gpt2_questions", "gpt2_lambada"], shots=(0, 3, 7))
    assert [(one.task, one.shots) for one in evaluate.runs_of(plan)] == [
        ("gpt2_questions", 3),
        ("gpt2_questions", 7),
        ("gpt2_lambada", 0),
    ]


def test_report(ran: Ran) -> None:
    """Published values beside each metric as printed, baselines in columns, masked models' perplexities labelled."""
    tables = {(one["task"], one["metric"]): one for one in report.tables(ran[0])}
    sizes = [f"GPT-2 {size} (published)" for size in ("117M", "345M", "762M", "1542M")]
    one = tables["gpt2_ptb", "word_perplexity"]
    assert one["head"] == ["shots", "masked (pseudo)", "causal", *sizes]
    assert [row[3:] for row in one["rows"]] == [["65.85", "47.33", "40.31", "35.76"]]
    one = tables["gpt2_summary", "rouge1"]
    both = ["Lede-3", "random-3"]
    assert one["head"] == ["shots", "masked", "causal", *both, sizes[-1], *(f"{name} (published)" for name in both)]
    assert one["rows"][0][5:] == ["29.34", "40.38", "28.78"] and float(one["rows"][0][3]) > 0
    one = tables["gpt2_translation_fr_en", "bleu"]
    assert [row[0] for row in one["rows"]] == ["2", "few"] and one["rows"][1] == ["few", "", "", "11.5"]
    assert tables["gpt2_lambada_filtered", "acc"]["rows"][0][3:] == ["45.99", "55.48", "60.12", "63.24"]
    assert tables["gpt2_lambada", "acc"]["rows"][0][3:] == ["52.66"]
    assert "chance 10.0" in tables["gpt2_cbt_ne", "acc"]["note"]
    assert not [metric for _, metric in tables if "@" in metric]
    known = {
        metric for task, one in gpt2.published()["tasks"].items() for metric in one if (task, metric) not in tables
    }
    assert not known
    written = report.markdown(ran[0])
    assert "Radford et al. (2019)" in written and "*pseudo*" in written
