"""Each in-context task, run by lm_eval with the model ``mlmfast``, against loops written from the paper."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import icl_loops
import icl_rows
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DebertaV2Tokenizer
from truth import forward_of

pytest.importorskip("lm_eval", reason='pip install "mlmfast[lm_eval]"')

from lm_eval.evaluator import evaluate
from sacrebleu.metrics import BLEU
from sklearn.metrics import f1_score

from mlmfast.icl import tasks
from mlmfast.integrations.lm_eval import MLMFastLM

SHOTS = [0, 1]


@dataclass
class World:
    """The rows as files, and a small random model that knows their letters."""

    folder: Path
    lm: MLMFastLM
    forward: Callable[[list[int]], Any]
    tokenizer: Any

    def load(self, name: str, shots: int, **options: Any) -> Any:
        return tasks.load(name, data={name: self.folder}, num_fewshot=shots, **options)[f"icl_{name}"]

    def run(self, task: Any) -> dict[str, Any]:
        found = evaluate(self.lm, {"tasks": {task.config.task: task}}, bootstrap_iters=0)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="[UNK]", show_progress=False)
    own = ["Q: A: answer: question: True or False? true, false, neither [] * ' \\n - = ; . ,", *icl_rows.texts()]
    learned.train_from_iterator(own, trainer)
    pieces = [tuple(one) for one in checkpoints.tokenizer_state(learned.to_str())["vocab"]]
    tokenizer = DebertaV2Tokenizer(vocab=pieces, unk_id=1)
    model = checkpoints.small_deberta(len(tokenizer), max_position_embeddings=512)
    folder = icl_rows.write(tmp_path_factory.mktemp("rows"))
    return World(folder, MLMFastLM(model, tokenizer, metric="window"), forward_of(model), tokenizer)


def raw(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row of the file that a demonstration was made of."""
    test, train = icl_rows.ROWS[name]
    return (train or test)[row["icl_index"]]


def solved(name: str, row: dict[str, Any]) -> str:
    if name in icl_rows.RANKING:
        candidates, gold = icl_loops.RANKING[name](row)
        return candidates[gold].text
    prompt, answers = icl_loops.question(name, row)
    return f"{prompt} {answers[0]}"


def context(world: World, task: Any, name: str, place: int, shots: int) -> str:
    drawn = task.demonstrations(task.eval_docs[place], shots)
    assert len(drawn) == shots
    return icl_loops.before(name, [solved(name, raw(name, one)) for one in drawn])


def ranking_metrics(name: str, rows: list[dict[str, Any]], best: list[int], gold: list[int]) -> dict[str, float]:
    """From the paper's words for each task's metric."""
    acc = float(np.mean([a == b for a, b in zip(best, gold)]))
    if name == "cb":
        return {"acc": acc, "f1": f1_score(gold, best, average="macro")}
    if name == "multirc":
        questions = defaultdict(list)
        for row, a, b in zip(rows, best, gold):
            questions[row["paragraph"] + row["question"]].append(a == b)
        return {"exact_match": np.mean([all(one) for one in questions.values()]), "f1": f1_score(gold, best)}
    if name == "record":
        right, overlap = [], []
        for row, one in zip(rows, best):
            said = icl_loops.squad([*dict.fromkeys(row["entities"])][one])
            right.append(said in map(icl_loops.squad, row["answers"]))
            f1s = []
            for wanted in (icl_loops.squad(answer).split() for answer in row["answers"]):
                common = len(set(said.split()) & set(wanted))
                f1s.append(2 * common / (len(said.split()) + len(wanted)))
            overlap.append(max(f1s))
        return {"exact_match": np.mean(right), "f1": np.mean(overlap)}
    if name == "wsc":
        asked = [row["label"] in (1, True, "True") for row in rows]
        return {"acc": np.mean([(a == b) == label for a, b, label in zip(best, gold, asked)])}
    return {"acc": acc}


def compare_ranking(world: World, name: str, task: Any, shots: int) -> None:
    rows = icl_rows.ROWS[name][0]
    found = world.run(task)
    samples = sorted(found["samples"][task.config.task], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(rows)
    best, right = [], []
    for sample, row in zip(samples, rows):
        start = context(world, task, name, sample["doc_id"], shots)
        candidates, gold = icl_loops.RANKING[name](row)
        wanted = [icl_loops.candidate_score(world.forward, world.tokenizer, start, one) for one in candidates]
        values = [value for value, _ in sample["filtered_resps"]]
        many = len(candidates)
        assert len(values) == many * (2 if candidates[0].subtract else 1)
        got = np.array(values[:many]) - (np.array(values[many:]) if len(values) > many else 0.0)
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-3)
        best.append(int(np.argmax(wanted)))
        right.append(gold)
    for metric, value in ranking_metrics(name, rows, best, right).items():
        assert found["results"][task.config.task][f"{metric},none"] == pytest.approx(value), metric


@pytest.mark.parametrize("shots", SHOTS)
@pytest.mark.parametrize("name", icl_rows.RANKING)
def test_ranking_is_the_loop(world: World, name: str, shots: int) -> None:
    compare_ranking(world, name, world.load(name, shots), shots)


