"""The Triton kernels beyond their ops' tests: compiled for each GPU, and inside whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import NAMES
from op_cases import BACKENDS, bounds, moved, randn, serving
from torch import Tensor

from mlmfast import backends, cuda, machine
from mlmfast.bench import machine as bench_machine
from mlmfast.errors import BackendError
from mlmfast.machine import GPU
from mlmfast.model import MaskedLM

pytest.importorskip("triton", reason="the kernels need triton")
from mlmfast import kernels
from mlmfast.kernels import disentangled_attention as banded
from mlmfast.kernels import launches, vocab_topk
from mlmfast.kernels.add_layer_norm import add_layer_norm
from mlmfast.kernels.vocab_logprob import vocab_logprob
from mlmfast.kernels.vocab_rows import vocab_rows
from mlmfast.reference.disentangled_attention import disentangled_attention as plain_disentangled
from mlmfast.reference.vocab_topk import vocab_topk as plain_topk

ROOT = Path(__file__).parents[1]
CAPABILITIES = (80, 90, 100)
TRITON = next(b for b in BACKENDS if b.name in ("triton", "interpreter"))
CPU = torch.device("cpu")
# What runs kernels runs them on the GPU if there is one, and is among the tests that need it.
on_gpu = pytest.mark.gpu if TRITON.device == "cuda" else pytest.mark.skipif(False, reason="interpreted")


def test_names_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its launches in kernels/configs, and of its folder in benchmarks/results."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert launches.device_name.__wrapped__(torch.device("cuda")) == "nvidia-h200"
    assert bench_machine.slug(bench_machine.device_name("cuda")) == "h200"
    assert bench_machine.slug("NVIDIA A100-SXM4-80GB") == "a100_sxm4_80gb"


# ---- compiled, not run


def start(*arguments: str, code: str | None = None) -> subprocess.Popen[str]:
    """benchmarks/resources.py in a process of its own: in this one the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The checkout itself, whatever is installed.
    begin = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import from_checkout as c; c.use_checkout()"
    script = (
        ["-c", f"{begin}\n{code}"] if code else [str(ROOT / "benchmarks/from_checkout.py"), "benchmarks/resources.py"]
    )
    command = [sys.executable, *script, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def compiling() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """One process a GPU, side by side."""
    running = {c: start("--targets", str(c), "--dtypes", "bfloat16,float32") for c in CAPABILITIES}
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(compiling: dict[int, subprocess.Popen[str]], capability: int) -> None:
    """And within the GPU's shared memory, and without TF32 in float32: else the script says so and exits with 1."""
    out, errors = compiling[capability].communicate()
    assert compiling[capability].returncode == 0, errors
    found = [json.loads(line) for line in out.splitlines()]
    assert {(entry["op"], entry["dtype"]) for entry in found} == {
        (op, dtype) for op in backends.OPS for dtype in ("bfloat16", "float32")
    }
    assert all(entry["registers"] > 0 and entry["capability"] == capability for entry in found)


@pytest.mark.slow
def test_float16_compiles_without_spills() -> None:
    process = start("--dtypes", "float16")
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("plant", "dtype", "fault"),
    [
        ("tiles(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)", "bfloat16", "bytes of stack"),
        ("tiles(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=5)", "bfloat16", "bytes of shared memory where"),
        ("product._unsafe_update_src(product.src.replace('ieee', 'tf32'))", "float32", "TF32 in float32"),
    ],
    ids=["spills", "shared memory", "TF32"],
)
def test_faults_are_found(plant: str, dtype: str, fault: str) -> None:
    code = f"""
import resources
from mlmfast.kernels import attention
from mlmfast.kernels.products import product
def tiles(**chosen):
    attention.usual_banded_launch = lambda *_: chosen
every = resources.cases
resources.cases = lambda dtype: (case for case in every(dtype) if case[1] == "D=128, L=512")
{plant}
resources.main()
"""
    process = start("--targets", "90", "--dtypes", dtype, "--ops", "disentangled_attention", code=code)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert fault in errors


