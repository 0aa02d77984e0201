"""The benchmarks' machinery on toy shapes: what is counted, what is refused, what is printed."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

import mlmfast
import mlmfast.cli
from mlmfast.bench import app
from mlmfast.bench.copies import savings
from mlmfast.bench.peers import PEERS
from mlmfast.bench.pll import Bench
from mlmfast.bench.sentences import read_sentences, tiny_tokenizer, token_sequences
from mlmfast.bench.shapes import SHAPES
from mlmfast.bench.texts import TRIAL, HuggingFaceLoop, loaded
from mlmfast.bench.texts import run as run_texts
from mlmfast.bench.timing import interleaved
from mlmfast.bench.work import Peak, useful_flops
from mlmfast.errors import RequestError
from mlmfast.masking import TokenSequence, make_plan
from mlmfast.packing import pack, unique_copies

KEYS = ["shape", "length", "copies", "dtype", "backend", "peer"]
KEYS += ["seconds", "peer_seconds", "ratio", "peak_share", "max_abs_diff"]
KEYS += ["case", "peer_dtype", "shortest", "tokens"]
KEYS += ["seconds_quartiles", "peer_seconds_quartiles", "ratio_quartiles"]
# Millions of parameters of the published checkpoints' masked-LM models, and how closely they are known: the model cards
# of the two largest say 900M and 1.5B.
PARAMETERS = {"deberta-v3-base": (184.4, 2e-3), "roberta-base": (124.7, 2e-3), "roberta-large": (355.4, 2e-3)}
PARAMETERS |= {"deberta-v2-xlarge": (900, 2e-2), "deberta-v2-xxlarge": (1500, 5e-2)}
PARAMETERS |= {"deberta-v1-base": (139, 5e-3), "xlm-roberta-base": (278, 5e-3), "modernbert-base": (149.7, 2e-3)}
PARAMETERS |= {"esm2-t12-35m": (34, 2e-2), "esm2-t30-150m": (148.5, 5e-3), "esm2-t33-650m": (651, 5e-3)}
TOYS = ("toy-deberta", "toy-roberta", "toy-modernbert", "toy-esm")
PRODUCT = ((32, 32, 32),)


@pytest.fixture(scope="module")
def toys() -> dict[str, Bench]:
    return {shape: Bench(shape, peer_batch=3) for shape in TOYS}


@pytest.fixture
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the real size take a second each time."""
    monkeypatch.setattr("mlmfast.bench.pll.Peak", lambda dtype, products, device: Peak(dtype, PRODUCT, device))


def invoke(*arguments: str, **settings: Any) -> Any:
    return CliRunner().invoke(app, ["pll", *arguments], **settings)


def test_the_help_names_every_shape_and_peer() -> None:
    found = " ".join(invoke("--help", env={"COLUMNS": "1000"}).output.split())
    assert [name for name in (*SHAPES, *PEERS) if f" {name}" not in found] == []


@pytest.mark.usefixtures("quick_peak")
def test_json_rows_have_exactly_the_agreed_keys(tmp_path: Path) -> None:
    output = tmp_path / "pll.json"
    arguments = ["--shapes", "toy-deberta,toy-roberta", "--lengths", "9,24", "--copies", "12", "--pairs", "2"]
    result = invoke(*arguments, "--threads", "1", "--json", "--output", str(output))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [(row["shape"], row["length"]) for row in rows] == list(
        itertools.product(("toy-deberta", "toy-roberta"), (9, 24))
    )
    for row in rows:
        assert row["copies"] == 12
        assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
        assert row["max_abs_diff"] < 1e-3
        assert row["peak_share"] > 0
        for name in ("seconds", "peer_seconds"):
            low, high = row[f"{name}_quartiles"]
            assert 0 < low <= row[name] <= high
        assert (row["case"], row["shortest"], row["tokens"]) == ("random", row["length"], 12 * row["length"])
    written = json.loads(output.read_text())
    assert written["rows"] == rows
    assert {"cpu", "threads", "torch", "transformers", "mlmfast", "commit", "settings"} <= set(written["header"])
    assert len(written["details"][0]["seconds"]["all"]) == 2
    assert {"q1", "median", "q3"} <= set(written["details"][0]["ratio"])


