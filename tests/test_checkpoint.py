"""A checkpoint that is unsafe, incomplete or unknown is refused by name; an honest one in any format loads."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, save, small_bert, small_deberta
from safetensors.torch import load_file, save_file
from transformers import (
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from truth import assert_near, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import CheckpointError, MLMFastError, UnsupportedModelError
from mlmfast.model import MaskedLM


@pytest.fixture(scope="module")
def lm(bert_folder: Path) -> MaskedLM:
    return mlmfast.load(bert_folder)


@pytest.fixture
def folder(tmp_path: Path, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A good checkpoint to spoil."""
    return save(tmp_path / "checkpoint", bert_model, bert_tokenizer)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_missing_from_the_checkpoint(
    tmp_path: Path, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save(tmp_path, bert_model.bert, bert_tokenizer)  # the encoder alone
    with pytest.raises(CheckpointError, match="cls.predictions.*allow_random_head"):
        mlmfast.load(folder)
    score = mlmfast.load(folder, allow_random_head=True).score(["The cat."])[0]
    assert np.isfinite(score.logprobs).all()


@pytest.mark.parametrize(
    "gone",
    ["cls.predictions.bias", "cls.predictions.transform.dense.weight", "bert.encoder.layer.1.output.dense.weight"],
)
def test_one_weight_missing(folder: Path, gone: str) -> None:
    edit_weights(folder, lambda weights: weights.pop(gone))
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        mlmfast.load(folder)


def test_a_weight_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=50)
    with pytest.raises(CheckpointError):
        mlmfast.load(folder)


def test_a_live_model_without_a_head(bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    assert isinstance(bert_model.bert, BertModel)
    with pytest.raises(CheckpointError, match="BertForMaskedLM"):
        mlmfast.load(bert_model.bert, bert_tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.self.key.weight", "bert.embeddings.LayerNorm.bias"])
def test_nan_in_the_weights(folder: Path, name: str, value: float) -> None:
    edit_weights(folder, lambda weights: weights[name].view(-1)[1].fill_(value))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        mlmfast.load(folder)


def test_nan_in_the_decoder_table_that_transformers_drops(
    tmp_path: Path, deberta_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save(tmp_path, small_deberta(len(deberta_tokenizer)), deberta_tokenizer)
    table = torch.full((96, 32), float("nan"))
    edit_weights(folder, lambda weights: weights.update({"deberta.embeddings.position_embeddings.weight": table}))
    with pytest.raises(CheckpointError, match="position_embeddings"):
        mlmfast.load(folder, semantics="trained")


def test_a_live_model_that_turns_to_nan(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    """After a diverged training step there is an error, not a score."""
    model = small_bert(len(bert_tokenizer))
    lm = mlmfast.load(model, bert_tokenizer)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[0] = float("nan")
    with pytest.raises(MLMFastError, match="NaN"):
        lm.score(["The cat."])
    with pytest.raises(MLMFastError, match="NaN"):
        mlmfast.load(model, bert_tokenizer)


class Trap:
    """Unpickling one of these touches a file: what a malicious checkpoint would do, made visible."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(folder: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "the pickle ran"
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    weights["trap"] = Trap(mark)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="safetensors"):
        mlmfast.load(folder)
    assert not mark.exists()
    with open(tmp_path / "trap.pkl", "wb") as file:
        pickle.dump(weights["trap"], file)
    with open(tmp_path / "trap.pkl", "rb") as file:
        pickle.load(file)
    assert mark.exists()  # the trap itself works


@pytest.mark.parametrize("zipped", [True, False])
def test_an_honest_bin_loads(folder: Path, bert_model: PreTrainedModel, lm: MaskedLM, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(bert_model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    for ours, theirs in zip(mlmfast.load(folder).score(TEXTS), lm.score(TEXTS)):
        assert_near(ours.logprobs, theirs.logprobs, 1e-6)


def test_shards_load(
    tmp_path: Path, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase, lm: MaskedLM
) -> None:
    bert_model.save_pretrained(tmp_path, max_shard_size="20KB")
    bert_tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    for ours, theirs in zip(mlmfast.load(tmp_path).score(TEXTS), lm.score(TEXTS)):
        assert_near(ours.logprobs, theirs.logprobs, 1e-6)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=shards[0].name):
        mlmfast.load(tmp_path)


@pytest.mark.parametrize("spoil", ["truncated", "empty", "text", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_unreadable_weights_file(folder: Path, name: str, spoil: str) -> None:
    good = folder / "model.safetensors"
    if name.endswith(".bin"):
        torch.save(load_file(good), folder / name)
        good.unlink()
    content = (folder / name).read_bytes()
    if spoil == "gone":
        (folder / name).unlink()
    else:
        bad = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"version https://git-lfs.github.com"}
        (folder / name).write_bytes(bad[spoil])
    with pytest.raises(CheckpointError, match=r"weights|restricted loader"):
        mlmfast.load(folder)


def test_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        mlmfast.load(tmp_path)
    with pytest.raises(CheckpointError, match="config.json|Hub"):
        mlmfast.load(tmp_path / "nowhere")


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        mlmfast.load(folder)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm_roberta", "deberta"])
def test_a_folder_without_a_tokenizer(tmp_path: Path, request: pytest.FixtureRequest, family: str) -> None:
    """transformers makes one of its special tokens alone; every word would be unknown to it and its score noise."""
    model, tokenizer = (request.getfixturevalue(f"{family}_{part}") for part in ("model", "tokenizer"))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer"):
        mlmfast.load(tmp_path)
    given = mlmfast.load(tmp_path, tokenizer, semantics="upstream")
    assert_score(given.score([TEXTS[1]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[1]))


@pytest.mark.parametrize("model_type", ["gpt2", "t5", None])
def test_an_unknown_family_is_refused_by_name(folder: Path, model_type: str | None) -> None:
    edit_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=rf"{model_type}.*bert.*deberta-v2.*roberta.*xlm-roberta"):
        mlmfast.load(folder)


def test_a_live_model_of_an_unknown_family(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(UnsupportedModelError, match="gpt2.*deberta-v2"):
        mlmfast.load(model, bert_tokenizer)


REMOTE_CODE = """
from pathlib import Path
Path({mark!r}).touch()
raise RuntimeError("remote code ran")
"""


def plant_remote_code(folder: Path, mark: Path, **config: Any) -> None:
    """Every auto class of the checkpoint points at a module that leaves a mark."""
    (folder / "remote.py").write_text(REMOTE_CODE.format(mark=str(mark)))
    names = ["AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"]
    edit_config(folder, auto_map={name: f"remote.{name}" for name in names}, **config)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["remote.Slow", "remote.Fast"]}}))


def test_an_unknown_model_type_that_wants_remote_code_is_refused(folder: Path, tmp_path: Path) -> None:
    plant_remote_code(folder, tmp_path / "ran", model_type="brand-new-bert")
    with pytest.raises(UnsupportedModelError, match="brand-new-bert.*bert.*remote code"):
        mlmfast.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_known_model_type_loads_without_its_remote_code(folder: Path, tmp_path: Path, lm: MaskedLM) -> None:
    plant_remote_code(folder, tmp_path / "ran")
    for ours, theirs in zip(mlmfast.load(folder).score(TEXTS), lm.score(TEXTS)):
        assert_near(ours.logprobs, theirs.logprobs, 1e-6)
    assert not (tmp_path / "ran").exists()
