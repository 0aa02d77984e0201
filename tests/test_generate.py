"""Generation against a plain loop over the Hugging Face model and against transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from appending import Appending, appending, loop, own_generate
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import mlmfast
from mlmfast import decoding
from mlmfast.graphs import Graphs
from mlmfast.model import MaskedLM

FAMILIES = ["bert", "roberta", "xlm-roberta", "deberta", "deberta with a convolution"]
LONG = 400  # positions of the small models here
TOKENS = 12


@pytest.fixture(scope="module")
def every(lms: dict[str, MaskedLM], roberta_tokenizer: PreTrainedTokenizerBase) -> dict[str, MaskedLM]:
    """All families, RoBERTa's among them, whose positions count what is no padding."""
    roberta = checkpoints.small_roberta(len(roberta_tokenizer), max_position_embeddings=90)
    return {**lms, "roberta": mlmfast.load(roberta, roberta_tokenizer)}


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    tokenizers = {
        name: request.getfixturevalue(f"{name}_tokenizer") for name in ("bert", "roberta", "xlm_roberta", "deberta")
    }
    conv = {"conv_kernel_size": 3, "conv_act": "gelu", "num_hidden_layers": 3}
    makers: dict[str, Any] = {
        "bert": lambda n: checkpoints.small_bert(n, max_position_embeddings=LONG),
        "roberta": lambda n: checkpoints.small_roberta(n, max_position_embeddings=LONG),
        "xlm-roberta": lambda n: checkpoints.small_xlm_roberta(n, max_position_embeddings=LONG),
        "deberta": lambda n: checkpoints.small_deberta(n, max_relative_positions=LONG, position_buckets=32),
        "deberta with a convolution": lambda n: checkpoints.small_deberta(n, **conv),
    }
    found = {}
    for name, make in makers.items():
        tokenizer = tokenizers[name.split()[0].replace("-", "_")]
        found[name] = (make(len(tokenizer)), tokenizer)
    return found


def both(models: Any, family: str, **options: Any) -> tuple[MaskedLM, Appending]:
    model, tokenizer = models[family]
    return mlmfast.load(model, tokenizer), appending(model, tokenizer, **options)


def prompts_of(tokenizer: PreTrainedTokenizerBase, lengths: list[int]) -> list[str]:
    """Texts of so many tokens with the special ones."""
    return [checkpoints.long_text(tokenizer, length, seed) for seed, length in enumerate(lengths)]


def ids_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_plain_loop(models: Any, family: str) -> None:
    lm, truth = both(models, family)
    prompts = [*prompts_of(lm.tokenizer, [4, 9, 17, 40, 130, 302]), "a", ""]
    found = lm.generate(prompts, max_new_tokens=TOKENS, eos_token_id=[])
    assert [len(g) for g in found] == [TOKENS] * len(prompts)
    for prompt, generation in zip(prompts, found):
        tokens, logprobs = loop(truth, ids_of(lm.tokenizer, prompt), TOKENS)
        assert generation.token_ids.tolist() == tokens
        np.testing.assert_allclose(generation.logprobs, logprobs, atol=1e-4)
        assert generation.stopped == "length" and generation.passes == TOKENS


