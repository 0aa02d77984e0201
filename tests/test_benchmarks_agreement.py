"""The arithmetic of the measuring scripts in benchmarks/: agreement of scores, groups of texts, where memory goes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mlmfast


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script as if it were run: its neighbours are found beside it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_correlations(script: Any) -> None:
    agreement = script("agreement")
    assert agreement.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert agreement.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert agreement.pearson([1, 2, 3, 4], [1, 10, 100, 1000]) < 0.9
    assert agreement.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # A tie: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert agreement.spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert agreement.pearson([1, 1], [1, 2]) is None


def test_errors_are_signed_in_the_bias_alone(script: Any) -> None:
    agreement = script("agreement")
    right = np.zeros(4, np.float32)
    found = agreement.errors(np.array([-1, 1, 0, 4], np.float32), right)
    assert found == {"count": 4, "bias": 1.0, "mean": 1.5, "p99": pytest.approx(3.91), "max": 4.0}
    with pytest.raises(ValueError):
        agreement.errors(right[:0], right[:0])


def test_choices(script: Any) -> None:
    agreement = script("agreement")
    good, bad = np.array([2.0, 2.0, 1.0, 1.0]), np.array([1.0, 1.0, 2.0, 4.0])
    found = np.array([2.0, 1.0, 3.0, 1.0]), np.array([1.0, 1.0, 2.0, 4.0])  # kept, lost to a tie, won, kept
    assert agreement.choices((good, bad), found) == {"pairs": 4, "equal": 0.5, "lost": 1, "won": 1, "widest": 1.0}
    only = agreement.choices((good, bad), found, np.array([True, False, False, False]))
    assert only == {"pairs": 1, "equal": 1.0, "lost": 0, "won": 0, "widest": 0.0}
    assert agreement.choices((good, bad), found, np.zeros(4, bool))["equal"] is None


def scored(*logprobs: float) -> Any:
    values = np.array(logprobs, np.float32)
    score = SimpleNamespace(text="?", logprobs=values, total=float(values.sum()), mean=float(values.mean()))
    return type("Scored", (SimpleNamespace,), {"__len__": lambda self: len(values)})(**vars(score))


def test_strided_leaves_exact_texts_out(script: Any) -> None:
    strided = script("strided")
    exact = [scored(-1, -2), scored(-1, -2, -3)]
    found = [scored(-1, -2), scored(-2, -2, -3)]
    row = strided.compare(exact, found, 2)
    assert (row["texts"], row["tokens"], row["exact_share"]) == (2, 5, 0.5)
    assert row["errors"]["mean"] == pytest.approx(1 / 5)
    assert row["approximated"]["mean"] == pytest.approx(1 / 3)
    assert strided.compare(exact[:1], found[:1], 2)["approximated"] is None
    strided.check_exact(exact, found, 2)
    with pytest.raises(SystemExit):
        strided.check_exact(exact, found, 3)


def test_strided_on_the_bundled_model(script: Any) -> None:
    strided = script("strided")
    pairs = [
        {"UID": "a", "sentence_good": "The dogs bark.", "sentence_bad": "The dogs barks."},
        {"UID": "a", "sentence_good": "She sees the old houses here.", "sentence_bad": "She see the old houses here."},
    ]
    lm = mlmfast.load("tiny")
    found = strided.measure_agreement(lm, pairs, {"33-63": ["One and two and three and four and five. " * 4]}, [2, 64])
    assert [(row["group"], row["stride"]) for row in found["groups"]] == [
        (group, stride) for group in ("BLiMP", "BLiMP 1-8", "running 33-63") for stride in (2, 64)
    ]
    for row in found["groups"]:
        assert (row["exact_share"] == 1) == (row["stride"] == 64)
        assert row["errors"]["max"] < 1e-4 if row["stride"] == 64 else row["errors"]["max"] > 0.01
    assert found["blimp"]["by"][1]["all"]["equal"] == 1


def test_groups_of_texts(script: Any) -> None:
    strided = script("strided")
    assert [strided.band(tokens, strided.RUNNING) for tokens in (32, 33, 127, 128, 256)] == [
        None,
        "33-63",
        "64-127",
        "128-255",
        None,
    ]
    assert strided.spread(list("abcde"), 3) == ["a", "c", "e"]
    assert strided.spread(list("ab"), 3) == ["a", "b"]


def test_bfloat16_scores_by_text(script: Any) -> None:
    bfloat16 = script("bfloat16")
    right = bfloat16.Scored(np.array([-1, -2, -3, -4], np.float32), np.array([1, 2, 50, 400]), np.array([1, 3]))
    assert right.totals.tolist() == [-1, -9]
    assert right.first(1).totals.tolist() == [-1]
    found = bfloat16.Scored(np.array([-1, -2, -3.5, -4], np.float32), np.array([2, 2, 50, 800]), right.lengths)
    compared = bfloat16.compare(found, right)
    assert compared["errors"]["bias"] == -0.125
    assert compared["totals"]["mean"] == 0.25
    assert (compared["other_rank"], compared["first_changed"]) == (0.5, 0.25)
    assert compared["other_rank_of_100"] == pytest.approx(1 / 3)
    deep = bfloat16.Scored(right.logprobs, right.ranks + 100, right.lengths)
    assert bfloat16.compare(deep, deep)["other_rank_of_100"] is None
    with pytest.raises(SystemExit):
        bfloat16.check(found, right, "it")
    assert bfloat16.check(right, right, "it") == 0


def test_bfloat16_chooses_between_neighbours(script: Any) -> None:
    bfloat16 = script("bfloat16")
    pairs = [{"UID": name} for name in ("a", "a", "b", "b")]
    ordered = bfloat16.by_place(pairs)
    assert [pair["UID"] for pair in ordered] == ["a", "b", "a", "b"]
    assert len(bfloat16.by_place(pairs, 1)) == 2

    def of(*totals: float) -> Any:
        return bfloat16.Scored(np.array(totals, np.float32), np.ones(8, np.int64), np.ones(8, np.int64))

    # Good and bad in turn: right, right, right, wrong; then the third is a tie.
    right, found = of(-1, -2, -1, -2, -1, -2, -2, -1), of(-1, -2, -1, -2, -2, -2, -2, -1)
    chosen = bfloat16.choose(ordered, right, found)
    assert (chosen["accuracy"], chosen["accuracy_bfloat16"], chosen["ties_bfloat16"]) == (0.75, 0.5, 1)
    assert (chosen["equal"], chosen["lost"], chosen["won"]) == (0.75, 1, 0)


def test_parts_of_memory_add_up(script: Any) -> None:
    memory = script("memory")
    held = {"imports": (2, 2), "load": (16, 41), "score": (39, 39)}
    stages = {name: {"rss": rss, "anonymous": 1, "peak": peak} for name, (rss, peak) in held.items()}
    found = {"maxrss": 40, "weights": 10, "packed": 8, "stages": stages}
    *parts, peak = memory.split(found).values()
    assert (parts, peak) == ([2, 10, 4, 8, 17], 41)
    assert sum(parts) == peak


def test_made_up_words_differ(script: Any) -> None:
    words = script("memory").made_up_words(1000, seed=0)
    assert len(set(words)) == 1000 == len(words)
    assert words == script("memory").made_up_words(1000, seed=0)


def test_window_divergence(script: Any) -> None:
    window = script("window")
    right = np.array([[1, 2, 3], [4, 5, 6]])
    found = np.array([[1, 9, 3], [4, 5, 6]])
    assert window.first_divergence(found, right).tolist() == [1, 3]
    compared = window.compare(found, right, right)
    assert compared["equal"] == pytest.approx(5 / 6)
    assert compared["equal_by_position"] == [1, 0.5, 1]
    assert (compared["equal_forced"], compared["texts_equal"], compared["first_divergence"]) == (1, 0.5, 2)


LONG = [f"The {noun} in the old house " + "and the small garden behind it " * 12 for noun in ("cat", "dog", "boy")]


def test_window_prompts(script: Any) -> None:
    window = script("window")
    lm = mlmfast.load("tiny")
    prompts = window.beginnings(lm, [*LONG, "Too short."], 3)
    assert [len(ids) for ids in window.prompt_ids(lm, prompts)] == [16, 36, 56]
    assert all(text.startswith(prompt) for text, prompt in zip(LONG, prompts))
    with pytest.raises(SystemExit):
        window.beginnings(lm, ["Too short."], 1)


def test_prefix_on_the_bundled_model(script: Any) -> None:
    prefix = script("prefix")
    rows = [{"premise": f"The {n} sat by the river", "hypothesis": f"The {n} sat", "label": "True"} for n in "abcdefg"]
    judged, matched = prefix.questions(rows, "judge"), prefix.questions(rows, "match")
    assert judged[0][1] == [" True", " False"] and rows[0]["hypothesis"] in judged[0][0]
    for row, (prompt, options) in zip(rows, matched):
        assert prompt == row["premise"] and options[0] == f" {row['hypothesis']}"
        assert len(set(options)) == 1 + prefix.OTHERS
    lm = mlmfast.load("tiny")
    tokens = [len(ids) for ids in lm.tokenizer([prompt for prompt, _ in matched])["input_ids"]]
    whole, *bands = prefix.compare(lm, matched, "window", tokens)
    assert whole["questions"] == 7 == sum(one["questions"] for one in bands)
    assert 0 < whole["errors"]["mean"] < 2 and 0 <= whole["equal"] <= 1 and whole["ratio"] > 0
    result = {"model": "tiny", "data": "rows", "rows": 7, "machine": prefix_machine()}
    result["rows_by_group"] = [{"way": "match", "metric": "window"} | whole]
    assert any(line.startswith("| match, window, all | 7 |") for line in prefix.page(result, None))


def prefix_machine() -> dict[str, Any]:
    from mlmfast.bench.machine import describe

    return describe()


def test_window_on_the_bundled_model(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    window = script("window")
    lm = mlmfast.load("tiny")
    prompts = window.beginnings(lm, LONG, 3)
    exact = window.generate(lm, prompts, 6)
    right = np.array([one.token_ids for one in exact])
    # Led along its own tokens, exact search chooses them; what it says of them is what a plan says.
    manner = {"cache": "none", "recompute": None, "refresh": "auto"}
    np.testing.assert_array_equal(window.choices(lm, prompts, right, **manner), right)
    ids = window.prompt_ids(lm, prompts)
    prefixes = [[*prompt, *text[:i]] for prompt, text in zip(ids, right.tolist()) for i in range(6)]
    found = window.logprobs(lm, prefixes, right.reshape(-1).tolist())
    np.testing.assert_allclose(found, np.concatenate([one.logprobs for one in exact]), atol=1e-4)
    # Led along other tokens, it still chooses for itself.
    other = right.copy()
    other[:, 0] = right[:, 0] + 1
    led = window.choices(lm, prompts, other, **manner)
    np.testing.assert_array_equal(led[:, 0], right[:, 0])
    assert (led[:, 1:] != right[:, 1:]).any()

    grid = window.measure_grid(lm, prompts, 6, [1, 100], ["never", "1"])
    rows = {(row["recompute"], row["refresh"]): row for row in grid["rows"]}
    assert set(rows) == {(1, "never"), (100, "never"), (1, "1"), (100, "1")}
    for key in ((100, "never"), (1, "1"), (100, "1")):  # each of them computes everything in every step
        assert (rows[key]["equal"], rows[key]["equal_forced"]) == (1, 1)
        assert rows[key]["logprob"] == pytest.approx(grid["logprob"], abs=1e-4)
    assert rows[1, "never"]["equal_forced"] < 1
    draft = window.measure_draft(lm, prompts, 6)
    assert (draft["different"], draft["plain_different"]) == (0, 0)
    assert draft["tokens_per_pass"] >= 1
    header = machine_header()
    result = {"run": {"model": "tiny"}, "grid": {"header": header, "source": "texts"} | grid}
    result["draft"] = {"header": header, "rows": [draft]}
    page = "\n".join(window.markdown(result, None))
    assert page.count("| never |") == 2
    assert "approximate" in page

    def wrong(*arguments: Any, **manner: Any) -> list[Any]:
        other = [SimpleNamespace(token_ids=one.token_ids.copy(), logprobs=one.logprobs) for one in exact]
        if "cache" in manner:
            other[1].token_ids[3] += 1
        return other

    monkeypatch.setattr(window, "generate", wrong)
    with pytest.raises(SystemExit, match="window over all tokens"):
        window.measure_grid(lm, prompts, 6, [1], ["never"])


def machine_header() -> dict[str, Any]:
    names = ("cpu", "threads", "load", "python", "torch", "transformers", "mlmfast", "commit", "time")
    return dict.fromkeys(names, "?")
