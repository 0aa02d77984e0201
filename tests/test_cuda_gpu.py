"""The cuda backend's kernels for few rows on a GPU: alone, and recorded as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_kernels import assert_near, widened
from op_cases import bounds, randn
from torch import Tensor

from mlmfast import backends, cuda
from mlmfast.ops import add_layer_norm, attention, linear, masked_embedding, pre_norm, vocab_topk
from mlmfast.reference.add_layer_norm import add_layer_norm as plain_add_layer_norm
from mlmfast.reference.attention import attention as plain_attention
from mlmfast.reference.linear import linear as plain_linear
from mlmfast.reference.masked_embedding import masked_embedding as plain_masked_embedding
from mlmfast.reference.pre_norm import pre_norm as plain_pre_norm
from mlmfast.reference.vocab_topk import vocab_topk as plain_vocab_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.missing("", "cuda") is not None, reason="the CUDA extension is not built"),
]
DTYPES = [torch.bfloat16, torch.float16]


def on_gpu(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, Tensor):
        return given.to("cuda", dtype if given.is_floating_point() else given.dtype)
    return [on_gpu(x, dtype) for x in given] if isinstance(given, (list, tuple)) else given


def step(rows: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Any]]]:
    """Each op of a step over some rows of a base model: the op, the reference, the arguments."""
    wide, vocabulary = 768, randn(8191, 768, seed=1) / 14
    tokens = torch.arange(rows)
    norm = [1 + randn(wide, seed=2) / 9, randn(wide, seed=3)]
    queries = randn(rows, 12, 64, seed=4)
    keys = randn(700, 12, 64, seed=5), randn(700, 12, 64, seed=6)
    cu = bounds([rows - rows // 2, rows // 2]), bounds([600, 100])
    places = torch.arange(rows) * 97 % 100
    embedding = [tokens, tokens[::2].contiguous(), 4, vocabulary, tokens, vocabulary[:600], None, None, *norm, 1e-7]
    return {
        "masked_embedding": (masked_embedding.masked_embedding, plain_masked_embedding, embedding),
        "linear": (
            linear.linear,
            plain_linear,
            [randn(rows, wide, seed=7), randn(3072, wide, seed=8) / 14, randn(3072, seed=9), "gelu"],
        ),
        "linear with few outputs": (
            linear.linear,
            plain_linear,
            [randn(rows, 3072, seed=7), randn(wide, 3072, seed=8) / 28, None, "none"],
        ),
        "gated linear": (
            linear.linear,
            plain_linear,
            [randn(rows, wide, seed=7), randn(2304, wide, seed=8) / 14, randn(2304, seed=9), "geglu"],
        ),
        "attention": (
            attention.attention,
            plain_attention,
            [queries, *keys, *cu, rows - rows // 2, 600, places, 0.125, 64],
        ),
        "add_layer_norm": (
            add_layer_norm.add_layer_norm,
            plain_add_layer_norm,
            [randn(rows, wide, seed=10), randn(rows, wide, seed=11), norm[1], *norm, 1e-7],
        ),
        "pre_norm": (
            pre_norm.pre_norm,
            plain_pre_norm,
            [randn(rows, wide, seed=10), randn(rows, wide, seed=11), norm[1], *norm, 1e-7],
        ),
        "vocab_topk": (
            vocab_topk.vocab_topk,
            plain_vocab_topk,
            [randn(rows, wide, seed=12), vocabulary, randn(8191, seed=13), 5, 0.7],
        ),
    }


def floats(found: Any) -> Tensor:
    """What is compared: a tensor, or those of several that are no ids."""
    return torch.stack([x for x in found if x.is_floating_point()]) if isinstance(found, tuple) else found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 9, 17, 32])
@pytest.mark.parametrize("op", step(1))
def test_the_ops_of_a_step(op: str, rows: int, dtype: torch.dtype) -> None:
    serve, plain, given = step(rows)[op]
    given = on_gpu(given, dtype)
    assert backends.choose(plain.__name__, "cuda", dtype).backend == "cuda"
    found = serve(*given)
    assert_near(floats(found), floats(plain(*widened(given))), floats(plain(*given)))
    for _ in range(3):  # the same from run to run
        assert torch.equal(floats(serve(*given)), floats(found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_recorded_and_replayed(dtype: torch.dtype) -> None:
    """A replay reads what then stands in the same tensors."""
    cases = {name: (serve, on_gpu(given, dtype)) for name, (serve, _, given) in step(6).items()}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # once before, so that libraries are loaded
        for serve, given in cases.values():
            serve(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = {name: serve(*given) for name, (serve, given) in cases.items()}
    for _, given in cases.values():
        if given[0].is_floating_point():
            given[0].neg_()
        else:
            given[0].add_(7)
    graph.replay()
    torch.cuda.synchronize()
    for name, (serve, given) in cases.items():
        assert torch.equal(floats(recorded[name]), floats(serve(*given))), name
