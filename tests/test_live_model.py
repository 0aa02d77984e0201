"""Live models that change between two scores, or hold more than plain modules: seen, or refused, never overlooked."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, bert_tokenizer, save, small_bert, small_deberta
from families import FAMILIES
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerBase
from truth import assert_near, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.architectures.spec import Derived
from mlmfast.errors import CheckpointError, RequestError, UnsupportedModelError


def totals(lm: mlmfast.MaskedLM) -> np.ndarray:
    return np.array([score.total for score in lm.score(TEXTS)])


class Adapter(nn.Module):
    """What an adapter looks like from outside: the base layer's weight, another forward."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x


class Twice(BertModel):
    def forward(self, *given: Any, **options: Any) -> Any:
        output = super().forward(*given, **options)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


def adapted(model: BertForMaskedLM) -> None:
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = Adapter(attention.query)


def of_another_class(model: BertForMaskedLM) -> None:
    inner = Twice(model.config, add_pooling_layer=False)
    inner.load_state_dict(model.bert.state_dict())
    model.bert = inner.eval()


def steered(model: BertForMaskedLM) -> None:
    model.bert.encoder.layer[1].register_forward_hook(lambda module, given, output: output + 0.5)


def replaced(model: BertForMaskedLM) -> None:
    model.bert.encoder.layer[0].output.LayerNorm.forward = lambda x: x  # as offloading hooks do


@pytest.mark.parametrize("change", [adapted, of_another_class, steered, replaced])
def test_code_that_a_familys_file_does_not_see_is_run_as_it_is(
    bert_tokenizer: PreTrainedTokenizerBase, change: Callable[[BertForMaskedLM], None]
) -> None:
    model = small_bert(len(bert_tokenizer))
    lm = mlmfast.load(model, bert_tokenizer)
    before = totals(lm)
    change(model)
    with pytest.raises(UnsupportedModelError, match="load the model again"):
        lm.score(TEXTS)
    with pytest.warns(UserWarning, match="own code computes it.*merge an adapter"):
        lm = mlmfast.load(model, bert_tokenizer)
    assert lm.generic
    assert np.abs(totals(lm) - before).max() > 0.01
    for text, score in zip(TEXTS, lm.score(TEXTS)):
        assert_score(score, reference_loop(forward_of(model), bert_tokenizer, text))


def test_recording_outputs_and_compiling_change_nothing(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers records hidden states by hooks of its own; torch.compile wraps a model, or its forward."""
    model = small_bert(len(bert_tokenizer))
    before = totals(mlmfast.load(model, bert_tokenizer))
    model(torch.tensor([[2, 7, 3]]), output_hidden_states=True, output_attentions=True)
    lm = mlmfast.load(torch.compile(model, backend="eager"), bert_tokenizer)
    assert lm.model is model and lm.family == "bert"
    model.forward = torch.compile(model.forward, backend="eager")
    lm = mlmfast.load(model, bert_tokenizer)
    assert lm.family == "bert"
    assert_near(totals(lm), before, 1e-6)


@pytest.mark.parametrize("family", ["deberta", "esm", "mpnet", "ernie"])
def test_a_change_of_dtype_and_back_is_noticed(family: str) -> None:
    """The storage under a parameter is another then, perhaps at the old address, and its version is what it was."""
    made = FAMILIES[family]
    tokenizer = made.tokenizer()
    model = made.small(len(tokenizer), **({"use_task_id": True} if family == "ernie" else {}))
    lm = mlmfast.load(model, tokenizer)
    for _ in range(6):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.01)
        lm.score(TEXTS[:1])
        model.bfloat16()
        model.float()
        for score, fresh in zip(lm.score(TEXTS), mlmfast.load(copy.deepcopy(model), tokenizer).score(TEXTS)):
            assert_near(score.logprobs, fresh.logprobs, 1e-6)


def test_position_tables_follow_replaced_parameters(deberta_tokenizer: PreTrainedTokenizerBase) -> None:
    """Freed and new parameters often share an address; the table must not be taken for the old one's."""
    model = small_deberta(len(deberta_tokenizer))
    lm = mlmfast.load(model, deberta_tokenizer)
    shape = model.deberta.encoder.rel_embeddings.weight.shape
    for seed in range(10):
        lm.score(TEXTS[:1])
        model.deberta.encoder.rel_embeddings.weight = None
        torch.manual_seed(seed)
        model.deberta.encoder.rel_embeddings.weight = nn.Parameter(torch.randn(shape))
        assert_near(totals(lm), totals(mlmfast.load(model, deberta_tokenizer)), 1e-6)


def test_derived_tensors_of_inference_tensors_are_never_kept() -> None:
    derived = Derived()
    with torch.inference_mode():
        source = torch.ones(2)
        assert derived.get("doubled", [source], lambda: source * 2).tolist() == [2, 2]
        source += 1
        assert derived.get("doubled", [source], lambda: source * 2).tolist() == [4, 4]


def test_derived_tensors_that_are_kept_have_version_counters() -> None:
    """A backend packs no weight without one, so a first request in inference mode must not make such."""
    with torch.inference_mode(False):
        source = torch.ones(2)
    with torch.inference_mode():
        assert not Derived().get("doubled", [source], lambda: source * 2).is_inference()


def test_refresh_after_writing_through_data(deberta_tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_deberta(len(deberta_tokenizer))
    lm = mlmfast.load(model, deberta_tokenizer)
    lm.score(TEXTS)
    table = model.deberta.encoder.rel_embeddings.weight.data
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(7)))
    lm.refresh()
    assert_near(totals(lm), totals(mlmfast.load(model, deberta_tokenizer)), 1e-6)


