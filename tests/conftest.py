"""Shared fixtures: one thread, tokenizers and checkpoints made once a session."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_scripts import script

if importlib.util.find_spec("mlmfast") is None or importlib.util.find_spec("mlmfast.kernels") is None:
    script("from_checkout").use_checkout()  # nothing is installed; each worker of pytest-xdist looks for itself

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported
    if kernels := os.environ.get("SIMULATED_GPU"):
        import simulated_gpu

        simulated_gpu.install(kernels, os.environ.get("EMULATED_EXTENSION"))

import checkpoints
import families
import hypothesis
import pytest
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2

import mlmfast
from mlmfast import backends
from mlmfast.model import MaskedLM

if importlib.util.find_spec("triton"):
    # A kernel that a test first imports while it compiles for GPUs would not be interpreted afterwards.
    for op in backends.OPS:
        importlib.import_module(f"mlmfast.kernels.{op}")

hypothesis.settings.register_profile(
    "mlmfast",
    deadline=None,  # a first call pays for imports and table building
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("mlmfast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the sweeps marked slow too")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # the op tests' parameter of that name
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if getattr(parameters.get("backend"), "device", None) == "cuda":
            item.add_marker("gpu")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
    if config.getoption("--slow") or config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="a long sweep: pass --slow"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices run faster on one thread than on many."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bert_tokenizer() -> PreTrainedTokenizerBase:
    return checkpoints.bert_tokenizer()


@pytest.fixture(scope="session")
def roberta_tokenizer() -> PreTrainedTokenizerBase:
    return checkpoints.roberta_tokenizer()


@pytest.fixture(scope="session")
def xlm_roberta_tokenizer() -> PreTrainedTokenizerBase:
    return checkpoints.xlm_roberta_tokenizer()


@pytest.fixture(scope="session")
def deberta_tokenizer() -> PreTrainedTokenizerBase:
    return checkpoints.deberta_tokenizer()


@pytest.fixture(scope="session")
def deberta_tokenizers(deberta_tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """By family, as ``checkpoints.SMALL_DEBERTAS``."""
    return {"deberta-v2": deberta_tokenizer, "deberta": checkpoints.deberta_v1_tokenizer()}


@pytest.fixture(scope="session")
def bert_model(bert_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return checkpoints.small_bert(len(bert_tokenizer))


@pytest.fixture(scope="session")
def roberta_model(roberta_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return checkpoints.small_roberta(len(roberta_tokenizer))


@pytest.fixture(scope="session")
def xlm_roberta_model(xlm_roberta_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return checkpoints.small_xlm_roberta(len(xlm_roberta_tokenizer))


@pytest.fixture(scope="session")
def deberta_model(deberta_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return checkpoints.small_deberta(len(deberta_tokenizer))


@pytest.fixture(scope="session")
def bert_folder(
    tmp_path_factory: pytest.TempPathFactory, bert_model: PreTrainedModel, bert_tokenizer: PreTrainedTokenizerBase
) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("bert"), bert_model, bert_tokenizer)


@pytest.fixture(scope="session")
def roberta_folder(
    tmp_path_factory: pytest.TempPathFactory, roberta_model: PreTrainedModel, roberta_tokenizer: PreTrainedTokenizerBase
) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("roberta"), roberta_model, roberta_tokenizer)


@pytest.fixture(scope="session")
def xlm_roberta_folder(
    tmp_path_factory: pytest.TempPathFactory,
    xlm_roberta_model: PreTrainedModel,
    xlm_roberta_tokenizer: PreTrainedTokenizerBase,
) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("xlm_roberta"), xlm_roberta_model, xlm_roberta_tokenizer)


@pytest.fixture(scope="session")
def deberta_folder(
    tmp_path_factory: pytest.TempPathFactory, deberta_model: PreTrainedModel, deberta_tokenizer: PreTrainedTokenizerBase
) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("deberta"), deberta_model, deberta_tokenizer)


@pytest.fixture(scope="session")
def lms(
    bert_tokenizer: PreTrainedTokenizerBase,
    roberta_tokenizer: PreTrainedTokenizerBase,
    deberta_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, MaskedLM]:
    """A model of each mechanism.

    BERT; DeBERTa as transformers computes it, and with everything: convolution, mask decoder, clamp; ModernBERT
    (pre-norm, rotary, local windows, GeGLU); ESM-2 (a factor a copy); MPNet (a bias by distance).
    """
    conv = {"conv_kernel_size": 3, "conv_act": "gelu", "num_hidden_layers": 3, "share_att_key": False}
    folder = checkpoints.save(
        tmp_path_factory.mktemp("all"), checkpoints.small_deberta(len(deberta_tokenizer), **conv), deberta_tokenizer
    )
    checkpoints.add_position_table(folder, 96, 32)
    tokenizers = {"modernbert": bert_tokenizer, "esm": bert_tokenizer, "mpnet": roberta_tokenizer}
    others = [(name, families.FAMILIES[name], tokenizer) for name, tokenizer in tokenizers.items()]
    return {
        # room for the planted fusion of two texts
        "bert": mlmfast.load(checkpoints.small_bert(len(bert_tokenizer), max_position_embeddings=120), bert_tokenizer),
        "deberta": mlmfast.load(checkpoints.small_deberta(len(deberta_tokenizer)), deberta_tokenizer),
        "deberta, all of it": mlmfast.load(folder, semantics="trained", device="cpu"),
        **{name: mlmfast.load(made.small(len(tokenizer)), tokenizer) for name, made, tokenizer in others},
    }


def clamped_relative_position(query: Tensor, key: Tensor, bucket_size: int = -1, max_position: int = -1) -> Tensor:
    """transformers' ``build_relative_position`` with distances clamped as they were in training."""
    distance = torch.arange(query.size(-2))[:, None] - torch.arange(key.size(-2))[None, :]
    distance = distance.clamp(-(max_position - 1), max_position - 1)
    if bucket_size > 0 and max_position > 0:
        distance = modeling_deberta_v2.make_log_bucket_position(distance, bucket_size, max_position)
    return distance.to(torch.long).unsqueeze(0)


def clamped_v1(encoder: Any, hidden: Tensor, query: Tensor | None = None, relative: Tensor | None = None) -> Any:
    """The same for the first DeBERTa's ``get_rel_pos``, which knows the longest distance."""
    longest = encoder.max_relative_positions if encoder.relative_attention else 0
    return clamped_relative_position(hidden, hidden, -1, longest) if longest else None


@pytest.fixture
def clamped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Hugging Face model as it was trained."""
    with monkeypatch.context() as patch:
        patch.setattr(modeling_deberta_v2, "build_relative_position", clamped_relative_position)
        patch.setattr(modeling_deberta.DebertaEncoder, "get_rel_pos", clamped_v1)
        yield