def test_batches_of_other_sizes_are_not_compiled_for_anew() -> None:
    """Counts, lengths and rows change with every batch; a compilation takes seconds."""
    code = """
import resources, torch
from functools import partial
floats, ids = partial(resources.numbers, dtype=torch.float32), partial(resources.numbers, dtype=torch.int64)
kinds = set()
for length, copies in ((33, 1), (48, 16), (63, 31), (64, 128)):
    rows = floats(copies * length, 12, 64)
    bounds = resources.numbers(copies + 1, dtype=torch.int32)
    tables = floats(512, 12, 64), floats(512, 12, 64), resources.numbers(1023, dtype=torch.int32)
    wide, vector = floats(copies * length, 768), floats(768)
    scored = copies * 5
    with resources.recording() as launches:
        resources.op("disentangled_attention")(rows, rows, rows, *tables, bounds, bounds, length, length, None, 0.1)
        resources.op("attention")(rows, rows, rows, bounds, bounds, length, length, None, 0.1, length)
        bias = floats(12, 257)
        resources.op("attention")(rows, rows, rows, bounds, bounds, length, length, None, 0.1, -1, bias)
        resources.op("add_layer_norm")(wide, wide, vector, vector, vector, 1e-7)
        resources.op("pre_norm")(wide, wide, vector, vector, vector, 1e-7)
        resources.op("linear")(wide, floats(3072, 768), floats(3072), "gelu")
        resources.op("masked_embedding")(ids(len(wide)), ids(scored), copies, floats(999, 768), norm_weight=vector)
        head = wide[:scored], floats(999, 768), floats(999)
        resources.op("vocab_logprob")(*head, ids(scored), ids(scored), ranks=True, entropies=True)
        resources.op("vocab_topk")(*head, copies % 7 + 1)
        resources.op("vocab_rows")(*head)
        resources.op("rotary")(rows, floats(512, 32), floats(512, 32), ids(len(rows)))
    kinds.add(frozenset(launches))
for kind in set().union(*kinds) - frozenset.intersection(*kinds):
    print(kind)
"""
    process = start(code=code)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not out


@pytest.mark.parametrize("name", ["triton_resources", "triton_resources_3.6.0"])
def test_the_committed_tables_are_of_these_kernels(name: str) -> None:
    """Every kernel stands in them, none with a fault. (It does not follow from this that they are of today's text.)"""
    table = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["kernels"]
    assert {entry["capability"] for entry in table} == set(CAPABILITIES)
    assert {entry["op"] for entry in table} == set(backends.OPS)
    assert not [entry for entry in table if entry["faults"] or entry["stack"]]


# ---- the choice of backend


def test_why_the_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(kernels.missing("attention", "cpu"))
    monkeypatch.setattr(machine, "gpus", list)
    assert "need a GPU" in str(kernels.missing("attention", "cuda"))
    monkeypatch.setattr(machine, "gpus", lambda: [GPU("older", (7, 5), 1)])
    assert "capability 8.0 or newer, and this GPU has 7.5" in str(kernels.missing("attention", "cuda"))
    monkeypatch.setattr(machine, "gpus", lambda: [GPU("newer", (9, 0), 1)])
    assert kernels.missing("attention", "cuda") is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in str(kernels.missing("attention", "cuda"))
    assert kernels.missing("attention", "cpu") is None


def test_cuda_comes_before_triton_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda op, device: None)
    for problem, chosen in ((None, "cuda"), ("MLMFAST_BUILD_CUDA=1", "triton")):
        monkeypatch.setattr(cuda, "missing", lambda op, device, problem=problem: problem)
        backends.choose.cache_clear()
        service = backends.choose("disentangled_attention", "cuda", torch.bfloat16)
        assert service.backend == chosen
        assert ("MLMFAST_BUILD_CUDA=1" in service.reason) is (problem is not None)
        wide = backends.choose("disentangled_attention", "cuda", torch.float32)
        assert wide.backend == "triton" and "float16 and bfloat16, not float32" in wide.reason
        assert "cuda has no rotary" in backends.choose("rotary", "cuda", torch.bfloat16).reason
    backends.choose.cache_clear()