@pytest.mark.parametrize("masks", [1, 2, 4])
@pytest.mark.parametrize("final", [True, False])
def test_masks_and_the_final_token_are_arguments(models: Any, masks: int, final: bool) -> None:
    lm, truth = both(models, "deberta", masks=masks, final=final)
    (prompt,) = prompts_of(lm.tokenizer, [12])
    final_token = "[SEP]" if final else None
    generation = lm.generate(prompt, max_new_tokens=8, num_masks=masks, final_token=final_token, eos_token_id=[])
    assert generation.token_ids.tolist() == loop(truth, ids_of(lm.tokenizer, prompt), 8)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 0.4, "early_stopping": True, "num_return_sequences": 3},
        {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
        {"num_beams": 4, "repetition_penalty": 1.3, "min_new_tokens": 5},
        {"num_beams": 4, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(models: Any, family: str, options: dict[str, Any]) -> None:
    lm, truth = both(models, family)
    for prompt in prompts_of(lm.tokenizer, [5, 33]):
        ids = ids_of(lm.tokenizer, prompt)
        # A token that is likely here and there, so that hypotheses end at different lengths.
        stop = sorted(set(loop(truth, ids, 6)[0]))[:2]
        # Padding with token 0 is taken for no padding at all there.
        pad = lm.tokenizer.mask_token_id
        expected = own_generate(truth, ids, pad=pad, eos_token_id=stop, max_new_tokens=TOKENS, **options)
        found = lm.generate([prompt], eos_token_id=stop, max_new_tokens=TOKENS, **options)
        assert len(found) == len(expected)
        for generation, row in zip(found, expected):
            generated = generation.token_ids.tolist()
            assert generated == row[: len(generated)]
            assert set(row[len(generated) :]) <= {pad}
            assert generation.stopped == ("token" if generated[-1] in stop else "length")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.9, "top_k": 0, "repetition_penalty": 1.2},
        {"min_p": 0.02, "top_k": 0, "typical_p": 0.9},
    ],
    ids=str,
)
def test_samples_are_those_of_transformers(models: Any, family: str, options: dict[str, Any]) -> None:
    lm, truth = both(models, family)
    for seed, prompt in enumerate(prompts_of(lm.tokenizer, [6, 50])):
        torch.manual_seed(seed)
        (expected,) = own_generate(
            truth,
            ids_of(lm.tokenizer, prompt),
            pad=lm.tokenizer.pad_token_id,
            do_sample=True,
            max_new_tokens=TOKENS,
            **options,
        )
        generation = lm.generate(prompt, do_sample=True, seed=seed, max_new_tokens=TOKENS, eos_token_id=[], **options)
        assert generation.token_ids.tolist() == expected


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9},
        {"suppress_tokens": [7, 8, 9, 10]},
        {"begin_suppress_tokens": list(range(5, 60))},
        {"bad_words_ids": [[20], [21, 22]]},
        {"exponential_decay_length_penalty": (3, 1.5)},
    ],
    ids=str,
)
def test_controls_are_those_of_transformers(models: Any, options: dict[str, Any]) -> None:
    lm, truth = both(models, "deberta")
    for prompt in prompts_of(lm.tokenizer, [7, 21]):
        ids = ids_of(lm.tokenizer, prompt)
        stop = loop(truth, ids, 5)[0][-1]
        (expected,) = own_generate(
            truth, ids, pad=lm.tokenizer.pad_token_id, eos_token_id=stop, max_new_tokens=TOKENS, **options
        )
        generation = lm.generate(prompt, max_new_tokens=TOKENS, eos_token_id=stop, **options)
        assert generation.token_ids.tolist() == expected


def test_a_config_and_objects_of_transformers_are_taken(models: Any) -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            only = torch.full_like(scores, -torch.inf)
            only[:, 30:40] = scores[:, 30:40]
            return only

    lm, truth = both(models, "bert")
    (prompt,) = prompts_of(lm.tokenizer, [9])
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.1, eos_token_id=[])
    found = lm.generate(prompt, generation_config=config, logits_processor=[Only()])
    expected = own_generate(
        truth,
        ids_of(lm.tokenizer, prompt),
        pad=0,
        max_new_tokens=7,
        repetition_penalty=1.1,
        logits_processor=[Only()],
    )
    assert [found.token_ids.tolist()] == expected
    assert all(30 <= token < 40 for token in found.token_ids)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta, all of it"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}, {"min_new_tokens": 6}], ids=str)