def compare_generation(world: World, name: str, task: Any, shots: int) -> None:
    rows = icl_rows.ROWS[name][0]
    found = world.run(task)
    samples = sorted(found["samples"][task.config.task], key=lambda sample: sample["doc_id"])
    texts, answers = [], []
    for sample, row in zip(samples, rows):
        prompt, known = icl_loops.question(name, row)
        whole = context(world, task, name, sample["doc_id"], shots) + prompt
        assert sample["arguments"][0][0] == whole
        (text,) = sample["filtered_resps"]
        texts.append(text.replace("\\n", "\n").replace("\\", "").strip().split("\n")[0])
        answers.append(known)
    results = found["results"][task.config.task]
    if name in icl_loops.NAMES:
        wanted = BLEU(tokenize="intl").corpus_score(texts, [[known[0] for known in answers]]).score
        assert results["bleu,none"] == results["score,none"] == pytest.approx(wanted)
    else:
        right = [icl_loops.squad(text) in map(icl_loops.squad, known) for text, known in zip(texts, answers)]
        assert results["exact_match,none"] == results["score,none"] == np.mean(right)


@pytest.mark.parametrize("shots", SHOTS)
@pytest.mark.parametrize("name", icl_rows.GENERATION)
def test_generation_prompts_and_metrics(world: World, name: str, shots: int) -> None:
    task = world.load(name, shots)
    if name in icl_loops.NAMES:
        task.config.generation_kwargs["max_gen_toks"] = 10
    compare_generation(world, name, task, shots)


def stops(world: World, until: list[str]) -> set[int]:
    """The tokens that are a stop string, glued to a full stop as in the released code, or after a space."""
    tokenizer = world.tokenizer
    found = {tokenizer.sep_token_id}
    for one in until:
        for before in ("", ".", "a"):
            start, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + one))
            if whole[:-1] == start:
                found.add(whole[-1])
    return found


def test_a_stop_token_within_another_stops_nothing(world: World) -> None:
    """The released code stops at the token of a comma; a number with a comma may be a token."""
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.add_tokens(["1,000"])
    eager = copy.deepcopy(world.lm.lm.model)
    eager.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        eager.get_output_embeddings().bias[tokenizer.convert_tokens_to_ids("1,000")] += 80
    task = world.load("nq", 1)
    samples = replace(world, lm=MLMFastLM(eager, tokenizer)).run(task)["samples"][task.config.task]
    for sample in samples:
        assert sample["filtered_resps"][0].count("1,000") == 16


@pytest.mark.parametrize(("name", "most", "least"), [("nq", 16, 2), ("wmt16_de_en", 12, 8)])
def test_generation_is_the_papers_search(world: World, name: str, most: int, least: int) -> None:
    """Four beams, and the stop tokens, which may not come before so many tokens, however likely they are."""
    until = ["\\", ".", ",", ";"] if name == "nq" else ["\\"]
    ids = sorted(stops(world, until))
    assert len(ids) > len(until)  # each of them is a token of this tokenizer
    eager = copy.deepcopy(world.lm.lm.model)
    bias = eager.get_output_embeddings().bias
    with torch.no_grad():
        bias[[one for one in ids if one != world.tokenizer.sep_token_id]] += 40
    lm = MLMFastLM(eager, world.tokenizer)
    task = world.load(name, 1)
    task.config.generation_kwargs["max_gen_toks"] = most
    samples = replace(world, lm=lm).run(task)["samples"][task.config.task]
    settings = {"num_masks": 3, "num_beams": 4, "max_new_tokens": most, "min_new_tokens": least}
    for sample in samples:
        (one,) = lm.lm.generate([sample["arguments"][0][0]], eos_token_id=ids, **settings)
        assert len(one.token_ids) == least + 1  # a stop as soon as it may come
        assert one.token_ids[-1] in ids and not set(one.token_ids[:-1]) & set(ids)
        assert sample["filtered_resps"] == [re.split("|".join(map(re.escape, until)), one.text)[0]]


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a word too many": ("rte", lambda task: setattr(task, "words", task.words + 1)),
    "the answer alone": ("boolq", lambda task: setattr(task, "beside", [])),
    "another separator": ("copa", lambda task: setattr(task.config, "fewshot_delimiter", "\\n ")),
    "two separators": ("piqa", lambda task: setattr(task.config, "fewshot_delimiter", "\\n \\n ")),
    "no normalisation": ("arc_easy", lambda task: setattr(task, "unconditional", None)),
    "another normalisation": ("openbookqa", lambda task: setattr(task, "unconditional", "Answer:")),
    "no heading": ("wsc", lambda task: setattr(task.config, "description", "")),
    "another metric": ("winogrande", lambda task: setattr(task.config, "process_results", right_candidate)),
    "real line breaks": (
        "multirc",
        lambda task: setattr(task.config, "doc_to_text", "{{paragraph}}\n\n{{question}}\n-"),
    ),
}


def right_candidate(doc: Any, choices: Any, best: int, gold: int) -> dict[str, float]:
    return {"acc": 2.0}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_loop_finds(world: World, fault: str) -> None:
    name, plant = FAULTS[fault]
    task = world.load(name, 1)
    plant(task)
    with pytest.raises(AssertionError):
        compare_ranking(world, name, task, 1)


def test_another_masking_is_found(world: World) -> None:
    other = World(world.folder, MLMFastLM(world.lm.lm.model, world.tokenizer), world.forward, world.tokenizer)
    with pytest.raises(AssertionError):
        compare_ranking(other, "rte", other.load("rte", 0), 0)
