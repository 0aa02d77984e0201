"""Models of transformers that run on mlmfast's ops: what they return is what their own code returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerated import accelerated, batch, logprobs
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
    small_xlm_roberta,
    xlm_roberta_tokenizer,
)
from families import FAMILIES, HOLDS
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near

from mlmfast.integrations import transformers as integration
from mlmfast.padded import Padded

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
    "xlm-roberta": (xlm_roberta_tokenizer, small_xlm_roberta),
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


@torch.no_grad()
def test_losses_of_spans(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    """Its cross-entropy is over all columns: those of padding count."""
    torch.manual_seed(0)
    config = small_bert(len(bert_tokenizer)).config
    answering = transformers.BertForQuestionAnswering(config).eval()
    given = batch(bert_tokenizer)
    places = torch.ones(len(given["input_ids"]), dtype=torch.long)
    wanted = answering(**given, start_positions=places, end_positions=places)
    with accelerated(answering) as handle:
        got = answering(**given, start_positions=places, end_positions=places)
        assert torch.equal(got.loss, wanted.loss) and handle.passed == 1
        assert "padding" in str(handle.reason)
        whole = {name: value[:1, :3] for name, value in given.items()}
        answering(**whole, start_positions=places[:1], end_positions=places[:1])
        assert handle.served == 1


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
