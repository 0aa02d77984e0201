"""lm-evaluation-harness's model ``mlmfast``, request by request, against plain loops and minicons."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlmfast.errors import RequestError

pytest.importorskip("lm_eval", reason='pip install "mlmfast[lm_eval]"')

from harness_family import Family
from lm_eval.api.instance import Instance

from mlmfast.integrations.lm_eval import MLMFastLM

FAMILIES = ["bert", "roberta", "deberta"]
HELD = 48  # tokens that the small BERT and RoBERTa hold

# What lm_eval asks, and what of it is context and what continuation.
ASKED = [
    (("The cat watches", " the small lighthouse."), ("The cat watches", " the small lighthouse.")),
    (("", " Every gardener remembers some sparrows!"), ("", "Every gardener remembers some sparrows!")),
    (("A quiet pianist  ", "follow no dogs."), ("A quiet pianist", "  follow no dogs.")),
    (("No children\n", " repaint the cat."), ("No children", "\n repaint the cat.")),
    ((" \n", " Some ☃ dogs"), ("", "Some ☃ dogs")),
    (("Is it a cat? answer:", " a"), ("Is it a cat? answer:", " a")),
]


@pytest.fixture(scope="module")
def families(
    bert_model: PreTrainedModel,
    bert_tokenizer: PreTrainedTokenizerBase,
    roberta_model: PreTrainedModel,
    roberta_tokenizer: PreTrainedTokenizerBase,
    deberta_model: PreTrainedModel,
    deberta_tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Family]:
    return {
        "bert": Family(bert_model, bert_tokenizer),
        "roberta": Family(roberta_model, roberta_tokenizer),
        "deberta": Family(deberta_model, deberta_tokenizer),
    }


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, 0) for one in arguments]


def asked(lm: MLMFastLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def assert_total(value: float, logprobs: np.ndarray, what: object = "") -> None:
    """A sum of log-probabilities, each within 1e-4 * max(1, |log-probability|)."""
    assert abs(value - logprobs.sum()) <= 1e-4 * np.maximum(1, np.abs(logprobs)).sum(), what


@pytest.mark.parametrize("metric", ["original", "within_word_l2r", "window", "global_l2r"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihood_is_the_loop(families: dict[str, Family], family: str, metric: str) -> None:
    one = families[family]
    pairs = [pair for pair, _ in ASKED]
    answers = asked(one.lm(metric=metric), [*pairs, pairs[0]])
    assert answers[-1] == answers[0]
    for (pair, scored), (value, greedy) in zip(ASKED, answers):
        truth = one.truth(*scored, metric)
        assert_total(value, truth.logprobs, pair)
        assert greedy == bool((truth.ranks == 1).all()), pair


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_first_choice_of_every_token(families: dict[str, Family], family: str) -> None:
    one = families[family]
    greedy = []
    for sentence in checkpoints.sentences(40):
        context = " ".join(sentence.split()[:3])
        row = one.truth(context, " the").rows[0]
        pair = (context, " " + one.tokenizer.decode([int(row.argmax())]).strip())
        truth = one.truth(*pair)
        if (truth.ranks == 1).all():
            greedy.append(pair)
    assert greedy
    assert all(is_greedy for _, is_greedy in asked(one.lm(), greedy))
    # A second token that is not the first choice makes the whole not greedy.
    longer = [(context, continuation + " unbelievable ☃!") for context, continuation in greedy]
    assert not any(is_greedy for _, is_greedy in asked(one.lm(), longer))


def test_reduction_temperature_and_unconditional_prompt(families: dict[str, Family]) -> None:
    one = families["roberta"]
    pairs = [pair for pair, _ in ASKED]
    means = asked(one.lm(reduction="mean", temperature=1.7), pairs)
    unconditional = asked(one.lm(unconditional_prompt="Answer: "), pairs)
    for (pair, scored), (mean, _), (value, _) in zip(ASKED, means, unconditional):
        assert mean == pytest.approx(one.truth(*scored, temperature=1.7).logprobs.mean(), rel=1e-4, abs=1e-4), pair
        kept = pair[0].rstrip()
        alone = one.truth("Answer:", " " + pair[0][len(kept) :] + pair[1]).logprobs
        truth = one.truth(*scored).logprobs
        assert_total(value, np.concatenate([truth, -alone]), pair)
    both = asked(one.lm(reduction="mean", unconditional_prompt="Answer:"), pairs)
    for (pair, scored), (value, _) in zip(ASKED, both):
        kept = pair[0].rstrip()
        alone = one.truth("Answer:", pair[0][len(kept) :] + pair[1]).logprobs
        assert value == pytest.approx(one.truth(*scored).logprobs.mean() - alone.mean(), rel=1e-4, abs=2e-4), pair


def test_wrong_arguments(families: dict[str, Family]) -> None:
    one = families["bert"]
    for wrong in ({"foo": 1}, {"max_length": 10}, {"rolling_tokens": "x"}, {"max_gen_toks": 0}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            one.lm(**wrong)


def test_a_long_context_loses_its_beginning(families: dict[str, Family], caplog: pytest.LogCaptureFixture) -> None:
    one = families["bert"]
    tokenizer, lm = one.tokenizer, one.lm()
    context, continuation = checkpoints.long_text(tokenizer, 70), " every small cat follows"
    ((value, _),) = asked(lm, [(context, continuation)])
    assert "1 of 1 contexts lost their beginnings" in caplog.text
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"][-(HELD - 2) :]
    ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
    new = len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    logprobs = []
    for place in range(HELD - 1 - new, HELD - 1):
        masked = [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]
        logprobs.append(float(one.forward(masked)[place].log_softmax(0)[ids[place]]))
    assert_total(value, np.array(logprobs))

    long = checkpoints.long_text(tokenizer, 70)
    for pair in [("", long), ("The cat", " " + long)]:
        with pytest.raises(RequestError, match="holds 48 tokens, fewer than the continuation has"):
            asked(lm, [ASKED[0][0], pair])
    with pytest.raises(RequestError, match="continuation '  ' of .* has no token"):
        asked(lm, [ASKED[0][0], ("The cat", "  ")])


def rolling_loop(one: Family, text: str, most: int, metric: str = "original") -> np.ndarray:
    """Every token in its window of ``most``, the last one reaching back; ``global_l2r`` masks all that follows."""
    tokenizer, room = one.tokenizer, most - 2
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    logprobs = []
    for i in range(len(ids)):
        first = max(0, min((i // room + 1) * room, len(ids)) - room)
        window = [tokenizer.cls_token_id, *ids[first : first + room], tokenizer.sep_token_id]
        place = i - first + 1
        stop = len(window) - 1 if metric == "global_l2r" else place + 1
        masked = [tokenizer.mask_token_id if place <= j < stop else token for j, token in enumerate(window)]
        logprobs.append(float(one.forward(masked)[place].log_softmax(0)[ids[i]]))
    return np.array(logprobs)


@pytest.mark.parametrize(
    ("family", "most", "metric"), [("bert", 512, "original"), ("roberta", 20, "global_l2r"), ("deberta", 9, "original")]
)
def test_rolling_scores_every_token_once(families: dict[str, Family], family: str, most: int, metric: str) -> None:
    one = families[family]
    lm = one.lm(rolling_tokens=most, metric=metric, reduction="mean")  # which rolling knows nothing of
    most = min(most, lm.max_length or most)
    lengths = [4, most - 1, most, most + 1, 2 * (most - 2) + 2, 3 * most + 1]
    texts = [checkpoints.long_text(one.tokenizer, max(4, n), seed=n) for n in lengths]
    texts = [*texts, "", "No ☃ sparrows.", texts[2], "  "]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]), True)
    for text, value in zip(texts, found):
        assert_total(value, rolling_loop(one, text, most, metric), text)
    assert found[6] == 0  # white space alone is a token to some tokenizers


def test_rolling_needs_room(families: dict[str, Family]) -> None:
    with pytest.raises(RequestError, match="rolling_tokens=2 holds no text beside 2"):
        families["bert"].lm(rolling_tokens=2).loglikelihood_rolling([])


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_mlm_is_minicons(families: dict[str, Family], family: str) -> None:
    pytest.importorskip("minicons", reason='pip install "mlmfast[peers]"')
    from mlmfast.bench.peers.minicons import repaired_scorer

    one = families[family]
    scorer = repaired_scorer(copy.deepcopy(one.model), one.tokenizer)
    pairs = [pair for pair, _ in ASKED if pair[0].strip() or not pair[0]]
    pairs += [("The cat", "the dog"), ("Some dogs", " [MASK]  cat"), ("The light", "house."), ("", "A")]
    for pair, (value, greedy) in zip(pairs, asked(one.lm(compatible="hf-mlm"), pairs)):
        context = pair[0] or f"{one.tokenizer.eos_token}"
        (wanted,) = scorer.conditional_score([context], [pair[1]])
        assert abs(value - wanted) <= 1e-4 * max(1, abs(wanted)), pair
        assert not greedy


def test_hf_mlm_has_its_own_metric(families: dict[str, Family]) -> None:
    one = families["bert"]
    for arguments in ({"metric": "window"}, {"reduction": "sum"}, {"unconditional_prompt": ""}, {"temperature": 2}):
        with pytest.raises(RequestError, match="hf-mlm' fixes"):
            one.lm(compatible="hf-mlm", **arguments)
    assert MLMFastLM("tiny", compatible="hf-mlm", reduction="mean", temperature=1).lm.semantics == "upstream"
    assert MLMFastLM("tiny", semantics="trained").lm.semantics == "trained"
    assert MLMFastLM("tiny").lm.semantics == "upstream"
    for arguments in ({"compatible": "hf"}, {"reduction": "max"}, {"metric": "pll"}):
        with pytest.raises(RequestError, match="not known"):
            one.lm(**arguments)
    long = checkpoints.long_text(one.tokenizer, 70)
    with pytest.raises(RequestError, match="the continuation .* has 7. tokens"):
        asked(one.lm(compatible="hf-mlm"), [("", long)])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_until_is_the_loop(families: dict[str, Family], family: str) -> None:
    one = families[family]
    prompts = [sentence[:cut] for cut in (9, 16) for sentence in checkpoints.sentences(20)]
    prompts = [prompt for prompt in prompts if len(one.generated(prompt, 8)) > 4][:3]  # some end at once
    texts = [one.generated(prompt, 8) for prompt in prompts]
    assert len(texts) == 3
    short = one.generated(prompts[0], 3)
    requests: list[tuple[str, dict[str, Any]]] = [
        (prompts[0], {"until": [], "max_gen_toks": 8}),
        (
            prompts[1],
            {"until": [texts[1][3:5]], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0, "top_p": 0.5},
        ),
        (prompts[2], {"max_new_tokens": 8}),
        (prompts[0], {"until": texts[0][2], "max_tokens": 8}),
        (prompts[0], {"until": ["", "never"], "max_gen_toks": 3}),
        (prompts[1], {"until": None}),
        (prompts[2], {"until": [texts[2][5:7], texts[2][1:3]], "max_gen_toks": 8}),  # the second comes first
        (prompts[2], {"until": "never", "stop_strings": [texts[2][3:5]], "max_gen_toks": 8}),
        (prompts[0], {"max_gen_toks": 3, "max_new_tokens": 8, "do_sample": True, "temperature": 0.0}),
    ]
    given = copy.deepcopy(requests)
    found = one.lm(max_gen_toks=8).generate_until(instances("generate_until", requests), True)
    cut = [texts[1].split(texts[1][3:5])[0], texts[0].split(texts[0][2])[0]]
    assert found[:6] == [texts[0], cut[0], texts[2], cut[1], short, texts[1]]
    assert found[6:] == [texts[2].split(texts[2][1:3])[0], texts[2].split(texts[2][3:5])[0], short]
    assert cut[0] != texts[1] and cut[1] != texts[0]
    assert requests == given  # lm_eval's cache finds them by these


def test_generate_until_makes_room_and_samples(families: dict[str, Family], caplog: pytest.LogCaptureFixture) -> None:
    one = families["bert"]
    lm = one.lm()
    prompt = checkpoints.long_text(one.tokenizer, 60)
    room = HELD - 2 - 3 - 8 + 1
    (found,) = lm.generate_until(instances("generate_until", [(prompt, {"max_gen_toks": 8})]), True)
    assert found == one.generated(prompt, 8, room)
    assert f"1 of 1 contexts lost their beginnings: {room} tokens fit" in caplog.text
    with pytest.raises(RequestError, match="max_gen_toks=256 leaves no room"):
        lm.generate_until(instances("generate_until", [(prompt, {})]), True)
    with pytest.raises(RequestError, match="max_length"):
        lm.generate_until(instances("generate_until", [("The", {"max_length": 8, "max_gen_toks": 4})]), True)
    settings = {"num_return_sequences": 2, "num_beams": 2, "max_gen_toks": 4}
    with pytest.raises(RequestError, match="num_return_sequences"):
        lm.generate_until(instances("generate_until", [("The", settings)]), True)
    drawn = instances("generate_until", [("The cat", {"temperature": 1.5, "max_gen_toks": 6})] * 4)
    torch.manual_seed(3)
    first = lm.generate_until(drawn, True)
    assert len(set(first)) > 1
    torch.manual_seed(3)
    assert lm.generate_until(drawn, True) == first


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_cut_prompt_leaves_room(families: dict[str, Family], family: str) -> None:
    """Cut inside a word, or before a space, a prompt may have more tokens than it had there."""
    lm = families[family].lm()
    tokenizer, room = lm.tokenizer, HELD - 2 - 3
    sentences = checkpoints.sentences(160)
    prompts = [" ".join(sentences[i : i + 12]) for i in range(0, 144, 2)]
    counts = []
    for prompt in prompts:
        (cut,) = lm._fitting([prompt], {"num_masks": 3, "max_new_tokens": 1})
        assert prompt.endswith(cut)
        counts.append(len(tokenizer(cut, add_special_tokens=False)["input_ids"]))
    assert max(counts) == room and min(counts) > room - 8
    found = lm.generate_until(instances("generate_until", [(prompt, {"max_gen_toks": 1}) for prompt in prompts]), True)
    assert len(found) == len(prompts)


def test_cache_keeps_what_is_answered(families: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts' sums, answers as they are returned, by the arguments that lm_eval asks with."""
    lm = families["bert"].lm(rolling_tokens=16)
    kept: list[Any] = []

    class Hook:
        def add_partial(self, attr: str, request: Any, answer: Any) -> None:
            kept.append((attr, request, answer))

    lm.set_cache_hook(Hook())
    monkeypatch.setattr(importlib.import_module(MLMFastLM.__module__), "WINDOWS", 2)
    texts = [checkpoints.long_text(lm.tokenizer, n) for n in (60, 9, 41)]
    totals = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]), True)
    assert kept == [("loglikelihood_rolling", (text,), total) for text, total in zip(texts, totals)]
    kept.clear()
    (whole,) = lm.generate_until(instances("generate_until", [("The cat", {"max_gen_toks": 6})]), True)
    settings = {"until": [whole[2:4]], "max_gen_toks": 6}
    (cut,) = lm.generate_until(instances("generate_until", [("The cat", settings)]), True)
    assert cut == whole.split(whole[2:4])[0] != whole
    assert kept[1:] == [("generate_until", ("The cat", settings), cut)]


