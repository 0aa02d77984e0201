"""Live models that change between two scores, or hold more than plain modules: seen, or refused, never overlooked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, bert_tokenizer, save, small_bert, small_deberta
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase
from truth import assert_near

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


def test_an_adapter_is_refused_by_name(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_bert(len(bert_tokenizer))
    lm = mlmfast.load(model, bert_tokenizer)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = Adapter(attention.query)
    with pytest.raises(UnsupportedModelError, match=r"Adapter.*merge"):
        lm.score(TEXTS)
    with pytest.raises(UnsupportedModelError, match="Adapter"):
        mlmfast.load(model, bert_tokenizer)


def test_a_forward_replaced_on_the_instance_is_refused(deberta_tokenizer: PreTrainedTokenizerBase) -> None:
    model = small_deberta(len(deberta_tokenizer))
    norm = model.deberta.encoder.layer[0].output.LayerNorm
    norm.forward = lambda x: x  # as offloading hooks do
    with pytest.raises(UnsupportedModelError, match="LayerNorm"):
        mlmfast.load(model, deberta_tokenizer)


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
