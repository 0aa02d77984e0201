"""Masked-next-token prediction: what is masked is as ever, and what is read stands one position to the left."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from appending import Appending, appending, loop, own_generate
from checkpoints import TEXTS, long_text, save, sentences, small_bert, small_deberta, small_roberta
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import (
    ALL_METRICS,
    Forward,
    assert_near,
    assert_score,
    continuation_loop,
    forward_of,
    reference_loop,
)
from typer.testing import CliRunner

import mlmfast
from mlmfast import cli
from mlmfast.errors import RequestError, TextError
from mlmfast.masking import make_plan
from mlmfast.model import MaskedLM
from mlmfast.packing import unique_copies

# family -> its small model
MAKERS: dict[str, Any] = {"bert": small_bert, "roberta": small_roberta, "deberta": small_deberta}
PROMPT = "The small cat watches every lighthouse, and no gardener"
OPTIONS = [" follow", " remembers the children", " repaint a lighthouse before breakfast", " watches no children", "!"]


@dataclass(frozen=True)
class Case:
    """One family: the package's model and the truth's."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lm: MaskedLM
    forward: Forward

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Case:
        return cls(model, tokenizer, mlmfast.load(model, tokenizer, objective="mntp"), forward_of(model))

    def appending(self, **options: Any) -> Appending:
        return appending(self.model, self.tokenizer, shift=1, **options)


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    room = {} if request.param == "deberta" else {"max_position_embeddings": 120}
    return Case.of(MAKERS[request.param](len(tokenizer), **room), tokenizer)


@pytest.mark.parametrize("metric", ALL_METRICS)
def test_every_metric_is_read_to_the_left(case: Case, metric: str) -> None:
    scores = case.lm.score(TEXTS, metric=metric, ranks=True, entropies=True)
    moved = []
    for text, score in zip(TEXTS, scores):
        truth = reference_loop(case.forward, case.tokenizer, text, metric, shift=1)
        assert_score(score, truth, what=f"{metric} of {text!r}")
        assert_near(score.entropies, truth.entropies)
        assert score.ranks.tolist() == truth.ranks.tolist()
        moved.append(np.abs(reference_loop(case.forward, case.tokenizer, text, metric).logprobs - truth.logprobs))
    assert np.concatenate(moved).max() > 0.1  # the suite's own assumption: a shift that was ignored would show


@pytest.mark.parametrize("metric", ALL_METRICS)
def test_spans_and_continuations(case: Case, metric: str) -> None:
    text, span = TEXTS[0], (8, 25)
    truth = reference_loop(case.forward, case.tokenizer, text, metric, span=span, shift=1)
    assert_score(case.lm.score([text], spans=[span], metric=metric)[0], truth)
    pairs = [(PROMPT, OPTIONS[1]), ("", "A cat"), ("The", " dogs follow.")]
    for pair, score in zip(pairs, case.lm.score_continuations(pairs, metric=metric)):
        assert_score(score, continuation_loop(case.forward, case.tokenizer, *pair, metric, shift=1))


def test_a_text_does_not_depend_on_its_company(case: Case) -> None:
    """Batches of every size, copies shared between texts, texts that differ by a word."""
    texts = [*sentences(5, seed=3), "The cat follow.", "The dogs follow.", "The dogs follow.", "A"]
    for metric in ALL_METRICS:
        alone = [case.lm.score([text], metric=metric)[0].logprobs for text in texts]
        for budget in (1, 30, 77, 5000):
            lm = mlmfast.load(case.model, case.tokenizer, objective="mntp", batch_tokens=budget)
            for score, logprobs in zip(lm.score(texts, metric=metric), alone):
                assert_near(score.logprobs, logprobs, 1e-5)


def test_identical_copies_are_computed_once_whatever_is_read(case: Case) -> None:
    lm, text = case.lm, "The cat follow."
    assert unique_copies(lm.plan([text, text])) == unique_copies(lm.plan([text]))
    candidates = ["The cat follow the dogs.", "The dogs follow the dogs."]
    plain = mlmfast.load(case.model, case.tokenizer)
    assert unique_copies(lm.plan(candidates)) == unique_copies(plain.plan(candidates))


def test_ranking(case: Case) -> None:
    ranking = case.lm.rank(PROMPT, OPTIONS)
    truths = [continuation_loop(case.forward, case.tokenizer, PROMPT, o, "window", shift=1) for o in OPTIONS]
    assert_near(ranking.values, np.array([truth.logprobs.sum() for truth in truths]))


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("metric", ALL_METRICS)
def test_the_prefix_cache_of_one_layer_has_nothing_to_approximate(
    request: pytest.FixtureRequest, family: str, metric: str
) -> None:
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    case = Case.of(MAKERS[family](len(tokenizer), num_hidden_layers=1, max_position_embeddings=120), tokenizer)
    for prompt in (PROMPT, "The", ""):  # where no word comes before, CLS is read
        options = OPTIONS if prompt else [o.strip().capitalize() for o in OPTIONS]
        truths = [continuation_loop(case.forward, tokenizer, prompt, o, metric, shift=1) for o in options]
        ranking = case.lm.rank(prompt, options, metric=metric, cache="prefix")
        assert_near(ranking.values, np.array([truth.logprobs.sum() for truth in truths]), 2e-4, f"{prompt!r}")


