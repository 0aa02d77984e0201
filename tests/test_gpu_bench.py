"""``make gpu-bench`` on toy shapes: its order, its budget, its capping, and what is left when it is killed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mlmfast import backends, cpu
from mlmfast.bench import machine, peers
from mlmfast.bench.peers import HuggingFaceEager, HuggingFaceScored
from mlmfast.bench.pll import Bench
from mlmfast.bench.shapes import SHAPES
from mlmfast.bench.work import Peak, attention_dots
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, str(ROOT / "benchmarks" / "from_checkout.py")]
# Ops are measured by the backend cpu here, all of which needs the compiled kernels.
compiled = pytest.mark.skipif(cpu.instructions() is None, reason="the compiled kernels are not built here")
RATES: dict[str, Any] = {"matrix_rate": 1e12, "bandwidth": 1e12, "rounds": 1}
QUICK = ["--device", "cpu", "--toy", "--rounds", "2", "--peers", "hf,hf-scored"]


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """``benchmarks/gpu.py``, imported as it is when it runs: beside the files that it imports."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def ops(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("bench_ops")


@pytest.fixture(scope="module")
def table(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("op_table")


def strict(path: Path) -> Any:
    """JSON as other languages read it: no NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def arguments(gpu: ModuleType, *more: str) -> argparse.Namespace:
    return gpu.parsed([*QUICK, *more])


def result_of(gpu: ModuleType, folder: Path) -> Any:
    return gpu.Result(folder / "gpu.json", {"device": "none"})


# ---- the whole of it


@compiled
def test_the_whole_script_on_toy_shapes(gpu: ModuleType, tmp_path: Path) -> None:
    lengths = ["--lengths", "9,70", "--dtypes", "float32"]
    assert gpu.main([*QUICK, *lengths, "--results", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == machine.slug(machine.cpu_name())
    result = strict(folder / "gpu.json")
    assert result["finished"]
    assert {(row["shape"], row["length"], row["peer"]) for row in result["rows"]} == {
        ("toy-deberta", 9, "hf-eager"),
        ("toy-deberta", 9, "hf-scored"),
        ("toy-deberta", 70, "hf-eager"),
        ("toy-deberta", 70, "hf-scored"),
        ("toy-roberta", 9, "hf-eager"),  # whose table ends at 64
        ("toy-roberta", 9, "hf-scored"),
    }
    assert all(row["ratio"] > 0 and row["copies"] == {9: 32, 70: 4}[row["length"]] for row in result["rows"])
    assert all(check["agrees"] for check in result["checks"])
    named = {"disentangled_attention", "attention", "linear", "add_layer_norm", "masked_embedding"}
    named |= {"pre_norm", "vocab_logprob", "vocab_topk", "rotary"}
    assert {check["op"] for check in result["checks"]} == {row["op"] for row in result["ops"]} == named
    assert {row["backend"] for row in result["ops"]} == {"cpu", "reference"}
    table = (folder / "gpu.md").read_text()
    assert table.count("| toy-deberta |") == 4
    assert "## The ops one by one" in table
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_the_whole_script_on_a_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    flags = ["--device", "cuda", "--toy", "--rounds", "2", "--peers", "hf,hf-scored", "--lengths", "9,70"]
    gpu.main([*flags, "--results", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    result = strict(folder / "gpu.json")
    assert result["finished"]
    assert result["header"]["device"]["name"] == torch.cuda.get_device_name()
    assert not result["failed"]
    assert result["checks"] and all(row["agrees"] for row in [*result["checks"], *result["ops"]])
    assert all(row["ratio"] > 0 for row in result["rows"] if row["dtype"] == "float32")
    references = [row for row in result["ops"] if row["backend"] == "reference"]
    assert {row["timed_by"] for row in references} == {"graph", "events"}


def test_a_bare_checkout_has_its_kernels(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import importlib.util, sys, mlmfast, mlmfast.kernels\n"
        "print(mlmfast.__file__, mlmfast.kernels.__file__, sys.argv[1:], sep='\\n')\n"
        "print(importlib.util.find_spec('mlmfast.kernels.nothing'))\n"
    )
    # -I: no PYTHONPATH, no current folder; whatever is installed besides must not be what is found.
    command = [sys.executable, "-I", LAUNCH[1], str(probe), "--flag"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(ROOT / "mlmfast" / "__init__.py"),
        str(ROOT / "kernels" / "__init__.py"),
        "['--flag']",
        "None",
    ]


def test_a_kill_leaves_what_was_measured(tmp_path: Path) -> None:
    command = [*LAUNCH, str(ROOT / "benchmarks" / "gpu.py"), *QUICK, "--lengths", "9,24", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        found: list[Path] = []
        while not (found and strict(found[0])["ops"]):  # every state that is met is whole
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
            found = list(tmp_path.glob("*/gpu.json"))
    finally:
        process.kill()
        process.wait()
    left = strict(found[0])
    assert not left["finished"]
    assert left["rows"] and left["header"]["matrix_rates"]


def test_wrong_requests(gpu: ModuleType, tmp_path: Path) -> None:
    for flags in (["--peers", "gpt"], ["--dtypes", "int8"], ["--device", "moon"]):
        assert gpu.main([*QUICK, *flags, "--results", str(tmp_path)]) == 2
    if not torch.cuda.is_available():
        assert gpu.main(["--results", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


# ---- order and budget


def test_what_matters_most_comes_first(gpu: ModuleType) -> None:
    everyone = [*gpu.PEERS, *gpu.COMPILED]
    found = gpu.blocks(gpu.SHAPE_NAMES, ("bfloat16", "float32"), gpu.LENGTHS, everyone)
    order = [case for block in found for case in block]
    assert [(c.shape, c.dtype, c.length) for c in order[:4]] == [
        ("deberta-v3-base", "bfloat16", length) for length in (64, 128, 24, 512)
    ]
    plain = [(c.shape, c.dtype, c.length) for c in order if "hf" in c.against]
    assert len(plain) == len(set(plain))
    assert set(plain) == {
        (shape, dtype, length)
        for shape in gpu.SHAPE_NAMES
        for dtype in ("bfloat16", "float32")
        for length in gpu.LENGTHS
        if length <= 512 or "roberta" not in shape
    }
    for case in order:
        assert ("disentangled-flash" in case.against) <= case.shape.startswith("deberta")
    assert not any(case.length > 512 for block in found[:6] for case in block)
    assert [c for block in gpu.blocks(["roberta-base"], ["float32"], [64], ["disentangled-flash"]) for c in block] == []


def test_the_budget_is_kept(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    ran: list[str] = []

    def step(name: str, guess: float, takes: float) -> Any:
        def run() -> dict[str, list[Any]]:
            ran.append(name)
            clock[0] += takes
            if name == "fails":
                raise torch.OutOfMemoryError("no room")
            return {"checks": [{"agrees": True}]}

        return gpu.Step(name, guess, run)

    result = result_of(gpu, tmp_path)
    todo = [step("first", 5, 9), step("fails", 5, 1), step("too long", 11, 1), step("fits", 9, 9), step("late", 5, 1)]
    gpu.carry_out(iter(todo), result, budget=20)
    assert ran == ["first", "fails", "fits"]
    left = strict(result.path)
    assert left["not_run"] == ["too long", "late"]
    assert left["failed"] == [{"step": "fails", "reason": "OutOfMemoryError: no room"}]
    assert not result.agrees


def test_results_hold_no_nan(gpu: ModuleType, tmp_path: Path) -> None:
    result = result_of(gpu, tmp_path)
    result.add({"checks": [{"agrees": False, "error": float("nan"), "more": (1.5, float("inf"))}]})
    assert strict(result.path)["checks"] == [{"agrees": False, "error": None, "more": [1.5, None]}]
    assert not result.agrees


# ---- passes


class Paced:
    """A bench whose slower side takes a time a copy, and twice that from so many copies on."""

    def __init__(self, seconds_a_copy: float, doubled: int = 1000) -> None:
        self.seconds_a_copy, self.doubled, self.tries = seconds_a_copy, doubled, 0

    def texts(self, length: int, copies: int) -> int:
        return copies

    def tried(self, copies: int, labels: list[str]) -> dict[str, float]:
        self.tries += 1
        return {"": 0.0, "hf": self.seconds_a_copy * copies * (2 if copies >= self.doubled else 1)}


@pytest.mark.parametrize(("seconds_a_copy", "copies"), [(1e-6, 64), (0.004, 64), (0.047, 8), (9.0, 1)])
def test_copies_are_cut_to_what_a_repeat_may_take(gpu: ModuleType, seconds_a_copy: float, copies: int) -> None:
    bench = Paced(seconds_a_copy)
    assert gpu.capped(bench, 64, ["hf"], 6400, 0.5) == copies
    assert bench.tries <= 2


def test_a_probe_that_underrates_the_whole_is_not_the_last_word(gpu: ModuleType) -> None:
    assert gpu.capped(Paced(0.004, doubled=60), 64, ["hf"], 6400, 0.5) == 32  # 64 take 0.512 s


def test_batches_divide_the_copies(gpu: ModuleType) -> None:
    for copies in (1, 2, 3, 127, 128, 511, 512, 1023, 2730):
        rounded = gpu.even(copies)
        assert copies / 2 < rounded <= copies
        for batch in (1, 32, 256, 512):
            assert rounded % min(batch, rounded) == 0
    assert gpu.even(2730) == 2560


def test_a_pass_is_cut(gpu: ModuleType) -> None:
    passes = gpu.Passes(arguments(gpu, "--most-seconds", "1e-9"), ((32, 32, 32),))
    found = passes.run(gpu.Case("toy-roberta", "float32", 9, ("hf",)))
    assert [row["copies"] for row in found["rows"]] == [1]
    assert passes.rates["float32"] > 0


def test_a_failing_peer_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HuggingFaceScored.logprobs
    calls = [0]

    def fails_third(self: Any, plan: MaskPlan) -> Any:
        calls[0] += 1
        if calls[0] >= 3:  # in the timed rounds
            raise RuntimeError("a kernel\n  was lost")
        return honest(self, plan)

    class Large(HuggingFaceEager):
        name = "large"

        def logprobs(self, plan: MaskPlan) -> Any:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(HuggingFaceScored, "logprobs", fails_third)
    monkeypatch.setitem(peers.PEERS, "large", Large)
    peak = Peak(torch.float32, ((32, 32, 32),))
    peak.sample()
    bench = Bench("toy-roberta", against=["hf", "hf-scored", "large"], keep_going=True)
    texts = bench.texts(9, 7)
    rows = {m.row.peer: m for m in bench.measure(texts, "random", pairs=3, peak=peak)}
    assert rows["hf-scored"].details["failure"] == "RuntimeError: a kernel was lost"
    assert rows["large"].details["failure"] == "OutOfMemoryError: no room"
    for name in ("hf-scored", "large"):
        row = rows[name].row
        assert (row.ratio, row.max_abs_diff, rows[name].details["agrees"]) == (None, None, False)
    honest_row = rows["hf-eager"]
    assert honest_row.row.ratio is not None
    assert len(honest_row.details["ratio"]["all"]) == 3  # all the rounds anew, without the one that failed
    with pytest.raises(torch.OutOfMemoryError):
        Bench("toy-roberta", against=["large"]).measure(texts, "random", pairs=1, peak=peak)


def test_peers_of_another_device_are_refused() -> None:
    with pytest.raises(RequestError, match="computes on cpu here, not on cuda"):
        peers.named(["openvino"], "float32", "cuda")
    assert set(peers.named(["hf", "hf-scored", "hf-compile"], "bfloat16", "cuda")) == {"hf", "hf-scored", "hf-compile"}


def test_on_a_gpu_batches_are_bounded_by_memory() -> None:
    """Meta tensors stand for a GPU: nothing is computed, the rule alone is asked."""
    shape = SHAPES["deberta-v3-base"]
    with torch.device("meta"):
        model = shape.model_class(shape.config_class(**shape.settings)).to(torch.bfloat16)
    subject = peers.Subject(model, shape.tokenizer(), "bfloat16")
    peer = HuggingFaceEager(subject)
    bench = Bench("toy-deberta")
    sizes = {}
    for length in (24, 512, 2048):
        plan = bench.plan(shape.texts(length, 2))
        peer._choose_batch(plan)
        sizes[length] = peer.batch
    # Numbers of 2 bytes in 4 GiB: 698 copies' logits, then 32 and 8.
    assert sizes == {24: 512, 512: 32, 2048: 8}


# ---- ops


def test_work_of_attention_by_hand(table: ModuleType) -> None:
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


def test_bytes_are_inputs_once_and_outputs_once(table: ModuleType, ops: ModuleType) -> None:
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
def test_a_wrong_op_gets_no_speed(table: ModuleType, ops: ModuleType, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_op_that_fails_says_why(table: ModuleType, ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_a_backend_does_not_take_is_skipped_with_the_reason(table: ModuleType, ops: ModuleType) -> None:
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


def test_a_decoding_step_has_every_op_of_it(table: ModuleType, ops: ModuleType) -> None:
    found = list(table.few_rows(table.TOY))
    for case in found:
        assert ops.checked(case, torch.float32, "cpu", "reference")["agrees"]
    assert len({(case.op, case.name) for case in found}) == len(found) == 2 * 9
    step = {"linear", "vocab_topk", "disentangled_attention", "attention", "add_layer_norm", "pre_norm"}
    assert {case.op for case in found} == step | {"masked_embedding"}
    attention = next(case for case in found if (case.op, case.name) == ("attention", "5 queries, 64 keys"))
    assert attention.flops == 4 * 5 * 64 * 32


def test_inputs_are_drawn_anew_for_every_set(table: ModuleType, ops: ModuleType) -> None:
    case = next(case for case in table.cases(table.TOY, [9]) if case.op == "linear")
    first, second = ops.input_sets(case, torch.float32, "cpu")
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], ops.input_sets(case, torch.float32, "cpu")[0][0])
