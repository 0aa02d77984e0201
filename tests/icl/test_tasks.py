"""Loading the in-context tasks: their data, their demonstrations, their settings; the causal side of lm_eval."""

from __future__ import annotations

import gzip
import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

import checkpoints
import icl_rows
import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mlmfast.errors import RequestError

pytest.importorskip("lm_eval", reason='pip install "mlmfast[lm_eval]"')

from lm_eval import simple_evaluate
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sacrebleu.metrics import BLEU

from mlmfast.icl import tasks
from mlmfast.icl.tasks import metrics
from mlmfast.icl.tasks.task import count, split


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return icl_rows.write(tmp_path_factory.mktemp("rows"))


def load(folder: Path, name: str, **options: Any) -> Any:
    return tasks.load(name, data={name: folder}, **options)[f"icl_{name}"]


def contexts(task: Any, shots: int, places: list[int] | None = None) -> dict[int, str]:
    """The prompts of some rows, built in the order given."""
    docs = task.eval_docs
    return {i: task.fewshot_context(docs[i], shots) for i in (range(len(docs)) if places is None else places)}


def wide(tmp_path: Path, rows: int = 40) -> Path:
    """RTE with many rows to draw."""
    for name, first in (("rte", 0), ("rte.train", 1000)):
        made = [{"premise": f"Cat {first + i}.", "hypothesis": "A cat.", "label": i % 2} for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return tmp_path


# ---- demonstrations


def test_demonstrations_depend_on_seed_and_row_alone(tmp_path: Path) -> None:
    data = wide(tmp_path)
    whole = contexts(load(data, "rte", seed=7), 4)
    again = contexts(load(data, "rte", seed=7), 4, random.Random(0).sample(range(40), 40))
    assert [i for i in whole if whole[i] != again[i]] == []
    task = load(data, "rte", num_fewshot=4, seed=7)
    for rank in range(3):  # sharded among processes
        task.build_all_requests(rank=rank, world_size=3)
        for one in task.instances:
            assert (one.args[0] + one.args[1]).startswith(whole[one.doc_id].removesuffix("answer:")), one.doc_id
    task.build_all_requests(samples=[31, 5])
    assert {one.doc["icl_index"] for one in task.instances} == {31, 5}
    for one in task.instances:
        assert (one.args[0] + one.args[1]).startswith(whole[one.doc["icl_index"]].removesuffix("answer:"))
    other = contexts(load(data, "rte", seed=8), 4)
    assert all(whole[i] != other[i] for i in whole)
    starts = {text.rsplit("Cat", 1)[0] for text in whole.values()}
    assert len(starts) == 40  # each row its own
    task.set_fewshot_seed(8)
    again = contexts(task, 4)
    assert [i for i in whole if again[i] != other[i]] == []


def test_every_row_is_drawn_about_as_often(tmp_path: Path) -> None:
    task = load(wide(tmp_path, 200), "rte")
    drawn = [row["icl_index"] for doc in task.eval_docs for row in task.demonstrations(doc, 20)]
    counts = [drawn.count(i) for i in range(200)]
    assert sum(counts) == 4000
    assert 4 <= min(counts) <= 20 <= max(counts) <= 40  # mean 20, standard deviation 4.2
    assert all(len({row["icl_index"] for row in task.demonstrations(doc, 20)}) == 20 for doc in task.eval_docs)


def test_test_rows_with_more_fields_are_no_demonstrations_of_themselves(tmp_path: Path) -> None:
    """WSC's test rows have candidates, its demonstrations none."""
    rows = "".join(json.dumps(row) + "\n" for row in icl_rows.ROWS["wsc"][0])
    for name in ("wsc", "wsc.train"):
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    task = load(tmp_path, "wsc")
    for doc in task.eval_docs:
        assert doc["text"] not in [one["text"] for one in task.demonstrations(doc, 1)]


def test_a_train_file_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    for name in ("winograd", "other"):
        rows = "".join(json.dumps(row) + "\n" for row in icl_rows.ROWS["winograd"][0])
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    both = {"test": tmp_path / "winograd.jsonl", "train": tmp_path / "other.jsonl"}
    with pytest.raises(RequestError, match="leave its train file out"):
        tasks.load("winograd", data={"winograd": both})


def test_no_test_row_is_its_own_demonstration(tmp_path: Path) -> None:
    row = {"premise": "A cat.", "hypothesis": "It is a cat.", "label": "True"}
    other = row | {"premise": "A dog.", "label": "False"}
    for name, some in (("rte", [row]), ("rte.train", [row, row, other])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")
    task = load(tmp_path, "rte")
    assert [one["premise"] for one in task.demonstrations(task.eval_docs[0], 1)] == ["A dog."]
    with pytest.raises(RequestError, match="rte: 2 demonstrations are asked for, 1 rows can be drawn"):
        task.demonstrations(task.eval_docs[0], 2)


def test_winograd_leaves_out_the_neighbours(folder: Path) -> None:
    task = load(folder, "winograd")
    for i, doc in enumerate(task.eval_docs):
        far = {j for j in range(5) if abs(i - j) > 1}
        assert {row["icl_index"] for row in task.demonstrations(doc, len(far))} == far
        with pytest.raises(RequestError, match="can be drawn"):
            task.demonstrations(doc, len(far) + 1)


def test_wsc_shows_only_positives(folder: Path) -> None:
    task = load(folder, "wsc")
    for doc in task.eval_docs:
        assert {row["icl_index"] for row in task.demonstrations(doc, 2)} == {0, 1}


# ---- data


def test_files_folders_and_splits(folder: Path, tmp_path: Path) -> None:
    test, train = folder / "rte.jsonl", folder / "rte.train.jsonl"
    wanted = contexts(load(folder, "rte"), 2)
    packed = tmp_path / "rte.jsonl.gz"
    packed.write_bytes(gzip.compress(test.read_bytes()))
    (tmp_path / "rte.train.jsonl.gz").write_bytes(gzip.compress(train.read_bytes()))
    for data in (test, str(test), {"test": test, "train": train}, packed, tmp_path, {"test": packed}):
        for name in ("rte", "icl_rte"):
            assert contexts(tasks.load("icl_rte", data={name: data})["icl_rte"], 2) == wanted
    # Without demonstrations their file need not be there.
    alone = tmp_path / "alone.jsonl"
    alone.write_bytes(test.read_bytes())
    task = tasks.load("rte", data={"rte": alone})["icl_rte"]
    assert contexts(task, 0) == contexts(load(folder, "rte"), 0)
    with pytest.raises(RequestError, match=r"no file .*alone\.train\.jsonl to draw demonstrations from"):
        contexts(task, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"premise": "A.", "label": 0}, "row 2: there is no field 'hypothesis'; the row has premise, label"),
        ({"premise": 3, "hypothesis": "B.", "label": 0}, "row 2: field 'premise' is '3', which is not a text"),
        ({"premise": " ", "hypothesis": "B.", "label": 0}, "row 2: field 'premise' is ' ', which is not a text"),
        ({"premise": "A.", "hypothesis": "B.", "label": "maybe"}, "row 2: field 'label' is 'maybe', no label"),
        ({"premise": "A.", "hypothesis": "B.", "label": 2}, "row 2: field 'label' is 2, no label"),
        ({"premise": "A.", "hypothesis": "B.", "label": -1}, "row 2: field 'label' is -1, no label"),
        ([1], "row 2: is a JSON array"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    good = {"premise": "A.", "hypothesis": "B.", "label": 0}
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(RequestError) as found:
        tasks.load("rte", data={"rte": path})
    assert f"own.jsonl, {message}" in str(found.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wsc", {"candidates": None}, "row 1: there is no field 'candidates'"),
        ("wsc", {"span2_index": 2}, "row 1: field 'span2_index': there is no 'she' at word 2"),
        ("triviaqa", {"answer": {"value": "A"}}, r"row 1: there is no field 'answer\.aliases'"),
        ("wmt16_de_en", {"translation": {"de": "A"}}, r"row 1: there is no field 'translation\.en'"),
        ("winograd", {"pronoun_loc": 3}, "row 1: field 'pronoun_loc': there is no 'she' at character 3"),
        ("winogrande", {"answer": "3"}, "row 1: the right candidate, 2, is none of them"),
        ("arc_easy", {"answerKey": "E"}, "row 1: field 'answerKey': 'E' is none of A, B, C"),
        ("copa", {"question": "why"}, "row 1: field 'question': 'why' is neither cause nor effect"),
        ("record", {"answers": ["Eve"]}, "row 1: field 'answers': none of them is among the entities"),
        ("hellaswag", {"endings": []}, r"row 1: field 'endings' is '\[\]', which is not a list of texts"),
    ],
)
def test_a_wrong_row_of_another_task(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    row = {key: value for key, value in (icl_rows.ROWS[name][0][0] | change).items() if value is not None}
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        tasks.load(name, data={name: path})


def test_labels_are_numbers_or_words(tmp_path: Path) -> None:
    words = ["entailment", "True", "true", True, 0, "0", "not_entailment", "False", False, 1, "1"]
    path = tmp_path / "rte.jsonl"
    rows = [{"premise": "A.", "hypothesis": "B.", "label": word} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = tasks.load("rte", data={"rte": path})["icl_rte"]
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [0] * 6 + [1] * 5


def test_wrong_requests(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="task 'glue' is not known; tasks are .*rte"):
        tasks.load("glue")
    with pytest.raises(RequestError, match="data is given for cb, which rte does not ask for"):
        tasks.load("rte", data={"cb": folder})
    with pytest.raises(RequestError, match="num_fewshot=-1"):
        tasks.load("rte", data={"rte": folder}, num_fewshot=-1)
    with pytest.raises(RequestError, match="separator=' ' separates nothing"):
        tasks.load("rte", data={"rte": folder}, separator=" ")
    with pytest.raises(RequestError, match=r"data of rte: there is no file .*rte\.jsonl"):
        tasks.load("rte", data={"rte": tmp_path})
    with pytest.raises(RequestError, match="data of rte names train; it takes test and train"):
        tasks.load("rte", data={"rte": {"train": folder / "rte.jsonl"}})
    task = load(folder, "rte")
    with pytest.raises(RequestError, match="no chat template"):
        task.fewshot_context(task.eval_docs[0], 0, apply_chat_template=True)


# ---- settings


def test_the_separator_is_a_setting(folder: Path) -> None:
    for name in icl_rows.ROWS:
        usual, real = (contexts(load(folder, name, separator=one), 1) for one in (tasks.SEPARATOR, "\n"))
        assert real == {i: text.replace("\\n ", "\n") for i, text in usual.items()}, name
        assert name in ("hellaswag", "storycloze") or all("\n" not in text for text in usual.values()), name
    assert load(folder, "nq", separator="\n").config.generation_kwargs["until"] == ["\n", ".", ",", ";"]
    assert load(folder, "nq").config.generation_kwargs["until"] == ["\\", ".", ",", ";"]


def test_lm_eval_itself_passes_the_settings(folder: Path) -> None:
    """As by ``--include_path`` and ``--metadata``; lm_eval's fewshot seed is the tasks'."""
    metadata = {"data": {"rte": str(folder)}, "separator": "\n"}
    manager = TaskManager(include_path=str(tasks.FOLDER), include_defaults=False, metadata=metadata)
    found = simple_evaluate(
        causal(),
        tasks=["icl_rte"],
        task_manager=manager,
        num_fewshot=2,
        fewshot_random_seed=5,
        bootstrap_iters=0,
    )
    assert found is not None
    asked = {one["doc_id"]: one["arguments"][0] for one in found["samples"]["icl_rte"]}
    wanted = contexts(load(folder, "rte", separator="\n", seed=5), 2)
    assert {i: "".join(pair) for i, pair in asked.items()} == {i: f"{text} True" for i, text in wanted.items()}


def test_groups_average_the_papers_numbers(folder: Path) -> None:
    metadata = {"data": dict.fromkeys(icl_rows.ROWS, str(folder))}
    manager = TaskManager(include_path=str(tasks.FOLDER), include_defaults=False, metadata=metadata)
    loaded = manager.load(["icl_superglue"])
    found = evaluate(causal(), loaded, bootstrap_iters=0)
    assert found is not None
    names = tasks.members("superglue")
    assert len(names) == 8
    first = {"icl_multirc": "exact_match,none", "icl_record": "exact_match,none"}
    values = [found["results"][name][first.get(name, "acc,none")] for name in names]
    assert found["groups"]["icl_superglue"]["score,none"] == pytest.approx(sum(values) / 8)


def test_members(folder: Path) -> None:
    assert tasks.members(["rte", "icl_rte"]) == ["icl_rte"]
    assert len(tasks.members("ranking")) == 16
    assert len(tasks.members("generation")) == 9
    assert sorted(tasks.members("icl")) == sorted([*tasks.members("ranking"), *tasks.members("generation")])
    data = dict.fromkeys(["nq", "triviaqa", "webqs"], folder)
    assert list(tasks.load(["webqs", "nq", "triviaqa"], data=data)) == ["icl_webqs", "icl_nq", "icl_triviaqa"]


def test_the_package_holds_the_files() -> None:
    found = {path.name for path in resources.files("mlmfast.icl.tasks").iterdir()}
    assert {f"{name}.yaml" for name in icl_rows.ROWS} | {"_ranking.yaml", "group_superglue.yaml"} <= found


# ---- spans and metrics


def test_split_takes_whole_words() -> None:
    assert split("one two\n  three four ", 2) == ("one two", "\n  three four ")
    assert split("one two", 2) == ("", "one two")
    assert split("one two", 9) == ("", "one two")
    assert split("one two", 0) == ("one two", "")
    assert count(" \\n - a  b") == 4


def test_metrics() -> None:
    assert metrics.normalised("The U.S.  of An Owl!") == "us of owl"
    assert metrics.first_line(" an owl\\n Q: what") == "an owl"
    assert metrics.first_line("an owl\nQ") == "an owl"
    assert metrics.first_line("an\\ owl") == "an owl"
    assert metrics.word_f1("the old owl", "an owl") == pytest.approx(2 / 3)
    assert metrics.word_f1("owl", "cat") == 0.0
    assert metrics.all_right([("a", True), ("a", False), ("b", True)]) == 0.5
    assert metrics.macro_f1([(0, 0), (1, 0), (2, 2)]) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert metrics.macro_f1([(0, 0), (2, 0)]) == pytest.approx((2 / 3 + 0) / 2)  # a class that nowhere occurs is none
    assert metrics.binary_f1([(True, True), (False, True), (True, False), (False, False)]) == 0.5
    assert metrics.binary_f1([(False, False)]) == 0.0


def test_bleu_is_the_named_one() -> None:
    assert metrics.bleu([("The old cat sleeps.", "The old cat sleeps.")] * 2) == pytest.approx(100)
    pairs = [
        ("Ada said: “The old cat sleeps”, at 3€ a night.", "Ada said: “the old cat sleeps” – at 3€ a night."),
        ("It is warm in the red tower.", "It is warm in the Red tower."),
    ]
    said, wanted = ([pair[i] for pair in pairs] for i in (0, 1))
    assert metrics.bleu(pairs) == pytest.approx(BLEU(tokenize="intl").corpus_score(said, [wanted]).score)
    for other in (BLEU(tokenize="13a"), BLEU(tokenize="intl", lowercase=True)):
        assert abs(metrics.bleu(pairs) - other.corpus_score(said, [wanted]).score) > 1


# ---- the causal side


def causal() -> HFLM:
    """lm_eval's ``hf`` with a small random GPT-2, whose tokenizer keeps line breaks."""
    inner = checkpoints.roberta_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=1024, n_embd=16, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return HFLM(pretrained=GPT2LMHeadModel(config).eval(), tokenizer=tokenizer, batch_size=4, device="cpu")


@pytest.mark.parametrize("separator", [tasks.SEPARATOR, "\n"])
def test_a_causal_model_runs_the_same_prompts(folder: Path, separator: str) -> None:
    names = ["copa", "arc_easy", "nq"]
    loaded = tasks.load(names, data=dict.fromkeys(names, folder), separator=separator, num_fewshot=1)
    found = evaluate(causal(), {"tasks": loaded}, bootstrap_iters=0)
    assert found is not None
    for name in names:
        wanted = contexts(load(folder, name, separator=separator), 1)
        for sample in found["samples"][f"icl_{name}"]:
            asked = "".join(one for one in sample["arguments"][0] if isinstance(one, str))
            assert asked.startswith(wanted[sample["doc_id"]]), name
        assert 0 <= found["results"][f"icl_{name}"]["score,none"] <= 1
    for sample in found["samples"]["icl_nq"]:
        assert not any(stop in sample["filtered_resps"][0] for stop in (separator.strip(" ")[0], ".", ",", ";"))
