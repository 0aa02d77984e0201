"""Whole models on a GPU: the loop's numbers by the Triton kernels, whatever the batch, and with memory running out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import families
import numpy as np
import pytest
import torch
from checkpoints import TEXTS, small_bert, small_deberta, small_roberta
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import ALL_METRICS, assert_equals_the_loop, assert_near, forward_of

import mlmfast
from mlmfast import backends, execution
from mlmfast.budget import row_bytes
from mlmfast.encoder import encode
from mlmfast.packing import pack

pytestmark = pytest.mark.gpu

OTHERS = ["modernbert", "esm", "mpnet"]  # of families.py
CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu", "num_hidden_layers": 3, "share_att_key": False}


def of_family(
    family: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = tokenizers[family.partition(" ")[0]]
    make: dict[str, Callable[..., PreTrainedModel]] = {
        "bert": small_bert,
        "roberta": small_roberta,
        "deberta": small_deberta,
        "deberta with convolution": lambda size: small_deberta(size, **CONVOLUTION),
    }
    for name in OTHERS:
        make[name] = families.FAMILIES[name].small
    return make[family](len(tokenizer)), tokenizer


@pytest.fixture(scope="module")
def tokenizers(
    bert_tokenizer: PreTrainedTokenizerBase,
    roberta_tokenizer: PreTrainedTokenizerBase,
    deberta_tokenizer: PreTrainedTokenizerBase,
) -> dict[str, PreTrainedTokenizerBase]:
    others = {"modernbert": bert_tokenizer, "esm": bert_tokenizer, "mpnet": roberta_tokenizer}
    return {"bert": bert_tokenizer, "roberta": roberta_tokenizer, "deberta": deberta_tokenizer, **others}


LITTLE = 24 << 20
FAMILIES = ["bert", "roberta", "deberta", "deberta with convolution", *OTHERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_metric_equals_the_loop(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = of_family(family, tokenizers)
    forward = forward_of(model)  # on the CPU, in float64
    lm = mlmfast.load(model.cuda(), tokenizer)
    for graphs in range(4):  # the shapes return, so the later turns are replays
        metrics = ALL_METRICS if graphs == 0 else ["original"]
        assert_equals_the_loop(lm, forward, tokenizer, [(text, None) for text in TEXTS], metrics)


@pytest.mark.parametrize("family", FAMILIES)
def test_triton_serves_every_op(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert {service.backend for service in backends.report("cuda", dtype)} <= {"cuda", "triton"}
    model, tokenizer = of_family(family, tokenizers)
    assert mlmfast.load(model.cuda(), tokenizer, backend="triton").score(TEXTS[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_dtypes_are_as_near_as_plain_torch(
    family: str, dtype: torch.dtype, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = of_family(family, tokenizers)
    right = logprobs(mlmfast.load(model, tokenizer, backend="reference"))
    narrow = model.to("cuda", dtype)
    plain = np.abs(logprobs(mlmfast.load(narrow, tokenizer, backend="reference")) - right)
    ours = np.abs(logprobs(mlmfast.load(narrow, tokenizer)) - right)
    assert ours.max() <= 2 * plain.max() + 1e-3
    assert np.sqrt((ours**2).mean()) <= 2 * np.sqrt((plain**2).mean()) + 1e-3


def logprobs(lm: mlmfast.MaskedLM, **options: Any) -> np.ndarray:
    return np.concatenate([score.logprobs for score in lm.score(TEXTS, **options)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_its_batch(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = of_family(family, tokenizers)
    lm = mlmfast.load(model.cuda(), tokenizer)
    together = logprobs(lm)
    for rows in (1, 50, 333):
        lm.batch_tokens = rows
        assert_near(logprobs(lm), together, 1e-5)


def test_the_same_request_gives_the_same_bits(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = of_family("deberta", tokenizers)
    lm = mlmfast.load(model.cuda(), tokenizer, cuda_graphs=False)
    first = lm.score(TEXTS, ranks=True, entropies=True)
    for _ in range(3):
        for a, b in zip(first, lm.score(TEXTS, ranks=True, entropies=True)):
            assert np.array_equal(a.logprobs, b.logprobs)
            assert np.array_equal(a.ranks, b.ranks) and np.array_equal(a.entropies, b.entropies)


@contextmanager
def little_memory(free: int) -> Iterator[None]:
    """Within the block the process may hold so many bytes more than it does now."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + free) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(("family", "dtype"), [("bert", torch.float32), ("deberta", torch.bfloat16)])
def test_a_batch_that_does_not_fit_is_halved(
    family: str, dtype: torch.dtype, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the compiled extension allocates, too."""
    model, tokenizer = of_family(family, tokenizers)
    lm = mlmfast.load(model.to("cuda", dtype), tokenizer, batch_tokens=1 << 20)
    # Distinct texts of some tokens each: identical copies would be computed once.
    words = [word for text in TEXTS for word in text.split()]
    texts = [" ".join(words[(i * 7 + j * (1 + i // len(words))) % len(words)] for j in range(6)) for i in range(2000)]
    assert pack(lm.plan(texts), 1 << 20)[0].tokens * row_bytes(lm.spec()) > 2 * LITTLE
    wanted = [score.total for score in lm.score(texts)]
    sizes: list[int] = []

    def counting(spec: Any, batch: Any, mask_token_id: int) -> Any:
        sizes.append(batch.tokens)
        return encode(spec, batch, mask_token_id)

    monkeypatch.setattr(execution, "encode", counting)
    with little_memory(LITTLE):
        found = [score.total for score in lm.score(texts)]
    assert_near(np.array(found), np.array(wanted), 1e-5 if dtype == torch.float32 else 2e-2)
    assert len(sizes) > 2 and min(sizes) <= max(sizes) // 2