def test_the_prefix_cache_is_exact_for_single_tokens(case: Case) -> None:
    exact, near = case.lm.rank(PROMPT, OPTIONS), case.lm.rank(PROMPT, OPTIONS, cache="prefix")
    single = [i for i, score in enumerate(exact.scores) if len(score) == 1]
    assert single and len(single) < len(OPTIONS)
    np.testing.assert_allclose(near.values[single], exact.values[single], atol=2e-4)
    few = case.lm.rank(PROMPT, OPTIONS[::-1], cache="prefix").values[::-1]
    np.testing.assert_allclose(few, near.values, atol=2e-4)


def test_distributions(case: Case) -> None:
    truths = [reference_loop(case.forward, case.tokenizer, text, "window", shift=1) for text in TEXTS]
    whole = case.lm.distributions(TEXTS, metric="window", top_k=None)
    best = case.lm.distributions(TEXTS, metric="window", top_k=4)
    for truth, all_of_it, some in zip(truths, whole, best):
        assert all_of_it.token_ids.tolist() == truth.token_ids
        assert_near(all_of_it.logprobs, truth.rows)
        assert_near(some.logprobs, -np.sort(-truth.rows)[:, :4])
        assert_near(np.take_along_axis(truth.rows, some.candidate_ids, 1), some.logprobs)


def test_filling(case: Case) -> None:
    """A mask is read at what stands before it, another mask too."""
    mask = case.tokenizer.mask_token
    text = f"{mask} cat {mask}{mask} dogs."
    ids = case.tokenizer(text)["input_ids"]
    places = [i for i, token in enumerate(ids) if token == case.tokenizer.mask_token_id]
    assert len(places) == 3 and places[2] == places[1] + 1
    rows = case.forward(ids).log_softmax(-1).numpy()
    for fill, place in zip(case.lm.fill(text, top_k=3), places):
        assert fill.position == place
        assert_near(fill.logprobs, -np.sort(-rows[place - 1])[:3])
        assert_near(rows[place - 1][fill.token_ids], fill.logprobs)


def test_plans(case: Case) -> None:
    texts = TEXTS[:2]
    plan = case.lm.plan(texts, metric="window")
    assert_near(case.lm.logprobs(plan), np.concatenate([s.logprobs for s in case.lm.score(texts, metric="window")]))
    plain = mlmfast.load(case.model, case.tokenizer)
    for lm, other in ((plain, plan), (case.lm, plain.plan(texts))):
        with pytest.raises(RequestError, match="lookback"):
            lm.logprobs(other)


@pytest.mark.parametrize(
    "options",
    [{}, {"draft": "masks"}, {"cache": "window", "recompute": 100}, {"cache": "window", "recompute": 1, "refresh": 1}],
    ids=str,
)
def test_greedy_generation_is_the_plain_loop(case: Case, options: dict[str, Any]) -> None:
    truth, moved = case.appending(), []
    prompts = [*(long_text(case.tokenizer, length, length) for length in (4, 9, 30)), "a", ""]
    for prompt, found in zip(prompts, case.lm.generate(prompts, max_new_tokens=10, eos_token_id=[], **options)):
        ids = case.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens, logprobs = loop(truth, ids, 10)
        assert found.token_ids.tolist() == tokens
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)
        moved.append(abs(logprobs[0] - loop(appending(case.model, case.tokenizer), ids, 1)[1][0]))
    assert max(moved) > 0.1  # as above


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("final", [True, False])
def test_generation_with_other_masks_and_no_final_token(case: Case, masks: int, final: bool) -> None:
    prompt = long_text(case.tokenizer, 12)
    found = case.lm.generate(
        prompt, max_new_tokens=6, num_masks=masks, final_token="auto" if final else None, eos_token_id=[]
    )
    ids = case.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert found.token_ids.tolist() == loop(case.appending(masks=masks, final=final), ids, 6)[0]


@pytest.mark.parametrize("cache", [{}, {"cache": "window", "recompute": 100}], ids=str)
def test_beams_are_those_of_transformers(case: Case, cache: dict[str, Any]) -> None:
    truth = case.appending()
    for length in (5, 33):
        prompt = long_text(case.tokenizer, length, length)
        ids = case.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        stop = sorted(set(loop(truth, ids, 6)[0]))[:2]
        expected = own_generate(
            truth, ids, pad=case.tokenizer.mask_token_id, eos_token_id=stop, max_new_tokens=8, num_beams=3
        )
        found = case.lm.generate(prompt, eos_token_id=stop, max_new_tokens=8, num_beams=3, **cache)
        generated = found.token_ids.tolist()
        assert generated == expected[0][: len(generated)]


