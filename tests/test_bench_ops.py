"""The ops' benchmark on toy shapes: the work that is counted, what gets no speed, and what is skipped."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import script

from mlmfast import backends, cpu
from mlmfast.bench.work import attention_dots

ops, table = script("bench_ops"), script("op_table")
RATES: dict[str, Any] = {"matrix_rate": 1e12, "bandwidth": 1e12, "rounds": 1}
compiled = pytest.mark.skipif(cpu.instructions() is None, reason="the compiled kernels are not built here")


def test_work_of_attention_by_hand() -> None:
    found = {(case.op, case.name): case for case in table.cases(table.TOY, [8])}
    plain = found["attention", "24 copies of 8"]
    assert plain.flops == 24 * 4 * 8 * 8 * 32  # two products of 8 x 8 x 32
    assert found["vocab_logprob", "24 rows"].flops == 2 * 24 * 32 * 300
    # Distances below 8 all have rows of their own: as many position products as pairs, twice.
    assert found["disentangled_attention", "24 copies of 8"].flops == 2 * plain.flops
    assert attention_dots(torch.arange(8).numpy(), 8, None) == 2 * 64
    # 1 + 1 + 1 keys for those inside, one less at both ends; some of a longer sequence's middle
    assert attention_dots(torch.arange(8).numpy(), 8, None, window=1) == 2 * (6 * 3 + 2 * 2)
    assert attention_dots(torch.tensor([0, 9]).numpy(), 20, None, window=3) == 2 * (4 + 7)


def test_bytes_are_inputs_once_and_outputs_once() -> None:
    draw = table.Draw(torch.bfloat16, "cpu", 0)
    found = {case.op: case for case in table.cases(table.TOY, [8])}
    norm = found["add_layer_norm"].make(draw)
    out = torch.empty(192, 32, dtype=torch.bfloat16)
    assert ops.bytes_moved(found["add_layer_norm"], norm, out) == 3 * 192 * 32 * 2 + 3 * 32 * 2
    embedding = found["masked_embedding"].make(draw)
    rows = 192 * 8 + 12 * 8 + 192 * 32 * 2  # ids, masked rows, a row of the table each
    assert ops.bytes_moved(found["masked_embedding"], embedding, out) == rows + 192 * 32 * 2


@compiled
@pytest.mark.parametrize("op", ["linear", "vocab_topk", "disentangled_attention"])
def test_a_wrong_op_gets_no_speed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in table.cases(table.TOY, [9]) if case.op == op)
    honest = ops._op

    def wrong(case: Any, given: tuple[Any, ...], backend: str) -> Any:
        found = honest(case, given, backend)
        if backend != "cpu":
            return found
        if op == "vocab_topk":  # the right values, and another token's id
            logprobs, ids = found
            ids[0, 0] = ids[0, 1]
            return logprobs, ids
        found[-1, -1] += 0.01 if op == "linear" else torch.nan
        return found

    monkeypatch.setattr(ops, "_op", wrong)
    bad, good = ops.measure(case, torch.float32, "cpu", ["cpu", "reference"], **RATES)
    assert not bad["agrees"] and "seconds" not in bad
    assert good["agrees"] and good["seconds"] > 0


def test_an_op_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Any, given: tuple[Any, ...], backend: str) -> Any:
        if backend == "cpu":
            raise RuntimeError("a kernel\n was lost")
        return honest(case, given, backend)

    honest = ops._op
    monkeypatch.setattr(ops, "_op", fails)
    monkeypatch.setattr(ops, "untaken", lambda *given: None)
    bad, good = ops.measure(next(table.cases(table.TOY, [9])), torch.float32, "cpu", ["cpu", "reference"], **RATES)
    assert (bad["agrees"], bad["failure"]) == (False, "RuntimeError: a kernel was lost")
    assert good["agrees"]


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backend ``few`` of the linear alone, whose compiled kernel takes 4 rows; more it hands on, as ``cuda`` does."""
    package = tmp_path / "few_backend"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "linear.py").write_text(
        "import torch\n"
        "from mlmfast.reference.linear import linear as plain\n"
        "LIMITS = 'up to 4 rows; others go on'\n"
        "def linear(x, *rest):\n"
        "    return torch.ops.mlmfast_few.linear(x, *rest) if len(x) <= 4 else plain(x, *rest)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    taken = backends.Backend("few", "few_backend", ("cpu",), (torch.float32,))
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, taken))
    library = torch.library.Library("mlmfast_few", "DEF")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor")
    library.impl("linear", importlib.import_module("mlmfast.reference.linear").linear, "CompositeExplicitAutograd")
    yield
    library._destroy()
    for name in ("few_backend", "few_backend.linear"):
        sys.modules.pop(name)
    backends.choose.cache_clear()
    backends._function.cache_clear()


@pytest.mark.usefixtures("few")
def test_what_a_backend_does_not_take_is_skipped_with_the_reason() -> None:
    found = {}
    for case in (*table.few_rows(table.TOY), next(table.cases(table.TOY, [9]))):
        for dtype in (torch.float32, torch.bfloat16):
            found[case.op, case.name, dtype] = ops.checked(case, dtype, "cpu", "few")
    one, five = (found["linear", f"{rows} rows 64 to 32", torch.float32] for rows in (1, 5))
    assert one["agrees"] and "skipped" not in one
    assert five["skipped"] == "few takes up to 4 rows; others go on"
    assert found["linear", "1 rows 64 to 32", torch.bfloat16]["skipped"] == "few takes float32, not bfloat16"
    assert found["vocab_topk", "1 rows, best 3", torch.float32]["skipped"] == "few has no vocab_topk in this version"
    assert not [row for row in found.values() if row is not one and row.get("agrees") and row["op"] != "linear"]
    (case,) = (case for case in table.few_rows(table.TOY) if case.name == "5 rows 64 to 32")
    skipped, good = ops.measure(case, torch.float32, "cpu", ["few", "reference"], **RATES)
    assert "seconds" not in skipped and good["seconds"] > 0


def test_a_decoding_step_has_every_op_of_it() -> None:
    found = list(table.few_rows(table.TOY))
    for case in found:
        assert ops.checked(case, torch.float32, "cpu", "reference")["agrees"]
    assert len({(case.op, case.name) for case in found}) == len(found) == 2 * 9
    step = {"linear", "vocab_topk", "disentangled_attention", "attention", "add_layer_norm", "pre_norm"}
    assert {case.op for case in found} == step | {"masked_embedding"}
    attention = next(case for case in found if (case.op, case.name) == ("attention", "5 queries, 64 keys"))
    assert attention.flops == 4 * 5 * 64 * 32


def test_inputs_are_drawn_anew_for_every_set() -> None:
    case = next(case for case in table.cases(table.TOY, [9]) if case.op == "linear")
    first, second = ops.input_sets(case, torch.float32, "cpu")
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], ops.input_sets(case, torch.float32, "cpu")[0][0])


@pytest.mark.parametrize("flags", [["--backends", "bogus"], ["--dtypes", "bogus"], ["--ops", "bogus"]])
def test_what_check_ops_does_not_know(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script("check_ops").main(["--device", "cpu", *flags]) == 2
    assert "'bogus' is not known; choose from" in capsys.readouterr().err


def test_a_named_backend_that_serves_nothing_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("check_ops").main(["--device", "cpu", "--ops", "rotary", "--backends", "reference,cuda"]) == 1
    assert "cuda serves none of these ops here" in capsys.readouterr().out
    assert script("check_ops").main(["--device", "cpu", "--ops", "rotary", "--backends", "reference"]) == 0
