"""The needle's prompts: the paper's template, lengths that are kept, places, numbers, sentences, digits alone."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import sentences
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlmfast.errors import RequestError
from mlmfast.icl.checkpoints import separator_of
from mlmfast.icl.digits import DigitsOnly, DigitsWritten, digit_counts
from mlmfast.icl.haystack import read_haystack, sentences_of
from mlmfast.icl.needle import SLACK, Cell, Grid, Prompt, digits_right, fitted, render

GOLDEN = Path(__file__).with_name("needle_prompt.txt")
HAYSTACK = sentences(400)
MASKS, DIGITS = 3, 6


def papers(haystack: list[str], at: int, number: str, s: str) -> str:
    """The template as the paper prints it, with ``s`` for its line breaks."""
    lines_1 = "".join(line + s for line in haystack[:at])
    lines_2 = "".join(s + line for line in haystack[at:])
    return (
        "> Some special magic number is hidden within the following articles. Make sure to memorize it. I will quiz "
        f"you about the magic number afterwards.{s}{s}{lines_1}The magic number is {number}.{lines_2}{s}{s}> Question: "
        f"What is the special magic number mentioned in the provided text?{s}> Answer: The special magic number "
        "mentioned in the provided text is"
    )


def whole_length(tokenizer: PreTrainedTokenizerBase, text: str, masks: int = MASKS) -> int:
    """Tokens of a prompt with special ones, masks and digits, counted by the tokenizer itself."""
    return len(tokenizer(text)["input_ids"]) + masks + DIGITS


def prompt_of(cell: Cell, grid: Grid, tokenizer: Any, separator: str = "\n", haystack: Any = HAYSTACK) -> Prompt:
    return fitted(cell, grid, haystack, separator, lambda text: whole_length(tokenizer, text), "the model")


# ---- the template


def test_the_prompt_is_the_golden_one() -> None:
    assert render(sentences(5), 2, "482131", "\n") == GOLDEN.read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.parametrize("separator", ["\n", "\\n ", " "])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_the_prompt_is_the_papers(separator: str, at: int) -> None:
    assert render(sentences(4), at, "100000", separator) == papers(sentences(4), at, "100000", separator)


def test_a_needle_without_a_haystack_stands_alone() -> None:
    assert render([], 0, "100000", "\n") == papers([], 0, "100000", "\n")


# ---- numbers


def test_numbers_are_those_that_the_bundled_model_has_not_seen() -> None:
    grid = Grid((128, 256, 512, 1024, 2048))
    cells = [cell for length in grid.lengths for cell in grid.cells(length)]
    assert len(cells) == len(set(cells)) == 5 * 110
    assert {cell.place for cell in cells} == set(range(11)) and {cell.again for cell in cells} == set(range(10))
    for cell in cells:
        text = f"42:{cell.length}:{cell.place}:{cell.again}"
        assert cell.number(42) == str(random.Random(text).randrange(100_000, 1_000_000))
    assert [Cell(128, 0, 0).number(42), Cell(2048, 10, 9).number(42)] == ["992183", "325480"]


def test_digits_are_compared_in_their_places() -> None:
    assert [digits_right(answer, "123456") for answer in ("123456", "1234", "", "023457", "234561")] == [6, 4, 0, 4, 0]


# ---- lengths


@given(st.data())
def test_lengths_are_kept(tokenizers: dict[str, PreTrainedTokenizerBase], data: st.DataObject) -> None:
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    separator = data.draw(st.sampled_from(["\n", "\\n ", " "]))
    least = whole_length(tokenizer, papers([], 0, "100000", separator))
    length = data.draw(st.integers(least + 4, 1500))
    cell = Cell(length, data.draw(st.integers(0, 10)), data.draw(st.integers(0, 9)))
    prompt = prompt_of(cell, Grid((length,)), tokenizer, separator)

    number = cell.number(42)
    assert prompt.number == number and prompt.text.count(number) == 1
    assert prompt.tokens == whole_length(tokenizer, prompt.text) <= length
    # What stands there is the text from its start on, but for a last sentence that may be cut.
    start = cell.again * len(HAYSTACK) // 10
    text = (HAYSTACK[start:] + HAYSTACK)[: prompt.sentences + 1]
    at = int(cell.place / 10 * prompt.sentences)
    whole = papers(text[: prompt.sentences], at, number, separator)
    if prompt.text == whole:
        nothing_more = papers(text, int(cell.place / 10 * len(text)), number, separator)
        assert whole_length(tokenizer, nothing_more) > length
        first = [*text[:-1], text[-1].split()[0]]
        word = papers(first, int(cell.place / 10 * len(first)), number, separator)
        assert length - prompt.tokens <= SLACK * length or whole_length(tokenizer, word) > length
    else:
        words = text[prompt.sentences - 1].split()
        cuts = [[*text[: prompt.sentences - 1], " ".join(words[:n])] for n in range(1, len(words))]
        found = [papers(cut, at, number, separator) for cut in cuts]
        taken = found.index(prompt.text)
        longer = found[taken + 1] if taken + 1 < len(found) else whole
        assert whole_length(tokenizer, longer) > length
        without = papers(text[: prompt.sentences - 1], 0, number, separator)
        assert length - whole_length(tokenizer, without) > SLACK * length - 2


def test_every_place_of_the_needle(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    grid = Grid((700,))
    before = []
    for place in range(11):
        prompt = prompt_of(Cell(700, place, 0), grid, tokenizers["deberta"])
        lines = prompt.text.split("\n")
        at = lines.index(f"The magic number is {prompt.number}.") - 2
        assert at == int(place / 10 * prompt.sentences)
        assert lines[1] == lines[-3] == "" and len(lines) == prompt.sentences + 6
        before.append(at / prompt.sentences)
    assert before[0] == 0 and before[-1] == 1 and before == sorted(set(before))


def test_repetitions_begin_elsewhere_and_go_on_at_the_beginning(tokenizers: Any) -> None:
    firsts = []
    short = [f"This is sentence number {i} of them." for i in range(30)]
    for again in range(3):
        prompt = prompt_of(Cell(300, 0, again), Grid((300,), repetitions=3), tokenizers["deberta"], haystack=short)
        firsts.append(prompt.text.split("\n")[3])
    assert firsts == [short[0], short[10], short[20]]
    assert short[0] in prompt.text.split("\n")


def test_a_length_that_cannot_be_had_is_refused(tokenizers: Any) -> None:
    grid = Grid((40, 1000))
    with pytest.raises(RequestError, match=r"length 40 is too short: .* alone take 92 tokens of the model"):
        prompt_of(Cell(40, 0, 0), grid, tokenizers["deberta"])
    with pytest.raises(RequestError, match="haystack is too short: all its 5 sentences are"):
        prompt_of(Cell(1000, 0, 0), grid, tokenizers["deberta"], haystack=HAYSTACK[:5])


@pytest.mark.parametrize(
    "wrong", [{"lengths": ()}, {"lengths": (0,)}, {"lengths": (9, 9)}, {"placements": 1}, {"repetitions": 0}], ids=str
)
def test_a_grid_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Grid(**({"lengths": (128,)} | wrong))


def test_separators(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    assert separator_of("auto", tokenizers["gpt2"]) == "\n"  # which keeps line breaks
    assert separator_of("auto", tokenizers["bert"]) == "\\n "
    named = ("newline", "literal", " ", " | ", r"\n\n", r"\\n ")
    chosen = [separator_of(choice, tokenizers["gpt2"]) for choice in named]
    assert chosen == ["\n", "\\n ", " ", " | ", "\n\n", "\\n "]


def test_the_bundled_tokenizer_is_known_wherever_it_lies(
    tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    """By what it does to text: not by a name, nor by the special tokens that another model puts around it."""
    tokenizers["deberta"].save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    causal = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="[PAD]", eos_token="[SEP]")
    causal.backend_tokenizer.post_processor = processors.ByteLevel()
    causal(["one", "one two"], padding=True, truncation=True, max_length=9)
    for same in (tokenizers["deberta"], AutoTokenizer.from_pretrained(tmp_path), causal):
        assert separator_of("auto", same) == "\n"
    state = json.loads(file.read_text(encoding="utf-8"))
    state["model"]["merges"].pop()
    file.write_text(json.dumps(state), encoding="utf-8")
    assert separator_of("auto", PreTrainedTokenizerFast(tokenizer_file=str(file))) == "\\n "


# ---- the haystack


def test_sentences() -> None:
    text = (
        'Mr. Speaker met Dr. A. B. Gardener in the U.S. Senate. "Did the cat sleep?" It did! (Or so they say.) She '
        "paid 3.50 for it, i.e. Too much.\nThis line goes on\nhere... and ends. 12 sparrows left.\n\nA title\n \n"
        "The end"
    )
    assert sentences_of(text) == [
        "Mr. Speaker met Dr. A. B. Gardener in the U.S. Senate.",
        '"Did the cat sleep?"',
        "It did!",
        "(Or so they say.)",
        "She paid 3.50 for it, i.e. Too much.",
        "This line goes on here... and ends.",
        "12 sparrows left.",
        "A title",
        "The end",
    ]
    assert sentences_of(" \n\n ") == []


def test_haystacks_of_every_kind(tmp_path: Path) -> None:
    text = "\n".join(" ".join(HAYSTACK[i : i + 4]) + "\n" for i in range(0, 40, 4))
    expected = sentences_of(text)
    assert expected == HAYSTACK[:40]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    rows = [json.dumps({"essay": part}) for part in text.split("\n\n")]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert read_haystack(str(tmp_path / "a.txt")) == read_haystack(str(tmp_path / "a.txt.gz")) == expected
    assert read_haystack(str(tmp_path / "a.jsonl"), "essay") == expected
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(RequestError, match="holds no sentence"):
        read_haystack(str(tmp_path / "empty.txt"))
    with pytest.raises(RequestError, match="no row can be read|has no field"):
        read_haystack(str(tmp_path / "a.jsonl"), "text")
    with pytest.raises(RequestError, match="cannot read"):
        read_haystack(str(tmp_path / "missing.txt"))


# ---- digits


def test_digits_are_tokens_of_digits_alone(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    for name, tokenizer in tokenizers.items():
        counts = digit_counts(tokenizer)
        for piece, i in tokenizer.get_vocab().items():
            text = piece.removeprefix("##") if name == "bert" else tokenizer.decode([i])
            assert counts[i] == (len(text) if text.isdigit() else 0), piece
    counts = digit_counts(tokenizers["gpt2"])
    vocabulary = tokenizers["gpt2"].get_vocab()
    spaced = [i for piece, i in vocabulary.items() if piece.startswith("Ġ") and piece[1:].isdigit()]
    assert spaced and not counts[spaced].any()  # a space is no digit, as in the paper
    assert counts.max() > 1


def test_a_tokenizer_without_digits_is_refused(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="no token of digits alone"):
        digit_counts(bert_tokenizer)


def test_the_rule_forbids_all_else() -> None:
    rule = DigitsOnly(torch.tensor([0, 1, 0, 2]))
    scores = torch.tensor([[5.0, -1.0, 7.0, -2.0, 9.0]])  # the model has a row more than the tokenizer tokens
    assert rule(None, scores).tolist() == [[-torch.inf, -1.0, -torch.inf, -2.0, -torch.inf]]
    assert rule(None, scores[:, :3]).tolist() == [[-torch.inf, -1.0, -torch.inf]]


def test_it_ends_with_the_last_digit() -> None:
    ended = DigitsWritten(torch.tensor([0, 1, 2, 3]), 6)
    rows = [[3, 3, 0, 3, 2], [0, 0, 1, 3, 2], [0, 3, 2, 0, 1], [9, 1, 1, 1, 3], [3, 3, 3, 3, 0]]
    assert ended(torch.tensor(rows), None).tolist() == [False, True, False, True, False]
    assert ended(torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]), None).tolist() == [True, False]


def test_the_bundled_tokenizer_writes_a_number_as_six_digits() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "mlmfast" / "tiny")
    asked, answered = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("text is", "text is 482131"))
    assert tokenizer.convert_ids_to_tokens(answered[len(asked) :]) == ["▁", *"482131"]
    assert tokenizer.decode(asked + answered[len(asked) + 1 :]).endswith("482131")