def test_autocast_around_the_call_changes_nothing(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    lm = mlmfast.load(small_bert(len(bert_tokenizer)), bert_tokenizer)
    outside = totals(lm)
    with torch.autocast("cpu", torch.bfloat16):
        assert (totals(lm) == outside).all()


def test_a_vocabulary_that_grows_is_seen() -> None:
    tokenizer = bert_tokenizer()  # its own: this test adds to it
    model = small_bert(len(tokenizer))
    lm = mlmfast.load(model, tokenizer)
    tokenizer.add_tokens(["zzz"])
    model.resize_token_embeddings(len(tokenizer))
    assert lm.vocab_size == len(tokenizer)
    assert "zzz" in lm.score(["zzz"])[0].tokens


def test_a_config_that_is_not_transformers_own_is_refused(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    class Remote(BertConfig):
        pass

    settings = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model = BertForMaskedLM(Remote(vocab_size=len(bert_tokenizer), **settings))
    with pytest.raises(UnsupportedModelError, match="Remote"):
        mlmfast.load(model, bert_tokenizer)


def test_a_tokenizer_may_be_named(bert_tokenizer: PreTrainedTokenizerBase, bert_folder: Path) -> None:
    model = small_bert(len(bert_tokenizer))
    by_name = mlmfast.load(model, str(bert_folder))
    assert (totals(by_name) == totals(mlmfast.load(model, bert_tokenizer))).all()


def test_a_live_model_names_a_bad_device(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="abacus"):
        mlmfast.load(small_bert(len(bert_tokenizer)), bert_tokenizer, device="abacus")


@pytest.mark.parametrize("index", ["{oops", "{}", "[]"])
def test_an_unreadable_weights_index(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase, index: str) -> None:
    folder = save(tmp_path, small_bert(len(bert_tokenizer)), bert_tokenizer)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="cannot be read"):
        mlmfast.load(folder)


def test_a_folder_called_tiny_is_a_folder(
    tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    save(tmp_path / "tiny", small_bert(len(bert_tokenizer)), bert_tokenizer)
    monkeypatch.chdir(tmp_path)
    assert mlmfast.load(Path("./tiny")).family == "bert"
    assert mlmfast.load("./tiny").family == "bert"
    assert mlmfast.load("tiny").family == "deberta-v2"


def test_a_vocabulary_of_single_letters_loads(tmp_path: Path) -> None:
    """Protein models have a letter an amino acid."""
    folder = save(tmp_path, small_bert(9), bert_tokenizer())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "L", "A", "G", "V"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    assert mlmfast.load(folder).score(["L A G V"])[0].tokens == ["L", "A", "G", "V"]


def test_weights_of_another_shape_are_named(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = save(tmp_path, small_bert(len(bert_tokenizer)), bert_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    with pytest.raises(CheckpointError, match=r"intermediate\.dense"):
        mlmfast.load(folder)
