"""The needle's answers against plain loops over the Hugging Face models, and the grid asked of models that know."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from appending import appending
from transformers import BertConfig, PreTrainedTokenizerBase

import mlmfast
from mlmfast.errors import CheckpointError, MLMFastError, RequestError
from mlmfast.icl.checkpoints import kind_of
from mlmfast.icl.needle import Cell, Grid, fitted
from mlmfast.icl.needle_models import Causal, Masked, count, load_asked
from mlmfast.icl.needle_run import ask, summary
from mlmfast.ledger import Ledger

HAYSTACK = checkpoints.sentences(400)
LENGTHS = {"bert": 420, "roberta": 300, "deberta": 300, "gpt2": 300}
LOADING = {"semantics": "trained", "dtype": "auto", "device": "cpu"}


def is_digits(tokenizer: PreTrainedTokenizerBase, i: int) -> bool:
    return tokenizer.decode([i]).removeprefix("##").isdigit()


def prompts_of(asked: Any, length: int, places: Sequence[int] = (0, 4, 10)) -> list[str]:
    grid = Grid((length,))
    cells = [Cell(length, place, place % 10) for place in places]
    return [fitted(cell, grid, HAYSTACK, "\n", lambda t: count(asked, t), asked.name).text for cell in cells]


@torch.no_grad()
def plain(tokenizer: Any, logits_of: Any, prompt: str) -> str:
    """Six digits, a whole pass a token, nothing but digits considered."""
    digits = [i for i in range(len(tokenizer)) if is_digits(tokenizer, i)]
    ids, text = tokenizer(prompt, add_special_tokens=False)["input_ids"], ""
    while len(text) < 6:
        row = logits_of(ids)[digits]
        ids = [*ids, digits[int(row.argmax())]]
        text += tokenizer.decode(ids[-1:]).removeprefix("##").strip()
    return text[:6]


# ---- masked


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
@pytest.mark.parametrize("masks", [3, 1])
def test_masked_answers_are_the_plain_loop(family: str, masks: int, tokenizers: Any, models: Any) -> None:
    tokenizer, model = tokenizers[family], models[family]
    asked = Masked(mlmfast.load(model, tokenizer), num_masks=masks)
    truth = appending(model, tokenizer, masks=masks)
    prompts = prompts_of(asked, LENGTHS[family])
    expected = [plain(tokenizer, lambda ids: truth(input_ids=torch.tensor([ids])).logits[0, 0], p) for p in prompts]
    assert asked.answers(prompts) == expected
    assert len(set(expected)) > 1 and all(re.fullmatch("[0-9]{6}", answer) for answer in expected)
    assert asked.beside == len(tokenizer("")["input_ids"]) + masks + 6


def test_far_beyond_the_trained_length_distances_are_clamped(
    tokenizers: Any, models: Any, folders: Any, clamped: None
) -> None:
    asked = load_asked(str(folders["deberta"]), num_masks=3, cache="none", loading=LOADING)
    assert models["deberta"].config.max_position_embeddings == 96 and asked.limit is None
    truth = appending(models["deberta"], tokenizers["deberta"])
    (prompt,) = prompts_of(asked, 600, [3])
    expected = plain(tokenizers["deberta"], lambda ids: truth(input_ids=torch.tensor([ids])).logits[0, 0], prompt)
    assert asked.answers([prompt]) == [expected]
    assert asked.settings["semantics"] == "trained"


def test_the_window_cache_is_named_approximate(tokenizers: Any, models: Any) -> None:
    exact = Masked(mlmfast.load(models["deberta"], tokenizers["deberta"]))
    near = Masked(mlmfast.load(models["deberta"], tokenizers["deberta"]), cache="window")
    assert exact.note == "" and near.note == "approximate: cache window"
    assert near.settings["cache"] == "window" and exact.settings["cache"] == "none"
    answers = near.answers(prompts_of(near, 300))
    assert all(re.fullmatch("[0-9]{6}", answer) for answer in answers)


def test_an_interruption_is_not_an_answer(tokenizers: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Masked(mlmfast.load(models["deberta"], tokenizers["deberta"]))

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlmfast.icl.digits.DigitsOnly.__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked.answers(prompts_of(asked, 300))


# ---- causal


@pytest.fixture
def gpt2(tokenizers: Any, models: Any) -> Causal:
    return Causal(models["gpt2"], tokenizers["gpt2"], "gpt2")


def test_causal_answers_are_the_plain_loop(gpt2: Causal, tokenizers: Any, models: Any) -> None:
    tokenizer, model = tokenizers["gpt2"], models["gpt2"]
    prompts = [*prompts_of(gpt2, 300), *prompts_of(gpt2, 450)]  # of several lengths, so that rows are padded
    expected = [plain(tokenizer, lambda ids: model(torch.tensor([ids])).logits[0, -1], p) for p in prompts]
    assert gpt2.answers(prompts) == expected
    assert [gpt2.answers([prompt])[0] for prompt in prompts] == expected
    assert len(set(expected)) > 1 and gpt2.beside == 6


def test_a_prompt_that_is_too_long_loses_its_beginning(gpt2: Causal, tokenizers: Any, models: Any) -> None:
    tokenizer, model = tokenizers["gpt2"], models["gpt2"]
    (prompt,) = prompts_of(gpt2, 900, [0])
    ids = tokenizer(prompt)["input_ids"]
    held = 700 - 6
    assert gpt2.truncated(len(ids) + 6) == len(ids) - held > 0
    expected = plain(tokenizer, lambda all: model(torch.tensor([ids[-held:] + all[len(ids) :]])).logits[0, -1], prompt)
    assert gpt2.answers([prompt]) == [expected]


def test_what_the_checkpoint_wants_of_generation_is_left_out(gpt2: Causal, tokenizers: Any, models: Any) -> None:
    prompts = prompts_of(gpt2, 300)
    expected = gpt2.answers(prompts)
    models["gpt2"].generation_config.repetition_penalty = 9.0
    models["gpt2"].generation_config.do_sample = True
    assert Causal(models["gpt2"], tokenizers["gpt2"], "gpt2").answers(prompts) == expected


# ---- which kind


def test_the_kind_is_the_configs(folders: Any, tmp_path: Path) -> None:
    assert [kind_of(str(folders[name])) for name in sorted(folders)] == ["masked", "masked", "causal", "masked"]
    for config, kind in [
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "causal"),
        ({"model_type": "bert"}, "masked"),
        ({"model_type": "opt"}, "causal"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert kind_of(str(tmp_path)) == kind
    with pytest.raises(CheckpointError, match="no model is there"):
        kind_of(str(tmp_path / "nothing"))


def test_a_causal_model_without_its_weights_is_refused(folders: Any, tmp_path: Path, tokenizers: Any) -> None:
    BertConfig(is_decoder=True, architectures=["BertLMHeadModel"], vocab_size=177).save_pretrained(tmp_path)
    tokenizers["bert"].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no weights are there"):
        load_asked(str(tmp_path), num_masks=3, cache="none", loading=LOADING)
    bert = checkpoints.small_bert(len(tokenizers["bert"]))
    bert.bert.save_pretrained(tmp_path)
    config = bert.config.to_dict() | {"architectures": ["BertLMHeadModel"], "is_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="freshly initialised"):
        load_asked(str(tmp_path), num_masks=3, cache="none", loading=LOADING)


def test_the_kind_may_stand_before_the_name(folders: Any) -> None:
    for spec, kind in [(f"masked:{folders['bert']}", "masked"), (f"causal:{folders['gpt2']}", "causal")]:
        asked = load_asked(spec, num_masks=3, cache="none", loading=LOADING)
        assert (asked.kind, asked.name) == (kind, spec.partition(":")[2])
    with pytest.raises(MLMFastError):
        load_asked(f"masked:{folders['gpt2']}", num_masks=3, cache="none", loading=LOADING)


def test_other_weights_are_another_model(tokenizers: Any) -> None:
    one, same, other, nearly = (checkpoints.small_bert(len(tokenizers["bert"]), seed=seed) for seed in (1, 1, 2, 1))
    with torch.no_grad():
        nearly.bert.encoder.layer[1].output.dense.weight[3, 5] += 1e-4
    weights = [Masked(mlmfast.load(m, tokenizers["bert"])).settings["weights"] for m in (one, same, other, nearly)]
    assert weights[0] == weights[1] and len(set(weights)) == 3


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_longest_length_that_a_model_holds_leaves_room_for_the_number(
    family: str, tokenizers: Any, models: Any
) -> None:
    asked = Masked(mlmfast.load(models[family], tokenizers[family]))
    assert asked.limit == 700
    assert all(re.fullmatch("[0-9]{6}", answer) for answer in asked.answers(prompts_of(asked, 700, [0, 5])))


# ---- the grid, asked of models that need no computing


class Reads:
    """Reads the number out of the prompt; wrong where it is told to be. Remembers what it was asked."""

    name, kind, note, beside = "reads", "masked", "", 0

    def __init__(self, tokenizer: Any, limit: int | None = None, wrong: Sequence[int] = ()) -> None:
        self.settings: dict[str, Any] = {}
        self.tokenizer = tokenizer
        self.limit = limit
        self.wrong = wrong  # which of its answers
        self.asked: list[str] = []

    def answers(self, prompts: Sequence[str]) -> list[str]:
        found = []
        for prompt in prompts:
            number = re.findall(r"The magic number is (\d{6})\.", prompt)[0]
            found.append(number[:5] + "x" if len(self.asked) in self.wrong else number)
            self.asked.append(prompt)
        return found

    def truncated(self, tokens: int) -> int:
        return 0


GRID = Grid((128, 200), placements=3, repetitions=2)


def asked_all(reads: Any, path: Path, grid: Grid = GRID, **options: Any) -> list[dict[str, Any]]:
    with Ledger(path, {"model": "reads"}) as ledger:
        ask(reads, grid, HAYSTACK, "\n", ledger, **options)
        return ledger.records


def test_who_knows_the_number_gets_all(tokenizers: Any, tmp_path: Path) -> None:
    reads = Reads(tokenizers["deberta"])
    bar: list[int] = []
    records = asked_all(reads, tmp_path / "a.jsonl", advance=bar.append)
    rows = summary(reads, GRID, records)
    assert [row["length"] for row in rows] == [128, 200]
    for row in rows:
        assert row["accuracy"] == [1.0] * 3 and row["mean"] == row["digits"] == 1.0 and row["needles"] == 6
    assert len(reads.asked) == len(set(reads.asked)) == sum(bar) == 12


def test_a_wrong_answer_counts_where_it_was_given(tokenizers: Any, tmp_path: Path) -> None:
    reads = Reads(tokenizers["deberta"], wrong=[1, 2, 5])  # of length 128: places 1 and 2, then 2 again
    first, second = summary(reads, GRID, asked_all(reads, tmp_path / "a.jsonl"))
    assert first["accuracy"] == [1.0, 0.5, 0.0] and first["mean"] == 0.5
    assert first["digits"] == pytest.approx((6 * 6 - 3) / 36)
    assert second["mean"] == 1.0


def test_lengths_that_the_model_does_not_hold_are_not_zero(tokenizers: Any, tmp_path: Path) -> None:
    reads = Reads(tokenizers["deberta"], limit=199)
    records = asked_all(reads, tmp_path / "a.jsonl")
    rows = summary(reads, GRID, records)
    assert {record["length"] for record in records} == {128}
    assert rows[1] == {"length": 200, "needles": 0, "too_long": "reads holds 199 tokens, 200 were asked for"}


def test_lengths_that_are_too_short_are_said_before_any_is_computed(tokenizers: Any, tmp_path: Path) -> None:
    reads = Reads(tokenizers["deberta"])
    with pytest.raises(RequestError, match="length 30 is too short"):
        asked_all(reads, tmp_path / "a.jsonl", Grid((128, 30), placements=3, repetitions=2))
    assert reads.asked == []


@pytest.mark.parametrize("torn", [b"", b'{"length": 128, "pla', b'{"length": 128, "place": 0}'])
def test_an_interrupted_run_goes_on(torn: bytes, tokenizers: Any, tmp_path: Path) -> None:
    whole = asked_all(Reads(tokenizers["deberta"], wrong=[7]), tmp_path / "whole.jsonl")

    class Dies(Reads):
        def answers(self, prompts: Sequence[str]) -> list[str]:
            if len(self.asked) >= 6:
                raise KeyboardInterrupt
            return super().answers(prompts)

    first = Dies(tokenizers["deberta"])
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        asked_all(first, path, batch_tokens=256)
    assert len(first.asked) == 6
    with path.open("ab") as stream:
        stream.write(torn)
    second = Reads(tokenizers["deberta"], wrong=[1])
    bar: list[int] = []
    assert asked_all(second, path, batch_tokens=256, advance=bar.append) == whole
    assert len(second.asked) == 6 and not set(first.asked) & set(second.asked) and sum(bar) == 12
    third = Reads(tokenizers["deberta"])
    assert asked_all(third, path) == whole and third.asked == []
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_lengths_may_be_added(tokenizers: Any, tmp_path: Path) -> None:
    asked_all(Reads(tokenizers["deberta"]), tmp_path / "a.jsonl", Grid((128,), placements=3, repetitions=2))
    more = Reads(tokenizers["deberta"])
    asked_all(more, tmp_path / "a.jsonl")
    assert len(more.asked) == 6


def test_a_ledger_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Ledger(path, {"seed": 42, "cache": "none"}) as ledger:
        ledger.add([{"length": 1}])
    kept = path.read_bytes()
    with pytest.raises(RequestError, match=r"other settings: cache was 'none' and is now 'window'; masks was None"):
        Ledger(path, {"seed": 42, "cache": "window", "masks": 3})
    for foreign in (b"one\ntwo\n", b'{"a": 1}\n', b"[1]\n[2]\n", b"no line end"):
        other = tmp_path / "other.jsonl"
        other.write_bytes(foreign)
        with pytest.raises(RequestError, match="was not written by mlmfast"):
            Ledger(other, {"seed": 42})
        assert other.read_bytes() == foreign
    assert path.read_bytes() == kept
    path.write_bytes(kept + b'{"length": 2, "torn')
    with Ledger(path, {"seed": 42, "cache": "none"}) as ledger:
        assert ledger.records == [{"length": 1}]
    assert path.read_bytes() == kept
    for torn in (b"", b'{"settings": {"se'):
        (tmp_path / "torn.jsonl").write_bytes(torn)
        with Ledger(tmp_path / "torn.jsonl", {"seed": 42}) as ledger:
            assert ledger.records == []
        assert (tmp_path / "torn.jsonl").read_text() == '{"settings": {"seed": 42}}\n'