def test_an_interruption_leaves_no_half_answer(families: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = families["bert"].lm()
    kept: list[Any] = []

    class Hook:
        def add_partial(self, attr: str, request: Any, answer: Any) -> None:
            kept.append(answer)

    lm.set_cache_hook(Hook())
    real = lm.lm.generate

    def interrupted(prompts: list[str], **options: Any) -> Any:  # as generate() answers Ctrl-C: with what there is
        return [dataclasses.replace(one, stopped="interrupted") for one in real(prompts, **options)]

    monkeypatch.setattr(lm.lm, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.generate_until(instances("generate_until", [("The cat", {"max_gen_toks": 8})]), True)
    assert not kept


def test_cache_keeps_what_was_computed_before_an_error(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = families["deberta"].lm()
    kept: dict[Any, Any] = {}

    class Hook:
        def add_partial(self, attr: str, request: Any, answer: Any) -> None:
            kept[attr, json.dumps(request)] = answer

    lm.set_cache_hook(Hook())
    module = importlib.import_module(MLMFastLM.__module__)
    monkeypatch.setattr(module, "CONTINUATIONS", 2)
    pairs = [pair for pair, _ in ASKED]
    with pytest.raises(RequestError):
        asked(lm, [*pairs[:3], ("The cat", " ")])
    assert kept == {("loglikelihood", json.dumps(pair)): one for pair, one in zip(pairs[:2], asked(lm, pairs[:2]))}


@pytest.mark.parametrize("batch_size", [1, 64, "1", "16", "auto", "auto:10", "auto:2.5"])
def test_batch_sizes_change_nothing(families: dict[str, Family], batch_size: int | str) -> None:
    one = families["bert"]
    pairs = [pair for pair, _ in ASKED[:3]]
    assert asked(one.lm(batch_size=batch_size, max_batch_size=4), pairs) == asked(one.lm(), pairs)


@pytest.mark.parametrize("batch_size", [0, -2, "0", "auto:", "auto:x", "many", 2.5])
def test_other_batch_sizes_are_refused(families: dict[str, Family], batch_size: Any) -> None:
    with pytest.raises(RequestError, match="batch_size="):
        families["bert"].lm(batch_size=batch_size)


def test_lm_evals_own_device_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert MLMFastLM("tiny", device="cuda:0").device == torch.device("cpu")
    with pytest.raises(RequestError, match="device 'gpu'"):
        MLMFastLM("tiny", device="gpu")


def test_chat_templates(families: dict[str, Family]) -> None:
    one = families["roberta"]
    tokenizer = copy.deepcopy(one.tokenizer)
    lm = MLMFastLM(one.model, tokenizer)
    messages = [{"role": "user", "content": "Who watches?"}]
    with pytest.raises(ValueError, match="chat_template"):
        lm.apply_chat_template(messages)
    tokenizer.chat_template = "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}"
    assert lm.apply_chat_template(messages) == "user: Who watches?\n"
    assert lm.chat_template(True) == tokenizer.chat_template and lm.chat_template(False) is None
    assert "/" not in lm.tokenizer_name
