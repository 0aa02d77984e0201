"""What the Python of the cuda backend gives to its kernels and what to Triton, without a GPU and without either."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import bounds, randn
from torch import Tensor

CSRC = Path(__file__).parents[1] / "csrc/cuda"
OPS = ("linear", "add_layer_norm", "pre_norm", "masked_embedding", "vocab_topk", "attention")
HALF = torch.bfloat16


def schema(op: str) -> torch.FunctionSchema:
    """What ``csrc/cuda/<op>.cu`` registers."""
    found = re.search(r"m\.def\(([^;]*)\);", (CSRC / f"{op}.cu").read_text(encoding="utf-8"))
    assert found is not None
    return torch._C.parse_schema("mlmfast_cuda::" + "".join(re.findall(r'"([^"]*)"', found[1])))


def takes(kind: str, given: Any) -> bool:
    if kind.startswith("Optional["):
        return given is None or takes(kind[len("Optional[") : -1], given)
    return isinstance(given, {"Tensor": Tensor, "int": int, "float": (float, int), "str": str}[kind])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls an op of the backend and says who was given it: ``"cuda"``, checked against the schema, or ``"triton"``."""

    class Kernels:
        """In place of ``torch.ops.mlmfast_cuda``."""

        def __getattr__(self, op: str) -> Callable[..., str]:
            def kernel(*given: Any) -> str:
                arguments = schema(op).arguments
                assert len(given) == len(arguments)
                for argument, value in zip(arguments, given):
                    assert takes(str(argument.type), value), f"{argument.name} is {value!r}"
                return "cuda"

            return kernel

    def call(op: str, *given: Any, **options: Any) -> str:
        module = importlib.import_module(f"mlmfast.cuda.{op}")

        (name,) = (name for name in vars(module) if name.startswith("triton_"))
        signature = inspect.signature(getattr(module, op))

        def triton(*arguments: Any) -> str:
            """Takes the very same arguments."""
            found, expected = signature.bind(*arguments), signature.bind(*given, **options)
            found.apply_defaults(), expected.apply_defaults()
            assert all(a is b or (not isinstance(b, Tensor) and a == b) for a, b in zip(found.args, expected.args))
            return "triton"

        monkeypatch.setattr(module, name, triton)
        monkeypatch.setattr(torch.ops, "mlmfast_cuda", Kernels(), raising=False)
        return getattr(module, op)(*given, **options)

    return call


def rows(count: int, width: int, dtype: torch.dtype = HALF, *, stride: int = 0, offset: int = 0) -> Tensor:
    """``[count, width]``, rows ``stride`` numbers apart, the first one ``offset`` numbers from a 16-byte bound."""
    room = torch.zeros(offset + count * (stride or width) + 64, dtype=dtype)
    assert room.data_ptr() % 16 == 0
    return room.as_strided((count, width), (stride or width, 1), offset)


def test_every_op_says_what_it_takes() -> None:
    for op in (*OPS, "disentangled_attention"):
        assert "others go to triton" in importlib.import_module(f"mlmfast.cuda.{op}").LIMITS