def test_drafts_change_nothing_but_the_passes(every: dict[str, MaskedLM], name: str, options: dict[str, Any]) -> None:
    lm = every[name]
    prompts = checkpoints.sentences(20, seed=4)
    plain = lm.generate(prompts, max_new_tokens=10, num_masks=4, **options)
    drafted = lm.generate(prompts, max_new_tokens=10, num_masks=4, draft="masks", **options)
    assert [g.token_ids.tolist() for g in drafted] == [g.token_ids.tolist() for g in plain]
    assert [g.stopped for g in drafted] == [g.stopped for g in plain]
    assert sum(g.passes for g in drafted) < sum(g.passes for g in plain)
    for one, other in zip(drafted, plain):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta, all of it"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5}, {"repetition_penalty": 1.2}], ids=str
)
def test_a_window_over_everything_is_exact(every: dict[str, MaskedLM], name: str, options: dict[str, Any]) -> None:
    lm = every[name]
    prompts = [*checkpoints.sentences(6, seed=8), "a", ""]
    exact = lm.generate(prompts, max_new_tokens=10, **options)
    for refresh, recompute in [(None, 1000), (1, 1)]:
        window = lm.generate(
            prompts, max_new_tokens=10, cache="window", recompute=recompute, refresh=refresh, **options
        )
        assert [g.token_ids.tolist() for g in window] == [g.token_ids.tolist() for g in exact]
        for one, other in zip(window, exact):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
            assert one.cache == "window" and "approximate" in repr(one) and other.cache == "none"


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta, all of it"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_window_does_not_depend_on_company(
    every: dict[str, MaskedLM], name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = every[name]
    prompts = [*checkpoints.sentences(9, seed=3), "a"]
    settings: dict[str, Any] = {"max_new_tokens": 9, "cache": "window", "recompute": 2, "refresh": 4} | options
    # A token that comes here and there ends texts at different steps, so that slots change hands midway.
    first = lm.generate(prompts, **settings, eos_token_id=[])
    settings["eos_token_id"] = [int(first[0].token_ids[-1]), int(first[1].token_ids[2])]
    together = lm.generate(prompts, **settings)
    assert len({len(g) for g in together}) > 1
    alone = [lm.generate(prompt, **settings) for prompt in prompts]
    assert [g.token_ids.tolist() for g in together] == [g.token_ids.tolist() for g in alone]
    # Fewer slots than prompts: those that wait take over slots that others have used.
    monkeypatch.setattr("mlmfast.decoding.CONTINUATIONS", 3)
    monkeypatch.setattr(lm, "_batch_tokens", 20)
    few = lm.generate(prompts, **settings)
    assert [g.token_ids.tolist() for g in few] == [g.token_ids.tolist() for g in together]


