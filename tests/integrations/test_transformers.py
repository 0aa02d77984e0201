"""Models of transformers that run on mlmfast's ops: what they return is what their own code returns."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import (
    TEXTS,
    bert_tokenizer,
    deberta_tokenizer,
    long_text,
    perturb,
    roberta_tokenizer,
    sentences,
    small_bert,
    small_deberta,
    small_roberta,
)
from families import FAMILIES, HOLDS
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near

import mlmfast
from mlmfast import backends
from mlmfast.errors import BackendError, RequestError, UnsupportedModelError
from mlmfast.integrations import transformers as integration
from mlmfast.padded import Padded

# A checkout without a compiled extension has no kernels here; the ops are the same.
KERNELS = all(service.backend != "reference" for service in backends.report())
BACKEND = "auto" if KERNELS else "reference"

STATES = 3e-5  # float32 rounding of states about as large as 1


def conv_deberta(vocab_size: int) -> PreTrainedModel:
    return small_deberta(vocab_size, conv_kernel_size=3, conv_act="gelu", num_hidden_layers=3)


def wide_albert(vocab_size: int) -> PreTrainedModel:
    return FAMILIES["albert"].small(vocab_size, inner_group_num=2, num_hidden_groups=2, embedding_size=20)


def absolute_esm(vocab_size: int) -> PreTrainedModel:
    return FAMILIES["esm"].small(
        vocab_size, position_embedding_type="absolute", emb_layer_norm_before=True, max_position_embeddings=HOLDS + 1
    )


MADE: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], Callable[[int], PreTrainedModel]]] = {
    "bert": (bert_tokenizer, small_bert),
    "roberta": (roberta_tokenizer, small_roberta),
    "deberta-v2": (deberta_tokenizer, small_deberta),
    "deberta-v2 with a convolution": (deberta_tokenizer, conv_deberta),
    "albert with groups": (FAMILIES["albert"].tokenizer, wide_albert),
    "esm with absolute positions": (bert_tokenizer, absolute_esm),
    **{name: (made.tokenizer, made.small) for name, made in FAMILIES.items()},
}


@pytest.fixture(scope="module", params=MADE)
def made(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    make_tokenizer, make_model = MADE[request.param]
    tokenizer = make_tokenizer()
    return tokenizer, make_model(len(tokenizer))


@pytest.fixture
def model(bert_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return small_bert(len(bert_tokenizer))


def accelerated(model: nn.Module) -> Any:
    return mlmfast.accelerate(model, backend=BACKEND)


def batch(tokenizer: PreTrainedTokenizerBase, side: str = "right", lengths: tuple[int, ...] = (HOLDS, 9)) -> Any:
    """Texts of several lengths, masks in some."""
    texts = [*TEXTS, *(long_text(tokenizer, length) for length in lengths)]
    found = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    for line, every in ((0, 3), (1, 2), (4, 7)):
        cells = mask[line].nonzero()[1:-1:every, 0]
        ids[line, cells] = tokenizer.mask_token_id
    return found


def logprobs(logits: Tensor) -> np.ndarray:
    return logits.log_softmax(-1).numpy()


def assert_same(got: Any, wanted: Any, mask: Tensor) -> None:
    """Everything that a model returned, at attended positions; and no more or less, of the same class."""
    assert type(got) is type(wanted)
    if not isinstance(wanted, tuple):
        assert list(got) == list(wanted)
        got, wanted = tuple(got.values()), tuple(wanted.values())
    assert len(got) == len(wanted)
    for mine, original in zip(got, wanted):
        if isinstance(original, tuple):
            assert_same(mine, original, mask)
        elif original is None:
            assert mine is None
        elif original.shape[:2] == mask.shape:
            assert mine.dtype == original.dtype
            assert_near(mine[mask.bool()].numpy(), original[mask.bool()].numpy(), STATES * 3)
        else:
            assert_near(mine.numpy(), original.numpy(), STATES * 3)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_every_state_is_the_originals(made: tuple[PreTrainedTokenizerBase, PreTrainedModel], side: str) -> None:
    tokenizer, model = made
    given = batch(tokenizer, side)
    wanted = model(**given, output_hidden_states=True)
    with accelerated(model) as handle:
        got = model(**given, output_hidden_states=True)
    assert (handle.served, handle.passed) == (1, 0), handle
    mask = given["attention_mask"].bool()
    assert_near(logprobs(got.logits[mask]), logprobs(wanted.logits[mask]), 1e-4)
    assert len(got.hidden_states) == len(wanted.hidden_states)
    for mine, original in zip(got.hidden_states, wanted.hidden_states):
        assert mine.shape == original.shape
        assert_near(mine[mask].numpy(), original[mask].numpy(), STATES)
        assert not mine[~mask].any()


@torch.no_grad()
def test_every_length_alone(made: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> None:
    tokenizer, model = made
    generator = torch.Generator().manual_seed(0)
    every = [torch.randint(5, len(tokenizer), (1, length), generator=generator) for length in range(1, HOLDS + 1)]
    wanted = [model(input_ids=ids).logits for ids in every]
    with accelerated(model) as handle:
        for ids, original in zip(every, wanted):
            assert_near(logprobs(model(ids).logits), logprobs(original), 1e-4)
            mask = torch.ones_like(ids)
            assert_near(logprobs(model(ids, attention_mask=mask).logits), logprobs(original), 1e-4)
    assert (handle.served, handle.passed) == (2 * HOLDS, 0), handle


@torch.no_grad()
def test_padding_without_a_mask_is_text(made: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> None:
    tokenizer, model = made
    ids = batch(tokenizer)["input_ids"]
    wanted = model(ids).logits
    with accelerated(model) as handle:
        assert_near(logprobs(model(ids).logits), logprobs(wanted), 1e-4)
    assert handle.served == 1


@torch.no_grad()
def test_what_is_returned_has_the_originals_form(made: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> None:
    """Tuples or objects, with all states or without, by argument or by config, with a head and alone."""
    tokenizer, model = made
    given = batch(tokenizer)
    config = model.config
    settings = [(bool(i & 1), bool(i & 2)) for i in range(4)]
    for subject in (model, model.base_model):
        for options in [{}, *({"return_dict": a, "output_hidden_states": b} for a, b in settings)]:
            wanted = subject(**given, **options)
            with accelerated(subject) as handle:
                assert_same(subject(**given, **options), wanted, given["attention_mask"])
            assert handle.served == 1, (options, handle)
    with accelerated(model.base_model) as handle:
        for config.return_dict, config.output_hidden_states in settings:
            got = model.base_model(**given)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(handle._forwards[0], "handles", [])
                assert_same(got, model.base_model(**given), given["attention_mask"])
    config.return_dict, config.output_hidden_states = True, False
    assert handle.served == len(settings)


@torch.no_grad()
def test_encoders_with_poolers_and_other_heads(made: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> None:
    tokenizer, masked = made
    given = batch(tokenizer)
    config = masked.config
    types = [type(masked.base_model)]
    for kind in ("SequenceClassification", "TokenClassification"):
        mapping = getattr(transformers, f"AutoModelFor{kind}")._model_mapping
        types += [mapping[type(config)]] if type(config) in mapping else []
    for kind in types:
        model = perturb(kind(copy.deepcopy(config)))
        wanted = model(**given)
        with accelerated(model) as handle:
            assert_same(model(**given), wanted, given["attention_mask"])
            assert (handle.served, handle.passed) == (1, 0), handle
            # A head may read the first column, whatever stands there.
            left = batch(tokenizer, "left")
            got = model(**left)
        assert "first column" in str(handle.reason)
        assert torch.equal(got[0], model(**left)[0])


@torch.no_grad()
def test_large_batches_are_computed_in_parts(
    made: tuple[PreTrainedTokenizerBase, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = made
    given = batch(tokenizer, "left", (9, 9, 11, 5, HOLDS))
    given["attention_mask"][2] = 0  # nobody reads this line
    wanted = model(**given).logits
    parts = []
    batches = Padded.batches

    def counted(self: Padded, *arguments: Any) -> Iterator[Any]:
        for part in batches(self, *arguments):
            parts.append(part.tokens)
            yield part

    monkeypatch.setattr(Padded, "batches", counted)
    monkeypatch.setattr(integration, "usual_batch_tokens", lambda *_: 20)
    with accelerated(model):
        got = model(**given).logits
    mask = given["attention_mask"].bool()
    assert_near(logprobs(got[mask]), logprobs(wanted[mask]), 1e-4)
    assert len(parts) > 3 and max(parts) == HOLDS and sum(parts) == int(mask.sum())


@pytest.mark.parametrize("family", ["bert", "electra", "albert", "rembert", "ernie", "deberta", "deberta-v2"])
@torch.no_grad()
def test_token_types(family: str) -> None:
    make_tokenizer, make_model = MADE[family]
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    given = tokenizer(TEXTS, TEXTS[::-1], padding=True, return_tensors="pt")
    given["token_type_ids"] = (torch.arange(given["input_ids"].shape[1]) % 5 > 2).expand_as(given["input_ids"]).long()
    wanted = model(**given, output_hidden_states=True)
    with accelerated(model) as handle:
        assert_same(model(**given, output_hidden_states=True), wanted, given["attention_mask"])
        assert handle.served == 1, handle
        if family != "deberta-v2":  # which has no types and reads none
            with pytest.raises(IndexError):
                model(**given | {"token_type_ids": 2 + given["token_type_ids"]})


def test_masked_copies_of_a_protein_have_each_their_own_scale() -> None:
    """Token dropout counts masks and length of each line for itself, wherever its padding is."""
    tokenizer, model = bert_tokenizer(), FAMILIES["esm"].small(120)
    ids = tokenizer(long_text(tokenizer, 20), return_tensors="pt")["input_ids"].repeat(4, 1)
    for line in range(4):
        ids[line, 1 : 1 + 2 * line] = tokenizer.mask_token_id
    mask = torch.ones_like(ids)
    mask[1, -3:], mask[3, :2] = 0, 0  # masks where no token is seen are counted, too
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        with accelerated(model) as handle:
            got = model(ids, attention_mask=mask).logits
    assert handle.served == 1
    assert_near(logprobs(got[mask.bool()]), logprobs(wanted[mask.bool()]), 1e-4)


def in_training(model: PreTrainedModel, given: dict[str, Any]) -> None:
    model.bert.encoder.layer[1].train()


def with_position_ids(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["position_ids"] = torch.arange(given["input_ids"].shape[1]).flip(0)[None]


def with_embeddings(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))


def with_attentions(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["output_attentions"] = True


def with_attentions_by_config(model: PreTrainedModel, given: dict[str, Any]) -> None:
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


def with_some_layers(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["output_hidden_states"] = [1]


def with_pairs_masked(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["attention_mask"] = given["attention_mask"][:, None, None].bool().expand(-1, 1, HOLDS, -1)


def with_holes(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["attention_mask"][0, 3] = 0


def with_a_causal_mask(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["is_causal"] = True


def with_a_hook_inside(model: PreTrainedModel, given: dict[str, Any]) -> None:
    model.bert.encoder.layer[0].register_forward_hook(lambda module, given, output: output + 0.5)


def with_an_adapter(model: PreTrainedModel, given: dict[str, Any]) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    model.bert.encoder.layer[0].attention.self.query.__class__ = Adapter


def with_an_unknown_activation(model: PreTrainedModel, given: dict[str, Any]) -> None:
    model.config.hidden_act = "silu"


def with_an_attention_of_ones_own(model: PreTrainedModel, given: dict[str, Any]) -> None:
    def attend(*arguments: Any, **options: Any) -> Any:
        mixed, weights = sdpa(*arguments, **options)
        return mixed * 2, weights

    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    transformers.AttentionInterface.register("doubled", attend)
    AttentionMaskInterface.register("doubled", sdpa_mask)
    model.set_attn_implementation("doubled")


def in_another_dtype(model: PreTrainedModel, given: dict[str, Any]) -> None:
    model.double()


PASSED = {
    in_training: "training mode",
    with_position_ids: "position_ids is given",
    with_embeddings: "inputs_embeds is given",
    with_attentions: "output_attentions is given",
    with_attentions_by_config: "config.output_attentions",
    with_some_layers: "output_hidden_states is given",
    with_pairs_masked: "not of the shape",
    with_holes: "holes",
    with_a_causal_mask: "is_causal is given",
    with_a_hook_inside: "has a hook",
    with_an_adapter: "has a forward",
    with_an_unknown_activation: "hidden_act",
    with_an_attention_of_ones_own: "doubled",
    in_another_dtype: "no kernels for float64",
}


@pytest.mark.parametrize("change", PASSED)
@torch.no_grad()
def test_what_is_not_known_goes_to_the_original(
    bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, change: Callable[..., None]
) -> None:
    if change is in_another_dtype and not KERNELS:
        pytest.skip("a forced backend serves every dtype")
    given, plainly = (dict(batch(bert_tokenizer)) for _ in range(2))
    plain = copy.deepcopy(model)
    handle = accelerated(model)
    model(**given)
    change(model, given)
    if change is not with_an_adapter:
        change(plain, dict(plainly))
    else:
        plain = copy.deepcopy(model)
    torch.manual_seed(0)
    wanted = plain(**given)
    torch.manual_seed(0)
    got = model(**given)
    assert (handle.served, handle.passed) == (1, 1)
    assert PASSED[change] in handle.reason
    assert torch.equal(got.logits, wanted.logits)


@torch.no_grad()
def test_a_mask_of_other_numbers_goes_to_the_original(deberta_tokenizer: PreTrainedTokenizerBase) -> None:
    """DeBERTa multiplies its embeddings by it."""
    model = small_deberta(len(deberta_tokenizer))
    given = batch(deberta_tokenizer)
    given["attention_mask"] = given["attention_mask"] * 2
    wanted = model(**given).logits
    with accelerated(model) as handle:
        assert torch.equal(model(**given).logits, wanted)
    assert "0 and 1" in str(handle.reason)


def test_gradients_autocast_and_global_hooks(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    given = batch(bert_tokenizer)
    with accelerated(model) as handle:
        assert model(**given).logits.requires_grad
        assert "torch.no_grad" in str(handle.reason)
        with torch.inference_mode():
            assert model(**given).logits.is_inference()
        assert handle.served == 1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(**given)
        assert handle.reason == "autocast is on"
        seen: list[Any] = []
        hook = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given[0]))
        with torch.no_grad():
            model(**given)
        hook.remove()
        assert model.bert.encoder.layer[0] in seen
        assert "all modules" in str(handle.reason)
        model.requires_grad_(False)
        model(**given)  # nothing asks for gradients
        assert (handle.served, handle.passed) == (2, 3)


@torch.no_grad()
def test_hooks_on_the_encoder_and_on_the_head_are_called(
    bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    seen: list[nn.Module] = []
    for module in (model, model.bert, model.cls.predictions.transform):
        module.register_forward_hook(lambda module, given, output: seen.append(module))
    with accelerated(model) as handle:
        model(**batch(bert_tokenizer))
    assert handle.served == 1
    assert seen == [model.bert, model.cls.predictions.transform, model]


@torch.no_grad()
def test_wrong_calls_fail_as_ever(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    ids = batch(bert_tokenizer)["input_ids"]
    with accelerated(model) as handle:
        for given, error in (
            ({"input_ids": ids + 1000}, IndexError),
            ({"input_ids": ids.repeat(1, 2)}, Exception),  # longer than the model holds
            ({"input_ids": ids, "no such argument": 1}, Exception),
            ({}, ValueError),
        ):
            try:
                wanted: Any = copy.deepcopy(model)(**given)
            except error as raised:
                with pytest.raises(type(raised)):
                    model(**given)
            else:
                assert torch.equal(model(**given).logits, wanted.logits)
    assert handle.served == 0


@torch.no_grad()
def test_taken_away_nothing_is_left(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    given = batch(bert_tokenizer)
    before, attributes = model(**given), [set(module.__dict__) for module in model.modules()]
    handle = accelerated(model)
    model(**given)
    handle.remove()
    handle.remove()
    assert [set(module.__dict__) for module in model.modules()] == attributes
    after = model(**given)
    assert torch.equal(before.logits, after.logits)
    assert (handle.served, handle.passed) == (1, 0)

    with pytest.raises(ZeroDivisionError), accelerated(model):
        raise ZeroDivisionError
    assert [set(module.__dict__) for module in model.modules()] == attributes


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_nested_handles_end_in_any_order(
    bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, first: int
) -> None:
    given = batch(bert_tokenizer)
    handles = [accelerated(model), accelerated(model.bert)]
    with pytest.raises(RequestError, match="already"):
        mlmfast.accelerate(model, backend="interpreter")
    model(**given)
    handles.pop(first).remove()
    model(**given)
    assert handles[0].served == 2
    handles[0].remove()
    assert "forward" not in model.__dict__ and "forward" not in model.bert.__dict__


@torch.no_grad()
def test_a_wrapper_put_on_meanwhile_stays(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """As accelerate's ``prepare`` does for mixed precision."""
    given = batch(bert_tokenizer)
    wanted = model(**given).logits
    handle = accelerated(model)
    inner = model.bert.forward
    model.bert.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    model(**given)
    handle.remove()
    assert torch.equal(model(**given).logits, wanted)
    assert (handle.served, handle.passed) == (1, 0)