@pytest.mark.parametrize(
    ("x", "weight", "bias", "backend"),
    [
        (rows(1, 64), rows(48, 64), torch.zeros(48, dtype=HALF), "cuda"),
        (rows(32, 8), rows(48, 8), None, "cuda"),
        (rows(32, 64, stride=72, offset=8), rows(48, 64, stride=80, offset=16), None, "cuda"),
        (rows(32, 64, torch.float16), rows(47, 64, torch.float16), None, "cuda"),
        (rows(33, 64), rows(48, 64), None, "triton"),
        (rows(0, 64), rows(48, 64), None, "triton"),
        (rows(4, 60), rows(48, 60), None, "triton"),
        (rows(4, 64, stride=68), rows(48, 64), None, "triton"),
        (rows(4, 64), rows(48, 64, stride=68), None, "triton"),
        (rows(1, 64).as_strided((1, 64), (1 << 26, 1)), rows(48, 64), None, "triton"),
        (rows(4, 64, offset=4), rows(48, 64), None, "triton"),
        (rows(4, 64), rows(48, 64, offset=1), None, "triton"),
        (rows(4, 64), rows(64, 48).T, None, "triton"),
        (rows(4, 64), rows(48, 64, torch.float32), None, "triton"),
        (rows(4, 64), rows(48, 64), torch.zeros(48), "triton"),
        (rows(4, 64), rows(48, 64), torch.zeros(96, dtype=HALF)[::2], "triton"),
    ],
)
def test_linear(served: Callable[..., str], x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    assert served("linear", x, weight, bias, "gelu") == backend


@pytest.mark.parametrize(
    ("outputs", "activation", "backend"),
    [(48, "geglu", "cuda"), (47, "geglu", "triton"), (48, "none", "cuda"), (48, "swish", "triton")],
)
def test_linear_activations(served: Callable[..., str], outputs: int, activation: str, backend: str) -> None:
    assert served("linear", rows(4, 64), rows(outputs, 64), None, activation) == backend


def test_add_layer_norm(served: Callable[..., str]) -> None:
    vector = torch.ones(63, dtype=HALF)
    for x, residual, weight, backend in [
        (rows(1, 63), rows(1, 63), vector, "cuda"),
        (rows(32, 63, stride=65, offset=1), None, vector, "cuda"),
        (rows(33, 63), rows(33, 63), vector, "triton"),
        (rows(4, 63), rows(4, 63, torch.float32), vector, "triton"),
        (rows(4, 63), rows(63, 4).T, vector, "triton"),
        (rows(4, 63), None, vector.float(), "triton"),
        (rows(4, 8193), None, torch.ones(8193, dtype=HALF), "triton"),
    ]:
        assert served("add_layer_norm", x, residual, None, weight, None, 1e-5) == backend
        if residual is not None:
            assert served("pre_norm", x, residual, None, weight, None, 1e-5) == backend


def test_masked_embedding(served: Callable[..., str]) -> None:
    for count, words, backend in [
        (32, rows(9, 63), "cuda"),
        (33, rows(9, 63), "triton"),
        (0, rows(9, 63), "triton"),
        (4, rows(63, 9).T, "triton"),
        (4, rows(9, 8193), "triton"),
    ]:
        ids = torch.zeros(count, dtype=torch.int64)
        given = (ids, ids[:1], 4, words, ids, words, ids, words, words[0], words[0], 1e-7)
        more = {"copy_scale": torch.ones(1, dtype=HALF), "cu_seqlens": bounds([count])}
        assert served("masked_embedding", *given) == backend
        assert served("masked_embedding", *given, **more) == backend
    assert served("masked_embedding", ids, ids, 4, rows(9, 64)) == "cuda"
    assert served("masked_embedding", ids, ids, 4, rows(9, 64), ids, rows(9, 64).float()) == "triton"


@pytest.mark.parametrize(
    ("hidden", "tokens", "k", "backend"),
    [
        (rows(1, 64), 8191, 1, "cuda"),
        (rows(32, 64), 40, 32, "cuda"),
        (rows(33, 64), 40, 5, "triton"),
        (rows(0, 64), 40, 5, "triton"),
        (rows(4, 64), 40, 33, "triton"),
        (rows(4, 64), 31, 32, "triton"),
        (rows(4, 64), 40, 0, "triton"),
        (rows(4, 63), 40, 5, "triton"),
        (rows(4, 64, offset=2), 40, 5, "triton"),
    ],
)
def test_vocab_topk(served: Callable[..., str], hidden: Tensor, tokens: int, k: int, backend: str) -> None:
    vocabulary = rows(tokens, hidden.shape[1])
    assert served("vocab_topk", hidden, vocabulary, None, k, 0.7) == backend
    assert served("vocab_topk", hidden, vocabulary, torch.zeros(tokens, dtype=HALF), k, 1) == backend
    assert served("vocab_topk", hidden, vocabulary, torch.zeros(tokens), k, 1) == "triton"


@pytest.mark.parametrize(
    ("queries", "most", "width", "places", "backend"),
    [
        (32, 16, 64, True, "cuda"),
        (4, 4, 32, False, "cuda"),
        (33, 16, 64, True, "triton"),
        (32, 17, 64, True, "triton"),
        (0, 0, 64, True, "triton"),
        (4, 4, 48, True, "triton"),
    ],
)
def test_attention(served: Callable[..., str], queries: int, most: int, width: int, places: bool, backend: str) -> None:
    q, k = (randn(n, 2, width).to(HALF) for n in (queries, 50))
    cu = bounds([queries]), bounds([50])
    positions = torch.arange(queries) if places else None
    assert served("attention", q, k, k, *cu, most, 50, positions, 0.1) == backend
    assert served("attention", q, k, k, *cu, most, 50, positions, 0.1, 64) == backend
    bias = torch.zeros(2, 9)
    assert served("attention", q, k, k, *cu, most, 50, positions, 0.1, -1, bias) == "triton"
    crooked = randn(50, 2, width + 1).to(HALF)[..., :width]
    assert served("attention", q, k, crooked, *cu, most, 50, positions, 0.1) == "triton"


def test_nothing_asks_the_device_for_a_value() -> None:
    """A step is recorded as a CUDA graph; the extension is loaded only where a GPU is."""
    for source in (Path(__file__).parents[1] / "mlmfast/cuda").glob("*.py"):
        assert not re.search(r"\.item\(|\.tolist\(|\.cpu\(|nonzero|synchronize", source.read_text(encoding="utf-8"))


def test_blocks_of_wide_heads_need_shared_memory(served: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mlmfast.cuda.disentangled_attention")

    def asked(width: int, places: Tensor | None = None) -> str:
        rows, table = randn(20, 2, width).to(HALF), randn(9, 2, width).to(HALF)
        cu = bounds([20])
        given = (rows, rows, rows, table, table, torch.zeros(41, dtype=torch.int32), cu, cu, 20, 20, None, 0.1)
        if places is not None:
            given = (*given[:6], bounds([1]), cu, 1, 20, places, 0.1)
            given = (rows[:1], *given[1:])
        return served("disentangled_attention", *given)

    for kilobytes, wide in ((99, "triton"), (163, "cuda"), (227, "cuda")):
        monkeypatch.setattr(module, "shared_memory", lambda device, size=kilobytes << 10: size)
        assert asked(128) == wide
        assert asked(64) == "cuda"
        assert asked(128, torch.tensor([3])) == "cuda"