@pytest.mark.parametrize("shape", TOYS)
@pytest.mark.parametrize(("length", "copies"), [(24, 64), (64, 5), (12, 10)])
def test_texts_ask_for_the_copies_wanted(toys: dict[str, Bench], shape: str, length: int, copies: int) -> None:
    plan = toys[shape].plan(toys[shape].texts(length, copies))
    assert plan.copies == unique_copies(plan) == len(plan.targets) == copies
    assert {len(sequence) for sequence in plan.sequences} == {length}
    assert len(plan.sequences) == -(-copies // (length - 2))
    special = set(toys[shape].tokenizer.all_special_ids)
    assert all(not special & set(sequence[1:-1].tolist()) for sequence in plan.sequences)


def test_impossible_requests_are_refused(toys: dict[str, Bench]) -> None:
    with pytest.raises(RequestError, match="only 1 different"):
        toys["toy-roberta"].texts(3, 4)
    with pytest.raises(RequestError, match="between 3 and the 64"):
        toys["toy-roberta"].texts(65, 4)
    for arguments in (
        ["--shapes", "gpt"],
        ["--lengths", "x"],
        ["--dtype", "int8"],
        ["--shapes", "toy-roberta", "--lengths", "9", "--against", "nobody"],
        ["--shapes", "toy-roberta", "--lengths", "9", "--against", ""],
        ["--shapes", "toy-roberta", "--lengths", "9", "--against", "hf:float16"],
        ["--shapes", "toy-roberta", "--lengths", "9", "--peer-batch", "none"],
        ["--shapes", "toy-roberta", "--lengths", "9", "--texts", "no such file"],
        ["--shapes", "toy-roberta", "--lengths", "9", "--device", "moon"],
    ):
        assert invoke(*arguments).exit_code == 2


def test_peer_pads_unequal_texts(toys: dict[str, Bench]) -> None:
    bench = toys["toy-deberta"]
    texts = [*bench.shape.texts(20, 4), *bench.shape.texts(7, 5, seed=1)]
    together = bench.theirs(texts)
    alone = [bench.theirs([text]) for text in texts]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)
    assert bench.agreement(texts).holds


@pytest.mark.usefixtures("quick_peak")
def test_long_texts_have_fewer_copies() -> None:
    arguments = ["--shapes", "toy-roberta", "--lengths", "9,40", "--copies", "20", "--copy-tokens", "200"]
    result = invoke(*arguments, "--pairs", "1", "--json")
    assert [json.loads(line)["copies"] for line in result.stdout.splitlines()] == [20, 5]


@pytest.mark.usefixtures("quick_peak")
def test_every_peer_has_a_row_with_its_own_dtype() -> None:
    arguments = ["--shapes", "toy-deberta", "--lengths", "12", "--copies", "10", "--dtype", "bfloat16", "--pairs", "2"]
    result = invoke(*arguments, "--against", "hf,hf:float32", "--json")
    assert result.exit_code == 0, result.output
    narrow, wide = (json.loads(line) for line in result.stdout.splitlines())
    assert (narrow["dtype"], narrow["peer_dtype"]) == ("bfloat16", "bfloat16")
    assert (wide["dtype"], wide["peer_dtype"]) == ("bfloat16", "float32")
    assert narrow["seconds"] == wide["seconds"]  # the same rounds
    assert narrow["max_abs_diff"] > 1e-4
    assert wide["max_abs_diff"] > 1e-4


# ---- real sentences


@pytest.fixture
def sentence_file(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.jsonl"
    path.write_text("\n".join(json.dumps({"sentence": text}) for text in checkpoints.sentences(40)))
    return path


def test_sentences_are_spread_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"text {i}\n" for i in [0, 0, *range(100)]) + "\n \n")
    assert read_sentences(str(path), count=5) == ["text 0", "text 25", "text 50", "text 74", "text 99"]
    assert len(read_sentences(str(path))) == 100  # no blank ones, none twice
    with pytest.raises(RequestError, match="100 different"):
        read_sentences(str(path), count=101)


def test_sentences_become_tokens_of_any_shape() -> None:
    texts = ["The cat sat.", "The dog that barked at the postman in the garden was asleep.", "\N{SNOWMAN} \u4e2d"]
    pieces = tiny_tokenizer()(texts, add_special_tokens=False)["input_ids"]
    for name in ("deberta-v3-base", "roberta-base", "toy-roberta"):
        shape = SHAPES[name]
        for sequence, ids in zip(token_sequences(shape, texts), pieces):
            assert len(sequence) == len(ids) + 2
            assert sequence.scored.sum() == len(ids)
            words = sequence.token_ids[1:-1]
            assert len(shape.special) <= words.min() <= words.max() < shape.settings["vocab_size"]
            assert not sequence.scored[[0, -1]].any()
    # Where the vocabulary is large enough, different pieces stay different.
    known = token_sequences(SHAPES["roberta-base"], texts[:2])
    assert [len(set(s.token_ids[1:-1])) for s in known] == [len(set(ids)) for ids in pieces[:2]]
    with pytest.raises(RequestError, match="takes 1 to 62"):
        token_sequences(SHAPES["toy-deberta"], ["word " * 80])