@torch.no_grad()
def test_copies_pickles_and_checkpoints_are_of_the_model_alone(
    tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    given, keys = batch(bert_tokenizer), list(model.state_dict())
    wanted = model(**given).logits
    state = torch.random.get_rng_state()
    handle = accelerated(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(model.state_dict()) == keys
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "saved")
    others = [
        copy.deepcopy(model),
        copy.deepcopy(copy.deepcopy(model)),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        type(model).from_pretrained(tmp_path / "saved"),
    ]
    for other in others:
        for weight in other.parameters():
            weight.mul_(1)
        assert torch.equal(other(**given).logits, wanted)
        for weight in other.parameters():
            weight.zero_()
        assert not other(**given).logits.any()
        with accelerated(other) as own:
            other(**given)
        assert own.served == 1
    assert handle.served == 0
    model(**given)
    assert handle.served == 1


def test_signatures_stay(model: PreTrainedModel) -> None:
    """Trainer drops columns of a data set that the forward does not name."""
    import inspect

    before = inspect.signature(model.forward), inspect.signature(model.bert.forward)
    with accelerated(model):
        assert (inspect.signature(model.forward), inspect.signature(model.bert.forward)) == before


@pytest.mark.filterwarnings("error")
def test_mlmfast_loads_an_accelerated_model_as_its_family(
    bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    before = mlmfast.load(model, bert_tokenizer).score(TEXTS)
    with accelerated(model) as handle:
        lm = mlmfast.load(model, bert_tokenizer)
        assert lm.family == "bert"
        for one, other in zip(lm.score(TEXTS), before):
            assert (one.logprobs == other.logprobs).all()
    assert handle.served == 0
    assert lm.score(TEXTS)[0].total == before[0].total


def test_training_between_calls_is_seen(made: tuple[PreTrainedTokenizerBase, PreTrainedModel]) -> None:
    tokenizer, model = made
    model = copy.deepcopy(model)
    given = batch(tokenizer)
    mask = given["attention_mask"].bool()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    with accelerated(model) as handle:
        for _ in range(3):
            model.train()
            model(**given, labels=given["input_ids"]).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            model.eval()
            with torch.no_grad():
                got, wanted = model(**given).logits, copy.deepcopy(model)(**given).logits
            assert_near(logprobs(got[mask]), logprobs(wanted[mask]), 1e-4)
    assert (handle.served, handle.passed) == (3, 3)


@torch.no_grad()
def test_losses(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """As an evaluation computes them: of masked tokens; and where somebody forgot to leave padding out."""
    given = batch(bert_tokenizer)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    careless = given["input_ids"]
    right, wrong = (model(**given, labels=one).loss for one in (labels, careless))
    with accelerated(model) as handle:
        assert_near(model(**given, labels=labels, num_items_in_batch=torch.tensor(7)).loss.numpy(), right.numpy(), 1e-5)
        assert handle.served == 1
        assert torch.equal(model(**given, labels=careless).loss, wrong)
        assert "labels" in str(handle.reason) and handle.passed == 1
        model(**given)
        assert handle.served == 2


def test_the_fill_mask_pipeline(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=bert_tokenizer, device=-1)
    texts = [text.replace("the", bert_tokenizer.mask_token, 1) for text in sentences(9) if " the " in text]
    wanted = fill(texts, batch_size=3)
    with accelerated(model) as handle:
        got = fill(texts, batch_size=3)
    assert handle.served and not handle.passed
    for mine, original in zip(got, wanted):
        assert [one["token"] for one in mine] == [one["token"] for one in original]
        assert_near(np.array([one["score"] for one in mine]), np.array([one["score"] for one in original]), 1e-5)


@torch.no_grad()
def test_an_encoder_deep_inside(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    """As in a SentenceTransformer: a module of one's own over an encoder, and a second encoder beside it."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = small_bert(len(bert_tokenizer)).config
            self.queries, self.texts = (perturb(BertModel(config, add_pooling_layer=False), seed) for seed in (1, 2))

        def forward(self, **given: Any) -> Tensor:
            mask = given["attention_mask"][:, :, None]
            means = [(tower(**given)[0] * mask).sum(1) / mask.sum(1) for tower in (self.queries, self.texts)]
            return means[0] @ means[1].T

    towers, given = Towers().eval(), batch(bert_tokenizer)
    wanted = towers(**given)
    with accelerated(towers) as handle:
        assert_near(towers(**given).numpy(), wanted.numpy(), 1e-4)
    assert handle.served == 2


def test_what_cannot_be_accelerated_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="'gpt2'.*modernbert"):
        mlmfast.accelerate(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)))
    with pytest.raises(UnsupportedModelError, match="Linear"):
        mlmfast.accelerate(nn.Linear(2, 2))
    with pytest.raises(BackendError, match="abacus"):
        mlmfast.accelerate(model, backend="abacus")
    assert "forward" not in model.__dict__ and "forward" not in model.bert.__dict__
    with pytest.raises(RequestError, match="torch.compile"):
        mlmfast.accelerate(torch.compile(model, backend="eager"))
    model.bert.forward = lambda **given: None
    with pytest.raises(UnsupportedModelError, match="BertModel has been replaced"):
        mlmfast.accelerate(model)
    del model.bert.forward
    model.bert.compile(backend="eager")
    with pytest.raises(RequestError, match="torch.compile"):
        mlmfast.accelerate(model)


def test_an_obstacle_is_told_at_once(model: PreTrainedModel) -> None:
    with_a_hook_inside(model, {})
    with pytest.warns(UserWarning, match="has a hook, so the original code"):
        accelerated(model)


@torch.no_grad()
def test_compiled_afterwards_it_is_the_original(
    bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    given = batch(bert_tokenizer)
    wanted = model(**given).logits
    with accelerated(model) as handle:
        got = torch.compile(model, backend="eager")(**given).logits
    assert_near(got.numpy(), wanted.numpy(), 1e-6)
    assert handle.served == 0


def test_the_repr_says_what_happened(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    with accelerated(model) as handle:
        assert repr(handle) == "Acceleration(served=0, passed=0)"
        model.train()
        model(**batch(bert_tokenizer))
    assert repr(handle) == "Acceleration(served=0, passed=1, the last because the model is in training mode)"


def test_refresh_after_writing_through_data(deberta_tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_deberta(len(deberta_tokenizer))
    given = batch(deberta_tokenizer)
    mask = given["attention_mask"].bool()
    with torch.no_grad(), accelerated(model) as handle:
        model(**given)
        table = model.deberta.encoder.rel_embeddings.weight.data
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(7)))
        handle.refresh()
        got, wanted = model(**given).logits, copy.deepcopy(model)(**given).logits
    assert_near(logprobs(got[mask]), logprobs(wanted[mask]), 1e-4)
