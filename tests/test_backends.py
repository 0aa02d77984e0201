"""Who serves which op, and why not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import small_bert
from transformers import PreTrainedTokenizerBase

import mlmfast
from mlmfast import backends, cpu, doctor, machine
from mlmfast.errors import BackendError
from mlmfast.ops.linear import linear
from mlmfast.ops.masked_embedding import masked_embedding


@pytest.fixture
def fresh() -> Iterator[None]:
    """Choices are made once a process; these tests change what they depend on."""
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


def compiler() -> str | None:
    """The C++ compiler that a build would find."""
    named = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, [*named[:1], "c++", "g++", "clang++"])), None)


@pytest.mark.parametrize("op", backends.OPS)
def test_what_cpu_has_is_served_where_a_compiler_is(op: str) -> None:
    """A build that failed silently must not pass as skipped op tests."""
    if op not in cpu.WITHOUT_EXTENSION and compiler() is None:
        pytest.skip("no C++ compiler, so no extension")
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.choose(op, "cpu", dtype).backend == "cpu"


def test_other_dtypes_fall_to_the_reference() -> None:
    for dtype in (torch.float64, torch.float16):
        service = backends.choose("linear", "cpu", dtype)
        assert service.backend == "reference"
        assert backends.dtype_name(dtype) in service.reason
    assert linear(torch.ones(1, 2).double(), torch.ones(3, 2).double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_forced_backend_names_the_dtype_it_does_not_take(
    dtype: torch.dtype, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    x = torch.ones(1, 2, dtype=dtype)
    with backends.forced("cpu"), pytest.raises(BackendError, match=f"bfloat16, not {backends.dtype_name(dtype)}"):
        linear(x, x)
    with pytest.raises(BackendError, match="float32 and bfloat16"):
        mlmfast.load(small_bert(len(bert_tokenizer)).to(dtype), bert_tokenizer, backend="cpu")


def test_an_embedding_is_served_by_the_dtype_of_its_table() -> None:
    rows = torch.zeros(1, dtype=torch.int64)
    with backends.forced("cpu"), pytest.raises(BackendError, match="not float64"):
        masked_embedding(rows, rows[:0], 0, torch.ones(2, 2, dtype=torch.float64))


def test_without_the_extension(
    fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "_problem", "is not installed")
    assert cpu.missing("linear") is None
    assert backends.choose("linear", "cpu", torch.float32).backend == "cpu"
    assert cpu.instructions() is None
    refusal = cpu.missing("attention")
    assert refusal is not None
    for said in ("not installed", "times the time", "C++17", "MLMFAST_BUILD_CPU=1 pip install"):
        assert said in refusal
    service = backends.choose("add_layer_norm", "cpu", torch.float32)
    assert service.backend == "reference"
    findings = doctor.examine()
    assert findings["cpu"]["missing"] == refusal
    assert findings["cpu"]["instructions"] is None
    monkeypatch.setenv("COLUMNS", "2000")
    doctor.show(findings)
    assert capsys.readouterr().out.count(cpu.REMEDY) == 1


def test_an_extension_that_does_not_load_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extension.py").write_text("raise ImportError('undefined symbol: moon')")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.extension("broken_extension") == "does not load (undefined symbol: moon)"
    assert machine.extension("absent_extension") == "is not installed"
    (tmp_path / "ancient_extension.py").touch()  # of before there were versions
    assert machine.extension("ancient_extension") == 0