@pytest.mark.usefixtures("quick_peak")
def test_mixed_texts_are_one_request(sentence_file: Path) -> None:
    arguments = ["--shapes", "toy-deberta", "--lengths", "9", "--copies", "4", "--pairs", "1", "--text-count", "6"]
    result = invoke(*arguments, "--texts", str(sentence_file), "--field", "sentence", "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout.splitlines()[1])
    texts = read_sentences(str(sentence_file), field="sentence", count=6)
    lengths = [len(sequence) for sequence in token_sequences(SHAPES["toy-deberta"], texts)]
    assert len(set(lengths)) > 1
    assert (row["case"], row["shortest"], row["length"]) == ("texts", min(lengths), max(lengths))
    assert row["copies"] == sum(lengths) - 2 * len(lengths)
    assert row["tokens"] == sum(length * (length - 2) for length in lengths)


def test_texts_from_end_to_end(sentence_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "texts.json"
    arguments = ["texts", str(sentence_file), "--field", "sentence", "--count", "12", "--models", "tiny"]
    arguments += ["--against", "hf", "--rounds", "3", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(output.read_text())["rows"]
    assert row["agrees"]
    assert row["ratio"] == pytest.approx(row["texts_per_second"] / row["peer_texts_per_second"])
    assert len(row["ratio_rounds"]) == 3
    assert f"{row['ratio']:.2f}x" in result.stdout

    honest = HuggingFaceLoop.__call__
    monkeypatch.setattr(HuggingFaceLoop, "__call__", lambda self, texts: [x + 0.1 for x in honest(self, texts)])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "disagrees" in result.stdout
    assert "texts_per_second" not in json.loads(output.read_text())["rows"][0]


def test_a_text_that_is_wrong_in_a_timed_round_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = checkpoints.sentences(60)
    honest, last = HuggingFaceLoop.__call__, texts[-1]  # not among those of the trial

    def wrong(self: HuggingFaceLoop, batch: list[str]) -> list[float]:
        return [x + 0.1 * (text == last) for x, text in zip(honest(self, batch), batch)]

    monkeypatch.setattr(HuggingFaceLoop, "__call__", wrong)
    assert last not in texts[:: len(texts) // TRIAL]
    _, row = run_texts(["tiny"], texts, against=["hf"], rounds=2)
    assert not row["agrees"]
    assert "ratio" not in row


def test_shapes_score_real_texts() -> None:
    for name in ("deberta-v3-base", "roberta-base"):
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        shape = SHAPES[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHAPES, name, type(shape)(**(vars(shape) | {"settings": shape.settings | small})))
            lm = loaded(name)
        texts = checkpoints.sentences(4)
        ours = [score.total for score in lm.score(texts)]
        assert ours == pytest.approx(HuggingFaceLoop(lm.model, lm.tokenizer)(texts), rel=1e-5)
    with pytest.raises(RequestError, match="fewer than real texts need"):
        loaded("toy-roberta")


def test_interleaved_rounds_turn_round() -> None:
    order: list[str] = []
    times = interleaved([lambda: order.append("a"), lambda: order.append("b")], 3, between=lambda: order.append("|"))
    assert "".join(order) == "|ab|ba|ab"
    assert [len(side) for side in times] == [3, 3]


def test_flops_of_roberta_by_hand(toys: dict[str, Bench]) -> None:
    bench, d, f, vocabulary, length, copies = toys["toy-roberta"], 32, 64, 300, 10, 6
    rows = length * copies
    first_layer = rows * (4 * d * d + 2 * d * f) + copies * 2 * length * length * d
    # The last one: keys and values of all rows; query, output, feed-forward and attention of one row a copy.
    last_layer = rows * 2 * d * d + copies * (2 * d * d + 2 * d * f) + copies * 2 * length * d
    head = copies * (d * d + d * vocabulary)
    assert bench.flops(bench.texts(length, copies)) == 2 * (first_layer + last_layer + head)


def test_position_terms_by_brute_force(toys: dict[str, Bench]) -> None:
    bench = toys["toy-deberta"]
    spec, length = bench.lm.spec(), 40  # well past the 8 exact distances of 16 buckets
    assert spec.buckets is not None
    plan = bench.plan(bench.shape.texts(length, 3))
    table, longest = spec.buckets.tolist(), len(spec.buckets) // 2

    def pairs(queries: list[int]) -> int:
        row = lambda i, j: table[min(max(i - j, -longest), longest) + longest]  # noqa: E731
        content_to_position = {(i, row(i, j)) for i in queries for j in range(length)}
        position_to_content = {(j, row(i, j)) for i in queries for j in range(length)}
        return len(content_to_position) + len(position_to_content)

    plain = type(spec)(**(vars(spec) | {"buckets": None}))
    batches = pack(plan, 8192)
    terms = useful_flops(spec, batches) - useful_flops(plain, batches)
    expected = 3 * pairs(list(range(length))) + sum(pairs([int(p)]) for p in plan.score_positions)
    assert terms == 2 * 32 * expected
    assert pairs(list(range(length))) < 2 * length * length  # far distances share rows


def test_peak_is_the_best_of_its_samples() -> None:
    peak = Peak(torch.float32, PRODUCT)
    first = peak.sample()
    assert first > 0
    assert peak.source.endswith("linear 32x32x32")
    assert peak.sample() >= first


# ---- the figure and its table


@pytest.mark.usefixtures("quick_peak")
def test_figure_and_table_show_losses(sentence_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    figure, tables = (importlib.import_module(name) for name in ("figure", "result_tables"))
    passes, texts = tmp_path / "passes.json", tmp_path / "texts.json"
    arguments = ["--shapes", "toy-roberta", "--lengths", "9,12", "--copies", "7", "--pairs", "1"]
    assert invoke(*arguments, "--output", str(passes)).exit_code == 0
    command = ["texts", str(sentence_file), "--field", "sentence", "--count", "4", "--models", "tiny"]
    command += ["--against", "hf", "--rounds", "2", "--output", str(texts)]
    assert CliRunner().invoke(app, command).exit_code == 0

    result = json.loads(passes.read_text())
    result["rows"][0] |= {"ratio": 0.5, "ratio_quartiles": [0.4, 0.6]}
    result["rows"][1] |= {"ratio": None}
    passes.write_text(json.dumps(result))
    read = figure.read([passes, texts])
    assert [len(kind) for kind in read] == [1, 1, 0]
    both = figure.joined([json.loads(passes.read_text())] * 2)[0]  # as if each peer had a run of its own
    assert [row["length"] for row in both["rows"]] == [9, 9, 12, 12]
    assert len(both["headers"]) == 2
    table = tables.tabulate(*read[:2], "it.png")
    assert "**0.5x (0.4-0.6)**" in table
    assert table.count("disagrees") == 1
    assert tables.refusal({"side": "mlmfast", "error": 0.03, "bound": 0.021}) == (
        "disagrees (mlmfast, error 0.03, bound 0.021)"
    )
    assert tables.refusal({"side": "either", "error": None, "bound": None}) == "disagrees"  # NaN, as JSON has it
    for known in ("torch", result["header"]["cpu"], str(result["header"]["commit"]), "| tiny |", "](it.png)"):
        assert known in table
    pytest.importorskip("matplotlib", reason='the figure needs matplotlib: pip install "mlmfast[bench]"')
    monkeypatch.setattr("sys.argv", ["figure.py", str(passes), str(texts), "--output", str(tmp_path / "drawn")])
    figure.main()
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert "**0.5x" in (tmp_path / "drawn.md").read_text()


# ---- copies saved, and BLiMP's accounts


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def blimp() -> ModuleType:
    return script("blimp")


def brute_force(lm: Any, texts: list[str], spans: list[tuple[int, int]] | None, metric: str) -> set[tuple[int, ...]]:
    """The masked versions of some texts, by rules written out anew."""
    seen: set[tuple[int, ...]] = set()
    for i, text in enumerate(texts):
        encoding = lm.tokenizer(text, return_offsets_mapping=True)
        ids, words = encoding["input_ids"], encoding.word_ids()
        for t, (start, end) in enumerate(encoding["offset_mapping"]):
            inside = spans is None or (end > spans[i][0] and start < spans[i][1])
            if words[t] is None or not inside:
                continue
            reach = {
                "original": {t},
                "within_word_l2r": {u for u in range(t, len(ids)) if words[u] == words[t]},
                "window": {t, t + 1, t + 2},
                "global_l2r": set(range(t, len(ids))),
            }[metric]
            seen.add(
                tuple(
                    lm.tokenizer.mask_token_id if u in reach and words[u] is not None else token
                    for u, token in enumerate(ids)
                )
            )
    return seen


def test_copies_counted_equal_brute_force(
    blimp: ModuleType, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = mlmfast.load(bert_model, bert_tokenizer)
    pairs = [
        {"sentence_good": good, "sentence_bad": bad}
        for good, bad in (
            ("The cat watches every dogs.", "The cat follow every dogs."),  # one word differs
            ("No sparrows follow a pianist!", "A sparrows follow no pianist!"),
            ("Some children repaint the lighthouse.", "Some children repaint the lighthouse."),  # nothing
            ("The gardener remembers.", "Every quiet grandmother has forgotten the yellow cat."),
        )
    ]
    rows = blimp.count_copies(lm, pairs)
    assert len(rows) == 12
    for metric in blimp.METRICS_COUNTED:
        mine = {row["requests"]: row for row in rows if row["metric"] == metric}
        expected = [brute_force(lm, list(pair.values()), None, metric) for pair in pairs]
        assert mine["BLiMP pairs"]["unique"] == sum(len(copies) for copies in expected)
        ranked = [row for kind, row in mine.items() if kind != "BLiMP pairs"]
        assert sum(row["count"] for row in ranked) == 2 * len(blimp.QUESTIONS)
        questions = [
            brute_force(lm, [prompt + o for o in options], [(len(prompt), len(prompt + o)) for o in options], metric)
            for prompt, words, phrases in blimp.QUESTIONS
            for options in (words, phrases)
        ]
        assert sum(row["unique"] for row in ranked) == sum(len(copies) for copies in questions)


def test_single_token_options_share_one_copy() -> None:
    def option(token: int) -> TokenSequence:
        ids = np.array([1, 5, 6, token, 2])
        return TokenSequence(ids, ids < 5, ids == token)

    plan = make_plan([option(token) for token in (10, 11, 12, 13)], 4)
    saved = savings([plan, plan])
    assert (saved.requests, saved.requested, saved.unique) == (2, 8, 2)
    assert saved.share == 0.75
    assert savings([]).share == 0


def test_questions_are_questions(blimp: ModuleType) -> None:
    assert len(blimp.QUESTIONS) == 20
    for prompt, words, phrases in blimp.QUESTIONS:
        assert len(words) == len(phrases) == len(set(words)) == len(set(phrases)) == 4, prompt
        assert all(option[0] == " " for option in [*words, *phrases])
        assert all(" " not in word[1:] for word in words)
        assert all(" " in phrase[1:] for phrase in phrases)


def test_ties_and_errors_count_as_wrong(blimp: ModuleType) -> None:
    pairs = [{"UID": uid, "field": field} for uid, field in [("a", "x")] * 4 + [("b", "x")] * 2 + [("c", "y")]]
    verdict = blimp.judge(pairs, [-1, -2, -3, None, -1, -1, -5], [-2, -2, -1, -9, -2, -3, -4])
    assert verdict["paradigms"]["a"] == {
        "field": "x", "pairs": 4, "right": 1, "ties": 1, "errors": 1, "accuracy": 0.25
    }  # fmt: skip
    assert verdict["fields"] == {"x": 0.625, "y": 0.0}
    assert verdict["mean"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert (verdict["pairs"], verdict["ties"], verdict["errors"]) == (7, 1, 1)
    with pytest.raises(ValueError, match="7 pairs"):
        blimp.judge(pairs, [1], [2])


def test_blimp_goes_through_the_command_line(
    blimp: ModuleType, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    texts = checkpoints.sentences(8)
    lines = [
        json.dumps({"UID": f"paradigm_{i % 2}", "field": "syntax", "sentence_good": good, "sentence_bad": bad})
        for i, (good, bad) in enumerate(zip(texts[:4], texts[4:]))
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines))
    arguments = ["--data", str(data), "--model", str(bert_folder), "--pairs", "1", "--output", str(tmp_path / "result")]
    monkeypatch.setattr("sys.argv", ["blimp.py", *arguments])

    # The same commands without new processes, whose imports take seconds.
    monkeypatch.setattr(blimp, "run_cli", lambda command: CliRunner().invoke(mlmfast.cli.app, command).exit_code)
    blimp.main()
    assert "mean accuracy" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    lm = mlmfast.load(bert_folder)
    expected = [lm.score([good])[0].total > lm.score([bad])[0].total for good, bad in zip(texts[:2], texts[4:6])]
    assert [t["right"] for t in result["blimp"]["paradigms"].values()] == expected
    assert result["run"]["rows"] == 4
    assert "paradigm_1" in (tmp_path / "result.md").read_text()


def test_shapes_are_the_published_ones() -> None:
    """Counted without allocating them."""
    for name, (millions, within) in PARAMETERS.items():
        with torch.device("meta"):
            model = SHAPES[name].model_class(SHAPES[name].config_class(**SHAPES[name].settings))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)