def test_triton_is_the_first_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda op, device: None)
    monkeypatch.setattr(cuda, "missing", lambda op, device: "cuda is not installed")
    backends.choose.cache_clear()
    try:
        for op in backends.OPS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert backends.choose(op, "cuda", dtype).backend == "triton"
            assert backends.choose(op, "cuda", torch.float64).backend == "reference"
            assert backends.choose(op, "cpu", torch.float16).backend == "reference"  # the interpreter is never chosen
        with pytest.raises(BackendError, match="does not run on cpu"):
            backends.choose("linear", "cpu", torch.float32, "triton")
    finally:
        backends.choose.cache_clear()


# ---- what the op tests' small shapes do not reach


@on_gpu
def test_heads_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands larger than may be held at once: some heads after others, down to one."""
    lengths, heads, width = [20, 5], 5, 8
    q, k, v, pos_key = (randn(25, heads, width, seed=seed) for seed in range(4))
    buckets = torch.arange(-30, 31).clamp(-12, 12).add(12).int()
    shared = (buckets, bounds(lengths), bounds(lengths), 20, 20, None, 0.3)
    given = moved((q, k, v, pos_key, pos_key.flip(0), *shared), TRITON, torch.float32)
    right = plain_disentangled(*given)
    groups: list[int] = []
    attend = banded.attend

    def counting(q: Tensor, *rest: Any, **options: Any) -> None:
        groups.append(q.shape[1])
        attend(q, *rest, **options)

    monkeypatch.setattr(banded, "attend", counting)
    for most, expected in ((1 << 30, [5]), (50 * 25 * 4 * 3, [3, 2]), (1, [1] * 5)):
        monkeypatch.setattr(banded, "BANDS", most)
        groups.clear()
        with serving(TRITON):
            torch.testing.assert_close(banded.disentangled_attention(*given), right, rtol=0, atol=1e-5)
        assert groups == expected


@on_gpu
def test_topk_in_chunks_and_many(monkeypatch: pytest.MonkeyPatch) -> None:
    given = moved((randn(7, 8, seed=1), randn(300, 8, seed=2), randn(300, seed=3)), TRITON, torch.float32)
    for candidates, k in ((1 << 23, 3), (40, 3), (1 << 23, 100), (700, 100), (1 << 23, 300)):
        monkeypatch.setattr(vocab_topk, "CANDIDATES", candidates)
        got, right = vocab_topk.vocab_topk(*given, k), plain_topk(*given, k)
        torch.testing.assert_close(got[0], right[0], rtol=0, atol=1e-5)
        assert torch.equal(got[1], right[1])


@on_gpu
def test_fewer_tokens_that_can_be_than_are_wanted() -> None:
    """Forbidden tokens, logit -inf, come after the others, each once."""
    hidden, words = (x.to(TRITON.device).float() for x in (randn(2, 8, seed=1), randn(70, 8, seed=2)))
    bias = torch.full((70,), -torch.inf, device=TRITON.device)
    bias[[5, 66, 12]] = 0
    logprobs, ids = vocab_topk.vocab_topk(hidden, words, bias, 6)
    right, _ = plain_topk(hidden, words, bias, 6)
    torch.testing.assert_close(logprobs, right, rtol=0, atol=1e-5)
    for row in ids.tolist():
        assert len(set(row)) == 6 and set(row[:3]) == {5, 66, 12} and all(0 <= token < 70 for token in row)


@on_gpu
def test_a_target_that_is_no_token_is_not_a_number() -> None:
    hidden, words = (x.to(TRITON.device).float() for x in (randn(2, 8, seed=1), randn(70, 8, seed=2)))
    targets, rows = (torch.tensor(x, device=TRITON.device) for x in ([70, -1, 3], [0, 0, 1]))
    logprobs = vocab_logprob(hidden, words, None, targets, rows)[0]
    assert logprobs.isnan().tolist() == [True, True, False]


@on_gpu
def test_the_best_token_has_rank_one() -> None:
    """The second product equals the first to the last bit, so that a target is not above itself."""
    hidden, words = (x.to(TRITON.device).float() for x in (randn(40, 24, seed=1), randn(900, 24, seed=2)))
    best = (hidden @ words.T).argmax(1)
    ranks = vocab_logprob(hidden, words, None, best, torch.arange(40, device=TRITON.device), ranks=True)[1]
    assert ranks.tolist() == [1] * 40


@on_gpu
def test_results_are_float32_whatever_torch_makes_by_default() -> None:
    given = [x.to(TRITON.device).float() for x in (randn(3, 8, seed=1), randn(70, 8, seed=2))]
    targets = torch.arange(3, device=TRITON.device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = vocab_logprob(*given, None, targets, targets, entropies=True)[::2]
        found += (vocab_topk.vocab_topk(*given, None, 3)[0], vocab_rows(*given, None))
    finally:
        torch.set_default_dtype(before)
    assert {x.dtype for x in found} == {torch.float32}
    torch.testing.assert_close(found[3], (given[0] @ given[1].T).log_softmax(1), rtol=0, atol=1e-5)


@on_gpu
def test_bands_beyond_float16() -> None:
    """Unscaled, what a position adds may be more than float16 holds."""
    lengths = [20, 5]
    q, k, v = (randn(25, 2, 16, seed=seed) for seed in range(3))
    tables = randn(25, 2, 16, seed=4) * 2000
    buckets = torch.arange(-30, 31).clamp(-12, 12).add(12).int()
    shared = (buckets, bounds(lengths), bounds(lengths), 20, 20, None, 1e-3)
    given = moved((q * 40, k, v, tables, None, *shared), TRITON, torch.float16)
    assert (given[0].float().amax() * given[3].float().amax()) > 65504
    with serving(TRITON):
        found = banded.disentangled_attention(*given)
    right = plain_disentangled(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))
    torch.testing.assert_close(found.double(), right, rtol=0, atol=0.05)


def test_tables_of_different_lengths_are_refused() -> None:
    given = [randn(5, 2, 16).float() for _ in range(3)]
    tables = [randn(rows, 2, 16).float() for rows in (25, 40)]
    shared = (torch.zeros(61, dtype=torch.int32), bounds([5]), bounds([5]), 5, 5, None, 0.3)
    with pytest.raises(ValueError, match="as many rows"):
        banded.disentangled_attention(*given, *tables, *shared)


@on_gpu
def test_an_empty_launch_is_none() -> None:
    """A grid of no programs is an error on a GPU."""
    empty = torch.empty(0, 8, device=TRITON.device)
    assert add_layer_norm(empty, None, None, empty.new_ones(8), None, 1e-5).shape == (0, 8)


# ---- whole models


@pytest.mark.skipif(TRITON.name != "interpreter", reason="the models stay on the CPU; tests/test_gpu.py moves them")
@pytest.mark.parametrize("name", NAMES)
def test_models_score_as_they_do_in_plain_torch(
    lms: dict[str, MaskedLM], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["The cat sat.", "A dog", "Cats and dogs sat down there."]
    lm = lms[name]

    monkeypatch.setattr(lm, "_backend", "reference")
    right = lm.score(texts, ranks=True, entropies=True)
    monkeypatch.setattr(lm, "_backend", "interpreter")
    got = lm.score(texts, ranks=True, entropies=True)
    for a, b in zip(right, got):
        torch.testing.assert_close(torch.tensor(b.logprobs), torch.tensor(a.logprobs), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(b.entropies), torch.tensor(a.entropies), rtol=1e-4, atol=1e-4)
        assert list(a.ranks) == list(b.ranks)
