"""Proteins and DNA against plain loops that follow what esm's and ProteinGym's scripts publish, a copy at a time."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save, small_bert
from families import FAMILIES, protein_tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import EsmForMaskedLM, EsmTokenizer, PreTrainedTokenizerFast
from truth import Forward, assert_near, forward_of
from typer.testing import CliRunner, Result

import mlmfast
from mlmfast import cli, proteins
from mlmfast.errors import RequestError, TextError
from mlmfast.model import MaskedLM
from mlmfast.protein_windows import overlap_weights, overlapping, window_around
from mlmfast.proteins import MutantError, masked_marginals, mutation_effects, pseudo_perplexity

WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
SEQUENCES = [WILD, "MDE", "WWWWCC", "X"]
MUTANTS = ["K2A", "M1W", "Q33C", "A4G:Y5P:Q33L", "A4A"]


def small_esm(tokenizer: EsmTokenizer) -> EsmForMaskedLM:
    sizes = {"hidden_size": 48, "num_attention_heads": 3}
    return FAMILIES["esm"].small(len(tokenizer), pad_token_id=1, mask_token_id=32, **sizes)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> EsmTokenizer:
    return protein_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lm(tokenizer: EsmTokenizer) -> MaskedLM:
    return mlmfast.load(small_esm(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def forward(lm: MaskedLM) -> Forward:
    return forward_of(lm.model)


@pytest.fixture(scope="module")
def folder(lm: MaskedLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("esm"), lm.model, lm.tokenizer))


def optimal_window(position: int, length: int, window: int) -> tuple[int, int]:
    """ProteinGym's ``get_optimal_window``, over tokens with the special ones."""
    half = window // 2
    if length <= window:
        return 0, length
    if position < half:
        return 0, window
    if position >= length - half:
        return length - window, length
    return position - half, position + half


def masked_loop(forward: Forward, tokenizer: Any, text: str, window: int | None = None) -> np.ndarray:
    """``--scoring-strategy masked-marginals``: float64 ``[L, V]``, a forward a residue."""
    ids = tokenizer(text)["input_ids"]
    rows = []
    for place in range(1, len(ids) - 1):
        start, end = optimal_window(place, len(ids), window or len(ids))
        copy = [tokenizer.mask_token_id if i == place else token for i, token in enumerate(ids)][start:end]
        rows.append(forward(copy)[place - start].log_softmax(-1).numpy())
    return np.array(rows)