@pytest.mark.parametrize("name", ["bert", "deberta", "deberta, all of it"])
def test_a_windows_steps_are_recorded_once_a_bucket(
    lms: dict[str, MaskedLM], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for CUDA graphs: steps are replayed over the same cache, and the tokens stay what they were."""
    counts = {"recorded": 0, "replayed": 0}

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        output = compute()  # as before a capture
        counts["recorded"] += 1

        def replay() -> Tensor:
            counts["replayed"] += 1
            return output.copy_(compute())

        return replay

    class Recorded(Graphs[Any]):
        def __init__(self, compute: Any) -> None:
            super().__init__(compute, lambda device: record)

    lm = lms[name]
    prompts = checkpoints.sentences(3, seed=6)
    settings: dict[str, Any] = {"max_new_tokens": 24, "cache": "window", "recompute": 3, "refresh": None}
    settings["eos_token_id"] = []
    plain = lm.generate(prompts, **settings)
    steps = decoding.WindowSteps
    monkeypatch.setattr("mlmfast.generation.WindowSteps", lambda *a, **o: steps(*a, **{**o, "record": True}))
    monkeypatch.setattr(decoding, "Graphs", Recorded)
    found = lm.generate(prompts, **settings)
    assert [g.token_ids.tolist() for g in found] == [g.token_ids.tolist() for g in plain]
    # 24 steps of 13 to 45 rows: the first computes everything, the others fall into one bucket of 64 keys or are full.
    assert counts["recorded"] == 1 and counts["replayed"] == 24 - 1 - 2


def test_a_narrow_window_is_approximate(lms: dict[str, MaskedLM]) -> None:
    """It would not be worth a name of its own, and the tests above could not fail, if it were always the same."""
    lm = lms["deberta"]
    prompts = checkpoints.sentences(20, seed=8)
    exact = lm.generate(prompts, max_new_tokens=10)
    window = lm.generate(prompts, max_new_tokens=10, cache="window", recompute=1, refresh=None)
    assert [g.token_ids.tolist() for g in window] != [g.token_ids.tolist() for g in exact]


def test_what_contradicts_itself_is_said(lms: dict[str, MaskedLM]) -> None:
    lm = lms["deberta"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_masks": 0}, "num_masks=0 predicts nothing"),
        ({"num_beams": 2, "do_sample": True}, "beam search does not sample"),
        ({"num_return_sequences": 2}, "would be the same"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": 40}, "min_new_tokens=40 is more than max_new_tokens=32"),
        ({"cache": "prefix"}, "cache='prefix' is not known"),
        ({"recompute": 4}, "belong to cache='window'"),
        ({"refresh": None}, "belong to cache='window'"),
        ({"cache": "window", "recompute": 0}, "recompute=0"),
        ({"cache": "window", "refresh": 0}, "refresh=0"),
        ({"draft": "model"}, "draft='model' is not known"),
        ({"draft": "masks", "num_masks": 1}, "masks after the first"),
        ({"draft": "masks", "num_beams": 2}, "for greedy search"),
        ({"draft": "masks", "cache": "window"}, "exact passes"),
        ({"final_token": "[NOPE]"}, "'[NOPE]' is no token"),
        ({"max_tokens": 4}, "does not know max_tokens"),
        ({"generation_config": GenerationConfig(num_beam_groups=2)}, "num_beam_groups=2"),
        ({"streamer": object(), "num_beams": 2}, "without beams"),
        ({"generation_config": GenerationConfig(max_length=9)}, "max_length=9; pass max_new_tokens"),
        ({"temperature": 0.7}, "temperature=0.7 is for sampling"),
        ({"temperature": 0.0, "do_sample": True}, "temperature=0.0 is not a number above 0"),
        ({"top_p": 1.5, "do_sample": True}, "top_p=1.5 is not a number above 0 up to 1"),
        ({"top_k": -1, "do_sample": True}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"early_stopping": "sometimes", "num_beams": 2}, "early_stopping='sometimes'"),
        ({"bad_words_ids": [[-1]]}, "transformers refuses these settings"),
        ({"final_token": 999_999}, "outside the vocabulary"),
        ({"final_token": -1}, "outside the vocabulary"),
        ({"seed": [1, 2], "do_sample": True}, "2 seeds were given for 1 prompts"),
    ]
    for options, message in cases:
        with pytest.raises(mlmfast.RequestError) as error:
            lm.generate("the cat", **options)
        assert message in str(error.value)
    with pytest.raises(mlmfast.RequestError, match="one string"):
        lm.stream(["the cat"])  # type: ignore[arg-type]
    with pytest.raises(mlmfast.TextError, match="text 1 is a int"):
        lm.generate(["the cat", 3])  # type: ignore[list-item]


def test_absolute_positions_bound_what_fits(models: Any, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    lm = mlmfast.load(checkpoints.small_bert(len(bert_tokenizer)), bert_tokenizer)  # 48 tokens
    full, almost = prompts_of(bert_tokenizer, [46, 42])  # with [CLS] and [SEP]; three masks come on top
    with pytest.raises(mlmfast.TextError, match="text 1 has 44 tokens, which leaves no room"):
        lm.generate(["the cat", full])
    generation = lm.generate(almost, max_new_tokens=9, eos_token_id=[])
    assert (generation.stopped, len(generation)) == ("room", 4)  # 42 + 3 masks + 3 tokens = 48, and one more is read
    assert lm.generate(almost, max_new_tokens=4, eos_token_id=[]).stopped == "length"
    drafted = lm.generate(almost, max_new_tokens=9, eos_token_id=[], draft="masks")
    assert drafted.token_ids.tolist() == generation.token_ids.tolist()
    window = lm.generate(almost, max_new_tokens=9, eos_token_id=[], cache="window", recompute=100)
    assert window.token_ids.tolist() == generation.token_ids.tolist()


@pytest.mark.parametrize("options", [{}, {"cache": "window"}, {"num_beams": 3}], ids=str)
def test_control_c_returns_what_there_is(
    lms: dict[str, MaskedLM], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["deberta"]
    prompts = checkpoints.sentences(3, seed=1)
    whole = lm.generate(prompts, max_new_tokens=8, eos_token_id=[], **options)
    steps = 0

    def interrupted(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return real(*given)

    real = decoding.found_in
    monkeypatch.setattr("mlmfast.decoding.found_in", interrupted)
    found = lm.generate(prompts, max_new_tokens=8, eos_token_id=[], **options)
    assert [g.stopped for g in found] == ["interrupted"] * 3 and [len(g) for g in found] == [5] * 3
    if "num_beams" not in options:
        assert all(g.token_ids.tolist() == w.token_ids[:5].tolist() for g, w in zip(found, whole))


def test_streams(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for family in ("bert", "roberta", "deberta"):
        lm, _ = both(models, family)
        (prompt,) = prompts_of(lm.tokenizer, [9])
        for options in ({}, {"draft": "masks"}, {"do_sample": True, "seed": 3}):
            generation = lm.generate(prompt, max_new_tokens=9, **options)
            assert "".join(lm.stream(prompt, max_new_tokens=9, **options)) == generation.text
            assert str(generation) == prompt + generation.text
        lm.generate(prompt, max_new_tokens=9, eos_token_id=[], streamer=TextStreamer(lm.tokenizer, skip_prompt=True))
        expected = lm.tokenizer.decode(lm.generate(prompt, max_new_tokens=9, eos_token_id=[]).token_ids)
        assert capsys.readouterr().out.split() == expected.split()


def test_a_stream_leaves_no_trace_in_the_callers_state(lms: dict[str, MaskedLM]) -> None:
    stream = lms["bert"].stream("the cat", max_new_tokens=4)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    next(stream)
    stream.close()
    assert not torch.is_inference_mode_enabled()


def test_stop_strings_and_time(models: Any) -> None:
    lm, _ = both(models, "roberta")
    (prompt,) = prompts_of(lm.tokenizer, [9])
    whole = lm.generate(prompt, max_new_tokens=12, eos_token_id=[])
    piece = whole.text[4:6]
    found = lm.generate(prompt, max_new_tokens=12, eos_token_id=[], stop_strings=[piece])
    assert found.stopped == "criterion"
    assert piece in found.text and whole.text.startswith(found.text) and len(found) < len(whole)
    assert lm.generate(prompt, max_new_tokens=12, eos_token_id=[], max_time=0.0).stopped == "criterion"


def test_a_sample_depends_on_its_seed_and_place_alone(lms: dict[str, MaskedLM]) -> None:
    lm = lms["bert"]
    prompts = checkpoints.sentences(4, seed=2)
    settings: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "top_k": 0, "temperature": 4.0}
    together = lm.generate(prompts, seed=7, **settings)
    again = lm.generate([prompts[0], "a", prompts[2], ""], seed=7, **settings)
    for place in (0, 2):
        assert together[place].token_ids.tolist() == again[place].token_ids.tolist()
    several = lm.generate(prompts[0], seed=7, num_return_sequences=3, **settings)
    assert len({tuple(g.token_ids.tolist()) for g in several}) == 3
    assert several[0].token_ids.tolist() == together[0].token_ids.tolist()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    lm.generate(prompts[0], seed=7, **settings)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_result_prints_well(lms: dict[str, MaskedLM]) -> None:
    generation = lms["bert"].generate("the cat", max_new_tokens=5, eos_token_id=[])
    assert len(generation) == 5 == len(generation.tokens) == len(generation.logprobs)
    assert repr(generation).startswith("Generation('the cat' -> ") and "stopped='length'" in repr(generation)
    assert generation.total == pytest.approx(float(generation.logprobs.sum()), abs=1e-5)


def test_tiny_is_the_plain_loop_and_drafts_agree() -> None:
    lm = mlmfast.load("tiny")
    truth = appending(lm.model, lm.tokenizer)
    for prompt in ("The old man went to", "Once upon a time there was a little girl who"):
        tokens, _ = loop(truth, ids_of(lm.tokenizer, prompt), 10)
        for options in ({}, {"draft": "masks"}, {"cache": "window", "recompute": 99}):
            found = lm.generate(prompt, max_new_tokens=10, eos_token_id=[], **options)
            assert found.token_ids.tolist() == tokens


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_beams_of_mixed_lengths_are_those_of_each_prompt_in_transformers(models: Any, family: str) -> None:
    lm, truth = both(models, family)
    prompts = [*prompts_of(lm.tokenizer, [4, 90, 11, 302, 33]), "a"]
    stop = sorted(set(loop(truth, ids_of(lm.tokenizer, prompts[2]), 6)[0]))[:2]
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": stop}
    found = lm.generate(prompts, num_return_sequences=2, **options)
    assert len(found) == 2 * len(prompts)
    pad = lm.tokenizer.mask_token_id
    for i, prompt in enumerate(prompts):
        expected = own_generate(truth, ids_of(lm.tokenizer, prompt), pad=pad, num_return_sequences=2, **options)
        for generation, row in zip(found[2 * i : 2 * i + 2], expected):
            generated = generation.token_ids.tolist()
            assert generated == row[: len(generated)] and set(row[len(generated) :]) <= {pad}


def test_tiny_searches_as_transformers() -> None:
    lm = mlmfast.load("tiny")
    truth = appending(lm.model, lm.tokenizer)
    pad = lm.tokenizer.mask_token_id
    for seed, prompt in enumerate(("The old man went to", "It was a cold day, and the children")):
        ids = ids_of(lm.tokenizer, prompt)
        (expected,) = own_generate(truth, ids, pad=pad, num_beams=4, max_new_tokens=8)
        assert lm.generate(prompt, num_beams=4, max_new_tokens=8, eos_token_id=[]).token_ids.tolist() == expected
        torch.manual_seed(seed)
        (expected,) = own_generate(truth, ids, pad=pad, do_sample=True, max_new_tokens=8, top_p=0.9, top_k=40)
        sample: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 40, "seed": seed}
        assert lm.generate(prompt, max_new_tokens=8, eos_token_id=[], **sample).token_ids.tolist() == expected


def test_a_stop_token_within_a_draft_ends_it() -> None:
    lm = mlmfast.load("tiny")
    prompt = "The old man went to the"
    whole = lm.generate(prompt, max_new_tokens=24, eos_token_id=[], draft="masks")
    assert whole.passes < 24
    for stop in dict.fromkeys(whole.token_ids.tolist()):
        plain = lm.generate(prompt, max_new_tokens=24, eos_token_id=stop)
        drafted = lm.generate(prompt, max_new_tokens=24, eos_token_id=stop, draft="masks")
        assert drafted.token_ids.tolist() == plain.token_ids.tolist() and drafted.stopped == "token"


def test_what_has_no_room_stands_in_its_place(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    lm = mlmfast.load(checkpoints.small_bert(len(bert_tokenizer)), bert_tokenizer)  # 48 tokens
    (full,) = prompts_of(bert_tokenizer, [46])
    found = lm.generate(["the cat", full, "a"], max_new_tokens=3, on_error="return")
    assert [type(one).__name__ for one in found] == ["Generation", "TextError", "Generation"]
    assert lm.generate("a", max_new_tokens=3).token_ids.tolist() == found[2].token_ids.tolist()
    assert [one.index for one in lm.generate([full, full], on_error="return")] == [0, 1]
    several = lm.generate([full, "a"], on_error="return", num_beams=2, num_return_sequences=2, max_new_tokens=3)
    assert [type(one).__name__ for one in several] == ["TextError"] * 2 + ["Generation"] * 2
    with pytest.raises(mlmfast.TextError, match="leaves no room"):
        lm.stream(full, on_error="return")


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True}, {"cache": "window"}, {"draft": "masks"}], ids=str
)
def test_numbers_that_are_none_are_said(bert_tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    model = checkpoints.small_bert(len(bert_tokenizer))
    lm = mlmfast.load(model, bert_tokenizer)
    lm.generate("the cat", max_new_tokens=3, **options)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias.fill_(torch.nan)
    lm.refresh()
    with pytest.raises(mlmfast.TextError, match="NaN or infinite"):
        lm.generate("the cat", max_new_tokens=3, **options)
    (error,) = lm.generate(["the cat"], max_new_tokens=3, on_error="return", **options)
    assert isinstance(error, mlmfast.TextError)


def test_new_weights_generate_anew(deberta_tokenizer: PreTrainedTokenizerBase) -> None:
    model = checkpoints.small_deberta(len(deberta_tokenizer))
    lm = mlmfast.load(model, deberta_tokenizer)
    before = lm.generate("the cat", max_new_tokens=6, eos_token_id=[])
    checkpoints.perturb(model, seed=5)
    after = lm.generate("the cat", max_new_tokens=6, eos_token_id=[])
    fresh = mlmfast.load(checkpoints.small_deberta(len(deberta_tokenizer), seed=5), deberta_tokenizer)
    assert after.token_ids.tolist() == fresh.generate("the cat", max_new_tokens=6, eos_token_id=[]).token_ids.tolist()
    assert after.token_ids.tolist() != before.token_ids.tolist()


def test_a_window_that_runs_out_of_memory_goes_on_with_half(
    lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["deberta, all of it"]
    prompts = checkpoints.sentences(7, seed=9)
    settings: dict[str, Any] = {"max_new_tokens": 6, "cache": "window", "recompute": 2, "refresh": 4}
    right = lm.generate(prompts, **settings)
    step, failures = decoding.mask_append_step, 0

    def small_memory(spec: Any, batch: Any, mask_token_id: int, cache: Any) -> Any:
        nonlocal failures
        found = step(spec, batch, mask_token_id, cache)  # what it wrote before it failed is there
        if batch.tokens > 30 and batch.copies > 3:
            failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(decoding, "mask_append_step", small_memory)
    assert [g.token_ids.tolist() for g in lm.generate(prompts, **settings)] == [g.token_ids.tolist() for g in right]
    assert failures > 6

    def no_memory(*given: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(decoding, "mask_append_step", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        lm.generate(prompts, **settings)


def test_control_c_before_the_first_step(lms: dict[str, MaskedLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlmfast.generation.Generating._steps", interrupted)
    for options in ({}, {"num_beams": 3}):
        (found,) = lms["bert"].generate(["the cat"], **options)
        assert (found.stopped, len(found), found.text, found.passes) == ("interrupted", 0, "", 0)


def test_greedy_search_leaves_the_random_state_alone(lms: dict[str, MaskedLM]) -> None:
    state = torch.get_rng_state()
    lms["bert"].generate("the cat", max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_streamer_hears_of_the_end_whatever_ends_it(lms: dict[str, MaskedLM]) -> None:
    class Gone:
        ended = 0

        def put(self, tokens: Tensor) -> None:
            if tokens.numel() == 1:  # the prompt comes first
                raise OSError("the reader is gone")

        def end(self) -> None:
            self.ended += 1

    heard = Gone()
    with pytest.raises(OSError, match="gone"):
        lms["bert"].generate("the cat watches", streamer=heard)
    assert heard.ended == 1