def test_a_narrow_window_reads_the_last_token_anew(case: Case) -> None:
    """One token and the masks a step: its own logits, computed beside old ones, decide the first step exactly."""
    prompt = long_text(case.tokenizer, 20)
    near = case.lm.generate(prompt, max_new_tokens=8, eos_token_id=[], cache="window", recompute=1, refresh=None)
    exact = case.lm.generate(prompt, max_new_tokens=8, eos_token_id=[])
    assert near.token_ids[0] == exact.token_ids[0]
    np.testing.assert_allclose(near.logprobs[0], exact.logprobs[0], atol=1e-4)
    assert np.isfinite(near.logprobs).all() and not np.allclose(near.logprobs, exact.logprobs, atol=1e-4)


def test_saved_checkpoints_and_the_command_line(
    tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase, bert_model: PreTrainedModel
) -> None:
    folder = str(save(tmp_path / "bert", bert_model, bert_tokenizer))
    lm = mlmfast.load(folder, objective="mntp")
    assert_score(lm.score(TEXTS[:1])[0], reference_loop(forward_of(bert_model), bert_tokenizer, TEXTS[0], shift=1))
    options = ["--model", folder, "--device", "cpu", "--objective"]
    (tmp_path / "texts.txt").write_text(TEXTS[0] + "\n")

    def record(*arguments: str, objective: str = "mntp") -> dict[str, Any]:
        result = CliRunner().invoke(cli.app, [*arguments, *options, objective])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    for objective in ("mntp", "mlm"):
        wanted = mlmfast.load(folder, objective=objective)
        score = record("score", str(tmp_path / "texts.txt"), "--quiet", objective=objective)
        assert_near(np.array(score["logprobs"]), wanted.score(TEXTS[:1])[0].logprobs, 1e-6)
        ranking = record("rank", "The cat", *OPTIONS[:2], "--json", objective=objective)
        assert_near(np.array(ranking["values"]), wanted.rank("The cat", OPTIONS[:2]).values, 1e-6)
        generated = record("generate", "The cat", "--json", "--max-new-tokens", "5", objective=objective)
        assert generated["continuation"] == wanted.generate("The cat", max_new_tokens=5).text
    with pytest.raises(AssertionError, match="objective='causal'"):
        record("score", str(tmp_path / "texts.txt"), objective="causal")


def test_the_objective_is_said(case: Case) -> None:
    assert case.lm.objective == "mntp" and "mntp" in repr(case.lm)
    plain = mlmfast.load(case.model, case.tokenizer)
    assert plain.objective == "mlm" and "mlm" not in repr(plain).removeprefix("MaskedLM")
    with pytest.raises(RequestError, match="objective='causal' is not known; choose one of mlm, mntp"):
        mlmfast.load(case.model, case.tokenizer, objective="causal")


def test_without_a_token_before_a_text_its_first_token_is_refused(
    bert_tokenizer: PreTrainedTokenizerBase, bert_model: PreTrainedModel
) -> None:
    """In a packed batch the row before it is another text's."""
    tokenizer = copy.deepcopy(bert_tokenizer)
    sep = ("[SEP]", tokenizer.sep_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[sep])
    lm = mlmfast.load(bert_model, tokenizer, objective="mntp")
    begins = tokenizer.tokenize("The cat follow.")[0]  # a trained vocabulary, not the same in each process
    for refused in (lm.score, lm.plan, lm.distributions):
        with pytest.raises(TextError, match=rf"'{begins}'.*objective='mntp'.*special token before"):
            refused(["The cat follow."])
    good, bad = lm.score(["The cat follow.", "The dogs"], spans=[(3, None), None], on_error="return")
    assert isinstance(bad, TextError) and bad.index == 1
    truth = reference_loop(forward_of(bert_model), tokenizer, "The cat follow.", span=(3, 99), shift=1)
    assert_score(good, truth)
    with pytest.raises(TextError, match=r"\[MASK\].*mntp"):
        lm.fill("[MASK] cat")
    assert len(lm.fill("The [MASK] cat")) == 1
    with pytest.raises(TextError, match=r"empty.*mntp"):
        lm.generate("")
    found = lm.generate("The cat", max_new_tokens=4, eos_token_id=[])
    truth_model = Appending(bert_model, [], [tokenizer.mask_token_id] * 3, [tokenizer.sep_token_id], shift=1)
    ids = tokenizer("The cat", add_special_tokens=False)["input_ids"]
    assert found.token_ids.tolist() == loop(truth_model, ids, 4)[0]
    assert len(mlmfast.load(bert_model, tokenizer).score(["The cat follow."])) == 1


def test_a_plan_without_anything_to_the_left_is_refused(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = np.array(bert_tokenizer("The cat")["input_ids"])
    sequence = mlmfast.masking.TokenSequence(ids, np.zeros(len(ids), bool), np.ones(len(ids), bool))
    with pytest.raises(RequestError, match="lookback=1.*start"):
        make_plan([sequence], bert_tokenizer.mask_token_id, lookback=1)