def overlapping_starts(length: int, window: int) -> list[int]:
    """Where the windows of ``--scoring-window overlapping`` begin, as ProteinGym's loop runs."""
    step, starts = window // 2 - 1, []
    left, right = 0, length - window
    while True:
        starts += [left, right]
        if left + window - 1 > right:
            break
        left, right = left + step, right - step
    if left + window - 1 - right + 1 < step:
        starts.append(length // 2 - window // 2)
    return starts


def wild_type_loop(forward: Forward, tokenizer: Any, text: str, window: int | None = None) -> np.ndarray:
    """``--scoring-strategy wt-marginals``, with ``--scoring-window overlapping`` where a window is given."""
    ids = tokenizer(text)["input_ids"]
    if window is None or len(ids) <= window:
        return forward(ids).log_softmax(-1).numpy()[1:-1]
    weights = [1.0] * window
    for i in range(1, window // 4 + 1):
        weights[i] = 1 / (1 + math.exp(-(i - window // 4 / 2) / (window / 64)))
    for i in range(window - 2 - window // 4, window - 1):
        weights[i] = 1 / (1 + math.exp((i - (window - 2) + window // 4 / 2) / (window / 64)))
    total, count = np.zeros((len(ids), len(tokenizer))), np.zeros((len(ids), 1))

    def read(start: int) -> None:
        rows = forward(ids[start : start + window]).log_softmax(-1).numpy()
        total[start : start + window] += rows * np.array(weights)[:, None]
        count[start : start + window] += np.array(weights)[:, None]

    for start in overlapping_starts(len(ids), window):
        read(start)
    return (total / count)[1:-1]


def pseudo_likelihood(forward: Forward, tokenizer: Any, text: str, window: int | None = None) -> float:
    """Of every residue, each at its own token: not esm's ``compute_pppl``, whose targets are shifted by one."""
    rows = masked_loop(forward, tokenizer, text, window)
    return sum(float(row[tokenizer.convert_tokens_to_ids(letter)]) for row, letter in zip(rows, text))


def effect_of(table: np.ndarray, tokenizer: Any, mutant: str, offset: int = 1) -> float:
    """``label_row``: the sum over substitutions of the mutant's log-probability less the wild type's."""
    found = 0.0
    for one in mutant.split(":"):
        row = table[int(one[1:-1]) - offset]
        found += row[tokenizer.convert_tokens_to_ids(one[-1])] - row[tokenizer.convert_tokens_to_ids(one[0])]
    return float(found)


@pytest.mark.parametrize("window", [None, 16, 17])
def test_marginals(lm: MaskedLM, forward: Forward, window: int | None) -> None:
    tables = masked_marginals(lm, SEQUENCES, window=window)
    unmasked = masked_marginals(lm, SEQUENCES, metric="unmasked", window=window)
    for text, table, plain in zip(SEQUENCES, tables, unmasked):
        assert table.shape == plain.shape == (len(text), 33) and table.dtype == np.float32
        if window != 17:  # there ProteinGym reads a token less; see window_around
            assert_near(table, masked_loop(forward, lm.tokenizer, text, window), what=f"masked {text}")
        assert_near(plain, wild_type_loop(forward, lm.tokenizer, text, window), what=f"unmasked {text}")
    if window:
        whole = masked_marginals(lm, [WILD])[0]
        assert np.abs(tables[0] - whole).max() > 0.01  # a window is read otherwise than the whole
        assert np.abs(unmasked[0] - masked_marginals(lm, [WILD], metric="unmasked")[0]).max() > 0.01


def test_alone_and_together(lm: MaskedLM) -> None:
    together = masked_marginals(lm, [*SEQUENCES, *SEQUENCES])
    for i, text in enumerate([*SEQUENCES, *SEQUENCES]):
        assert_near(together[i], masked_marginals(lm, [text])[0], 1e-5)


@pytest.mark.parametrize("window", [None, 16])
def test_pseudo_perplexity(lm: MaskedLM, forward: Forward, window: int | None) -> None:
    found = pseudo_perplexity(lm, SEQUENCES, window=window)
    for text, perplexity, one in zip(SEQUENCES, found, proteins.score(lm, SEQUENCES, window=window)):
        total = pseudo_likelihood(forward, lm.tokenizer, text, window)
        assert perplexity == pytest.approx(math.exp(-total / len(text)), rel=1e-4)
        assert "".join(one.tokens) == text and one.total == pytest.approx(total, rel=1e-4)
    for mine, whole in zip(proteins.score(lm, SEQUENCES), lm.score(SEQUENCES)):
        assert_near(mine.logprobs, whole.logprobs, 1e-5)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("offset", [1, 25])
def test_effects(lm: MaskedLM, forward: Forward, offset: int, window: int | None) -> None:
    tables = {
        "masked-marginals": masked_loop(forward, lm.tokenizer, WILD, window),
        "wt-marginals": wild_type_loop(forward, lm.tokenizer, WILD, window),
    }
    numbered = [":".join(f"{m[0]}{int(m[1:-1]) + offset - 1}{m[-1]}" for m in one.split(":")) for one in MUTANTS]
    options: dict[str, Any] = {"offset": offset, "window": window}
    for strategy, table in tables.items():
        found = mutation_effects(lm, WILD, numbered, strategy=strategy, **options)
        wanted = [effect_of(table, lm.tokenizer, one, offset) for one in numbered]
        assert_near(np.array(found), np.array(wanted), what=strategy)
        assert found[-1] == 0
    found = mutation_effects(lm, WILD, numbered, strategy="pseudo-ppl", **options)
    for mutant, value in zip(MUTANTS, found):
        letters = list(WILD)
        for one in mutant.split(":"):
            letters[int(one[1:-1]) - 1] = one[-1]
        assert value == pytest.approx(pseudo_likelihood(forward, lm.tokenizer, "".join(letters), window), rel=1e-4)


def test_rows_are_computed_once(lm: MaskedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan in pieces costs as many copies as there are positions; neighbours of one wild type share them."""
    asked: list[int] = []
    visit = MaskedLM.visit

    def watched(self: MaskedLM, sequences: Any, take: Any, **options: Any) -> None:
        asked.append(sum(int(one.scored.sum()) for one in sequences))
        visit(self, sequences, take, **options)

    monkeypatch.setattr(MaskedLM, "visit", watched)
    effects = proteins.Effects(lm, WILD)
    scan = [f"{letter}{i}{to}" for i, letter in enumerate(WILD, 1) for to in "ACDW"]
    pieces = [effect for start in range(0, len(scan), 7) for effect in effects(scan[start : start + 7])]
    assert sum(asked) == len(WILD)
    assert_near(np.array(pieces), np.array(mutation_effects(lm, WILD, scan)), 1e-5)
    asked.clear()
    effects = proteins.Effects(lm, WILD, strategy="wt-marginals")
    effects(["K2A"])
    effects(["Q33C"])
    assert len(asked) == 1


@pytest.mark.parametrize("length", [*range(1025, 1100, 37), 1536, 2047, 2048, 2049, 2600, 3100, 4000])
def test_windows_of_proteingym(length: int) -> None:
    """With its own numbers: 1024 tokens, steps of 511, flanks of 256 around 128 with a slope of 16."""
    weights = torch.ones(1024, dtype=torch.float64)
    for i in range(1, 257):
        weights[i] = 1 / (1 + math.exp(-(i - 128) / 16))
    for i in range(1022 - 256, 1023):
        weights[i] = 1 / (1 + math.exp((i - 1022 + 128) / 16))
    assert_near(overlap_weights(1024), weights.numpy(), 1e-12)
    for position in {0, 511, 512, 513, length // 2, length - 513, length - 512, length - 511, length - 1}:
        start, end = optimal_window(position, length, 1024)
        assert (window_around(position, length, 1024), end - start) == (start, 1024)
    starts = overlapping(length, 1024)
    assert starts == overlapping_starts(length, 1024)
    assert len(starts) % 2 == (length in (2600, 4000))  # one more in the middle
    covered = np.zeros(length, int)
    for start in starts:
        covered[start : start + 1024] += 1
    assert covered.min() >= 1


def test_a_model_with_an_end(tokenizer: EsmTokenizer) -> None:
    """ESM-1b counts positions: what is longer is read in windows of what it holds."""
    absolute = {"position_embedding_type": "absolute", "max_position_embeddings": 22}
    settings = {"pad_token_id": 1, "mask_token_id": 32, "hidden_size": 48, "num_attention_heads": 3}
    model = FAMILIES["esm"].small(len(tokenizer), **settings, **absolute)
    lm = mlmfast.load(model, tokenizer)
    assert lm.max_length == 20
    assert_near(masked_marginals(lm, [WILD])[0], masked_loop(forward_of(model), tokenizer, WILD, 20))
    assert_near(mutation_effects(lm, WILD, ["K2A"]), mutation_effects(lm, WILD, ["K2A"], window=20))
    with pytest.raises(RequestError, match="window=30 is more than the 20 tokens"):
        masked_marginals(lm, [WILD], window=30)


def dna_tokenizer(each: int) -> PreTrainedTokenizerFast:
    """Words of so many bases, special tokens around them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["".join(word) for word in itertools.product("ACGT", repeat=each)]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate([*special, *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex("." * each), "isolated")
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    roles = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(roles, special)))


def test_dna() -> None:
    """A token a base, by another family; k-mers are refused."""
    bases, words = dna_tokenizer(1), dna_tokenizer(3)
    lm = mlmfast.load(small_bert(len(bases)), bases)
    forward = forward_of(lm.model)
    assert_near(masked_marginals(lm, ["ACGTTA"])[0], masked_loop(forward, bases, "ACGTTA"))
    effect = effect_of(masked_loop(forward, bases, "ACGTTA"), bases, "C2T:T5G")
    assert mutation_effects(lm, "ACGTTA", ["C2T:T5G"])[0] == pytest.approx(effect, rel=1e-4)
    with pytest.raises(TextError, match=r"text 0 has 6 letters.*2 tokens, from letter 1 on \('A' as 'ACG'\).*k-mers"):
        masked_marginals(mlmfast.load(small_bert(len(words)), words), ["ACGTTA"])


@pytest.mark.parametrize(
    ("mutant", "reason"),
    [
        ("A2G", "residue 2 is K, not A; is offset=1 right"),
        ("K34G", "no residue 34, the sequence has 1 to 33"),
        ("M0G", "no residue 0"),
        ("M-1G", "no residue -1"),
        ("K2", "'K2' is not a substitution"),
        ("K2A:T3", "'T3' is not a substitution"),
        ("", "'' is not a substitution"),
        ("K" + "2" * 5000 + "A", "is not a substitution"),
        ("K\u0662A", "is not a substitution"),
        ("K2A:K2G", "residue 2 is replaced twice"),
        ("K2J", "no token for residue J"),
    ],
)
def test_mutants_that_do_not_fit(lm: MaskedLM, mutant: str, reason: str) -> None:
    with pytest.raises(MutantError, match=reason) as caught:
        mutation_effects(lm, WILD, ["K2A", mutant])
    assert caught.value.index == 1 and str(caught.value).startswith(f"mutant 1 ({mutant}): ")
    good, bad = mutation_effects(lm, WILD, ["K2A", mutant], on_error="return")
    assert good == pytest.approx(mutation_effects(lm, WILD, ["K2A"])[0], rel=1e-5) and isinstance(bad, MutantError)


def test_refusals(lm: MaskedLM) -> None:
    with pytest.raises(TextError, match=r"text 1 has 3 letters.*from letter 2 on \('J'"):
        masked_marginals(lm, ["MDE", "MJE"])
    with pytest.raises(TextError, match="text 0 has no token"):
        pseudo_perplexity(lm, [""])
    for text in ("MD E", "mde"):
        with pytest.raises(TextError, match="take out what is no residue"):
            pseudo_perplexity(lm, [text])
    good, bad = masked_marginals(lm, ["MDE", "MJE"], on_error="return")
    assert good.shape == (3, 33) and isinstance(bad, TextError) and bad.index == 1
    with pytest.raises(RequestError, match="one string"):
        masked_marginals(lm, WILD)
    with pytest.raises(RequestError, match="metric 'window' does not apply"):
        masked_marginals(lm, [WILD], metric="window")
    with pytest.raises(TextError, match="white space around"):
        pseudo_perplexity(lm, ["MDE\n"])
    with pytest.raises(RequestError, match="offset='1'"):
        mutation_effects(lm, WILD, MUTANTS, offset="1")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="strategy 'best' is not known"):
        mutation_effects(lm, WILD, MUTANTS, strategy="best")
    with pytest.raises(RequestError, match="window=4 is too small"):
        mutation_effects(lm, WILD, MUTANTS, window=4)


# ---- the command line


def invoke(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["esm", *arguments], input=text)


def records(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_text(f"; a comment\n>one of two\n{WILD[:20]}\n {WILD[20:]}\n\n>second\nMDE\n")
    return path


def test_marginals_command(folder: str, lm: MaskedLM, fasta: Path) -> None:
    result = invoke("marginals", str(fasta), "--model", folder, "--residues", "ACD")
    assert result.exit_code == 0, result.stderr
    found = records(result)
    assert [one["name"] for one in found] == ["one of two", "second"] and found[0]["text"] == WILD
    ids = lm.tokenizer.convert_tokens_to_ids(list("ACD"))
    for one, table in zip(found, masked_marginals(lm, [WILD, "MDE"])):
        assert one["tokens"] == list(one["text"]) and one["residues"] == "ACD"
        assert_near(np.array(one["logprobs"]), table[:, ids], 1e-5)
    result = invoke("marginals", str(fasta), "--model", folder, "--metric", "unmasked", "--window", "16")
    table = masked_marginals(lm, [WILD], metric="unmasked", window=16)[0]
    ids = lm.tokenizer.convert_tokens_to_ids(list("ACDEFGHIKLMNPQRSTVWY"))
    assert_near(np.array(records(result)[0]["logprobs"]), table[:, ids], 1e-5)


def test_pppl_command(folder: str, lm: MaskedLM, tmp_path: Path) -> None:
    result = invoke("pppl", "--model", folder, text=f">a\n{WILD}\n>b\nMJE\n>empty\n")
    assert result.exit_code == 1, result.stderr
    first, second, third = records(result)
    assert first["perplexity"] == pytest.approx(pseudo_perplexity(lm, [WILD])[0], rel=1e-5)
    assert first["name"] == "a" and len(first["logprobs"]) == len(WILD)
    assert second["error"].startswith("row 2 has 3 letters") and second["name"] == "b"
    assert third["error"] == "row 3 (empty) has a name and no residues" and third["name"] == "empty"
    assert "3 rows, 2 with an error" in result.stderr


def test_a_folder_goes_on_however_its_input_is_named(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.fasta").write_text(">a\nMKV\n>b\nMK\n")
    command = ["--model", folder, "--output", "out/"]
    assert invoke("pppl", "p.fasta", *command).exit_code == 0
    for name in ("./p.fasta", f"{tmp_path}/p.fasta"):
        again = invoke("pppl", name, *command)
        assert again.exit_code == 0 and "2 rows (2 of them by an earlier run)" in again.stderr, again.stderr
    Path("p.fasta").write_text(">other name\nMKV\n>b\nMK\n")
    assert "made from other rows than p.fasta now has" in invoke("pppl", "p.fasta", *command).stderr


def test_a_damaged_file(folder: str, tmp_path: Path) -> None:
    """What came before the damage is computed, as with text files."""
    whole = "".join(f">p{i}\n{''.join(np.random.default_rng(i).choice(list(WILD), 40))}\n" for i in range(200))
    damaged, output = tmp_path / "half.fasta.gz", tmp_path / "out.jsonl"
    damaged.write_bytes(gzip.compress(whole.encode())[:4000])
    result = invoke("pppl", str(damaged), "--model", folder, "--output", str(output))
    assert result.exit_code == 1, result.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(found) > 50 and [one["name"] for one in found] == [f"p{i}" for i in range(len(found))]
    assert all("error" not in one for one in found[:-1]) and "is damaged" in found[-1]["error"]
    damaged.write_bytes(gzip.compress(b"")[:5])
    assert invoke("pppl", str(damaged), "--model", folder).exit_code == 2


def test_a_name_that_is_not_utf8(folder: str, tmp_path: Path) -> None:
    strange = tmp_path / "strange.fasta"
    strange.write_bytes(b">a\xe9\nMDE\n")
    (found,) = records(invoke("pppl", str(strange), "--model", folder))
    assert found == {"text": "MDE", "error": "row 1 (a\ufffd) is not UTF-8", "name": "a\ufffd"}


@pytest.mark.parametrize("strategy", proteins.STRATEGIES)
def test_mutations_command(folder: str, lm: MaskedLM, tmp_path: Path, strategy: str) -> None:
    table = tmp_path / "scan.csv"
    table.write_text("mutant,DMS_score\n" + "".join(f"{one},0.5\n" for one in [*MUTANTS, "A2G"]))
    wild, output = tmp_path / "wild.fasta", tmp_path / "effects.jsonl"
    wild.write_text(f">wild\n{WILD}\n")
    command = ["mutations", str(table), "--model", folder, "--strategy", strategy, "--output", str(output)]
    result = invoke(*command, "--fasta", str(wild))
    assert result.exit_code == 1, result.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["text"] for one in found] == [*MUTANTS, "A2G"]
    wanted = mutation_effects(lm, WILD, MUTANTS, strategy=strategy)
    assert_near(np.array([one["effect"] for one in found[:-1]]), np.array(wanted), 1e-5)
    assert found[-1]["error"] == "row 6 (A2G): residue 2 is K, not A; is offset=1 right?"
    assert "1 with an error scored in" in result.stderr  # and no count of tokens
    result = invoke("mutations", "--model", folder, "--sequence", WILD, "--strategy", strategy, text="K2A\n")
    assert result.exit_code == 0 and records(result)[0]["effect"] == pytest.approx(wanted[0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mutations", "none.csv", "--sequence", "MDE", "--fasta", "x"], "not both"),
        (["mutations", "none.csv"], "not both"),
        (["mutations", "none.csv", "--sequence", "MDE"], "none.csv"),
        (["mutations", "none.csv", "--sequence", "MDE", "--strategy", "best"], "best is not known"),
        (["mutations", "none.csv", "--fasta", "nowhere.fasta"], "nowhere.fasta"),
        (["marginals", "nowhere.fasta"], "nowhere.fasta"),
        (["marginals", "nowhere.fasta", "--metric", "window"], "window does not apply"),
        (["pppl", "plain.txt"], "no FASTA file"),
        (["pppl", "empty.fasta"], "holds no sequence"),
        (["pppl", "good.fasta", "--output", "good.fasta"], "is the input"),
        (["pppl", "good.fasta", "--window", "3"], "window=3 is too small"),
        (["marginals", "good.fasta", "--residues", "AJ"], "no token for 'J'"),
        (["mutations", "good.txt", "--sequence", "MJE"], "has 3 letters"),
        (["mutations", "good.txt", "--fasta", "two.fasta"], "holds 2 sequences"),
        (["mutations", "good.txt", "--fasta", "good.fasta", "--output", "good.fasta"], "is the input"),
        (["mutations", "-", "--fasta", "-"], "standard input"),
        (["mutations", "good.txt", "--sequence", "MDE", "--field", "mutant"], "mutant"),
        (["marginals", "good.fasta", "--residues", ""], "--residues is empty"),
    ],
)
def test_wrong_requests(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"plain.txt": "MDE\n", "empty.fasta": "", "good.fasta": ">a\nMDE\n", "good.txt": "M1A\n"}
    for name, text in (files | {"two.fasta": ">a\nMDE\n>b\nMDE\n"}).items():
        Path(name).write_text(text)
    result = invoke(*arguments, "--model", folder)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
