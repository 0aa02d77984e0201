"""What goes to the original code of an accelerated model, and what is left of mlmfast when it is taken away."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerated import KERNELS, accelerated, batch
from checkpoints import TEXTS, small_bert, small_deberta
from families import HOLDS
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from truth import assert_near

import mlmfast
from mlmfast.errors import BackendError, RequestError, UnsupportedModelError


@pytest.fixture
def model(bert_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return small_bert(len(bert_tokenizer))


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
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = ACT2FN["silu"].eval()


def with_another_activation(model: PreTrainedModel, given: dict[str, Any]) -> None:
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU().eval()


def with_no_token_attended(model: PreTrainedModel, given: dict[str, Any]) -> None:
    given["attention_mask"] = torch.zeros_like(given["input_ids"])


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
    with_another_activation: "is an activation that the config does not name",
    with_no_token_attended: "no token is attended",
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
    assert (handle.served, handle.passed) == (0, 4)


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


@torch.no_grad()
def test_other_ways_of_running_a_model(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """torch.export reads the forward's code; torch.func and forward-mode differentiation pass through no op of ours."""
    given = dict(batch(bert_tokenizer))
    weight = model.bert.embeddings.LayerNorm.bias
    model.set_attn_implementation("eager")  # torch's own fused attention has no tangents

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            name = "bert.embeddings.LayerNorm.bias"
            dual = {name: forward_ad.make_dual(weight, torch.ones_like(weight))}
            out = torch.func.functional_call(model, dual, (), given).logits
            return forward_ad.unpack_dual(out).tangent

    def mapped() -> Tensor:
        return torch.func.vmap(lambda ids: model(ids[None]).logits[0])(given["input_ids"])

    wanted = tangent(), mapped(), model(**given).logits
    with accelerated(model) as handle:
        got = tangent(), mapped(), torch.export.export(model, (), given).module()(**given).logits
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert_near(got[2].numpy(), wanted[2].numpy(), 1e-6)
        assert handle.served == 0 and "torch.func" in str(handle.reason)


def test_the_repr_says_what_happened(bert_tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    with accelerated(model) as handle:
        assert repr(handle) == "Acceleration(served=0, passed=0)"
        model.train()
        model(**batch(bert_tokenizer))
    assert repr(handle) == "Acceleration(served=0, passed=1, the last because the model is in training mode)"
