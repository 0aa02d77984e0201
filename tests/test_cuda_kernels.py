"""The CUDA kernels without a GPU: the same source compiled for the host, where a block's threads take turns.

Fragments, barriers, skewed reads, ring of table rows and softmax are the kernel's own; only the few instructions of
``csrc/cuda/device.h`` are emulated. What this cannot show: speed, and that the instructions do what is emulated.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_kernels import ROOT, assert_near, compiled, widened
from op_cases import bounds, randn
from torch import Tensor

from mlmfast.reference.attention import attention as plain_attention
from mlmfast.reference.disentangled_attention import disentangled_attention as plain

# How many of each the extension has, of widths, rows and dtypes.
KERNELS = {
    "attend_blocks": 6,
    "attend_queries": 6,
    "attend_plainly": 6,
    "linear_tiles": 12,
    "add_layer_norm_rows": 2,
    "masked_embedding_rows": 2,
    "topk_parts_of": 6,
    "topk_rows": 1,
}


class Attention(ctypes.Structure):
    """``Attention`` of csrc/cuda/disentangled_attention_kernel.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "pos_key", "pos_query", "out")),
        *((name, ctypes.c_void_p) for name in ("cu_q", "cu_k", "q_positions", "buckets")),
        *(
            (f"{name}_{of}", ctypes.c_int64)
            for name in ("q", "k", "v", "out", "key", "query")
            for of in ("row", "head")
        ),
        ("reach", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("log2_scale", ctypes.c_float),
    ]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    function = compiled("disentangled_attention", tmp_path_factory.mktemp("emulated")).disentangled_attention

    def call(few: bool, *given: Any, window: int = -1) -> Tensor:
        q, k, v, pos_key, pos_query, buckets, cu_q, cu_k, most, _, places, scale = given
        out = torch.full_like(q, torch.nan)
        rows = {"q": q, "k": k, "v": v, "out": out, "key": pos_key, "query": pos_query}
        strides = {
            f"{name}_{of}": 0 if x is None else x.stride(axis)
            for name, x in rows.items()
            for axis, of in enumerate(("row", "head"))
        }
        pointers = {"q": q, "k": k, "v": v, "pos_key": pos_key, "pos_query": pos_query, "out": out}
        pointers |= {"cu_q": cu_q, "cu_k": cu_k, "q_positions": places, "buckets": buckets}
        a = Attention(
            **{name: None if x is None else x.data_ptr() for name, x in pointers.items()},
            **strides,
            reach=0 if buckets is None else len(buckets) // 2,
            width=q.shape[2],
            window=window,
            log2_scale=scale * 1.4426950408889634,
        )
        half = q.dtype == torch.float16
        assert function(ctypes.byref(a), len(cu_q) - 1, q.shape[1], len(q), most, int(few), int(half)) == 0
        return out

    return call


def arguments(lengths: list[int], width: int, dtype: torch.dtype, terms: str, reach: int, heads: int = 2) -> list[Any]:
    """Buckets in no order, so that a formula for the table, or a swapped sign, shows; rows lie in one product."""
    together = randn(sum(lengths), 3, heads, width, seed=1).to(dtype)
    tables = [randn(37, heads, width, seed=seed).to(dtype) for seed in (2, 3)]
    buckets = torch.randint(0, 37, (2 * reach + 1,), generator=torch.Generator().manual_seed(4)).int()
    bound = bounds(lengths)
    return [
        *together.unbind(1),
        tables[0] if "c2p" in terms else None,
        tables[1] if "p2c" in terms else None,
        buckets,
        bound,
        bound,
        max(lengths),
        max(lengths),
        None,
        (3 * width) ** -0.5,
    ]


def check(found: Tensor, given: list[Any]) -> None:
    """Within twice the error of plain torch in the dtype, plus 1e-3, of plain torch in float64."""
    assert_near(found, plain(*widened(given)), plain(*given))


@pytest.mark.parametrize("terms", ["c2p p2c", "c2p", "p2c", ""])
@pytest.mark.parametrize("few", [False, True], ids=["blocks", "few"])
def test_terms(emulated: Callable[..., Tensor], terms: str, few: bool) -> None:
    given = arguments([70, 3, 64], 64, torch.bfloat16, terms, reach=50)
    check(emulated(few, *given), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("few", [False, True], ids=["blocks", "few"])
def test_widths(emulated: Callable[..., Tensor], width: int, dtype: torch.dtype, few: bool) -> None:
    given = arguments([65, 17], width, dtype, "c2p p2c", reach=20)
    check(emulated(few, *given), given)


@pytest.mark.parametrize("lengths", [[1], [2, 1, 1, 3], [15, 16, 17], [63, 64, 65], [191, 1], [193]], ids=str)
@pytest.mark.parametrize("few", [False, True], ids=["blocks", "few"])
def test_lengths(emulated: Callable[..., Tensor], lengths: list[int], few: bool) -> None:
    given = arguments(lengths, 32, torch.bfloat16, "c2p p2c", reach=150, heads=1)
    check(emulated(few, *given), given)


@pytest.mark.parametrize("reach", [0, 1, 63, 64, 300])
def test_reach_of_the_bucket_table(emulated: Callable[..., Tensor], reach: int) -> None:
    given = arguments([130], 32, torch.bfloat16, "c2p p2c", reach=reach, heads=1)
    check(emulated(False, *given), given)


def test_few_queries_at_any_places(emulated: Callable[..., Tensor]) -> None:
    given = arguments([300, 20, 5], 64, torch.bfloat16, "c2p p2c", reach=100)
    places = torch.tensor([299, 0, 150, 150, 3, 1])  # the second sequence asks nothing
    given[0] = randn(6, 2, 64, seed=9).bfloat16()
    given[6], given[8], given[10] = bounds([4, 0, 2]), 4, places
    check(emulated(True, *given), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [-1, 0, 1, 40, 1 << 30])
def test_attention_of_few_queries_without_tables(
    emulated: Callable[..., Tensor], window: int, dtype: torch.dtype
) -> None:
    q, k, v, *_ = arguments([300, 20, 5], 64, dtype, "", reach=0)
    places = torch.tensor([299, 0, 150, 259, 3, 1])
    q, cu_q, cu_k = q[:6], bounds([4, 0, 2]), bounds([300, 20, 5])
    given = [q, k, v, cu_q, cu_k, 4, 300, places, 0.125, window]
    found = emulated(True, q, k, v, None, None, None, cu_q, cu_k, 4, 300, places, 0.125, window=window)
    assert_near(found, plain_attention(*widened(given)), plain_attention(*given))


def test_attention_of_queries_that_are_the_keys_rows(emulated: Callable[..., Tensor]) -> None:
    q, k, v, *_, cu, most, _, _, _ = arguments([5, 1, 9], 32, torch.bfloat16, "", reach=0)
    given = [q, k, v, cu, cu, most, most, None, 0.2, 3]
    found = emulated(True, q, k, v, None, None, None, cu, cu, most, most, None, 0.2, window=3)
    assert_near(found, plain_attention(*widened(given)), plain_attention(*given))


# ---- compiled for GPUs


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The CUDA extension alone, into a folder."""
    environment = os.environ | {"MLMFAST_BUILD_CPU": "0", "MLMFAST_BUILD_CUDA": "1"} | variables
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "work"),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


LOAD = """
import ctypes, importlib.util, sys, torch
from mlmfast import cuda
library, stream = sys.argv[1:]
if torch.version.cuda is None:
    ctypes.CDLL(stream)  # as torch loads its own: for itself alone
importlib.util.module_from_spec(importlib.util.spec_from_file_location("mlmfast._cuda", library))
assert torch.ops.mlmfast_cuda.version() == cuda.VERSION, torch.ops.mlmfast_cuda.version()
"""


def check_that_it_loads(library: Path, folder: Path) -> None:
    """Beside torch's CUDA half or a stand-in with all that the extension takes from it, as its Python's version."""
    source, stream = folder / "stream.cpp", folder / "libstream.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void **) { return 1; }')
    name = "-Wl,-soname,libtorch_cuda.so"
    subprocess.run(["c++", "-shared", "-fPIC", name, str(source), "-o", str(stream)], check=True)
    command = [sys.executable, "-c", LOAD, str(library), str(stream)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_extension_compiles_without_spills(tmp_path: Path) -> None:
    """For both kinds of GPU, beside any torch, with tensor-core instructions where products are."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").is_file():
        pytest.skip("no nvcc")
    pytest.importorskip("triton", reason="cuobjdump comes with it")
    done = build(tmp_path, TORCH_CUDA_ARCH_LIST="8.0;9.0a")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "mlmfast._cuda: built for sm_80, sm_90a and the PTX of compute_90, by " in done.stderr
    (library,) = (tmp_path / "mlmfast").glob("_cuda*.so")
    assert library.name == "_cuda.abi3.so" or not hasattr(sys, "_is_gil_enabled")
    check_that_it_loads(library, tmp_path)
    command = [
        sys.executable,
        str(ROOT / "benchmarks/cuda_resources.py"),
        str(library),
        "--output",
        str(tmp_path / "found"),
    ]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {entry["architecture"] for entry in found} == {"sm_80", "sm_90a"}
    kernels = Counter(entry["kernel"].partition("<")[0] for entry in found)
    assert kernels == {name: 2 * count for name, count in KERNELS.items()}
    multiplying = [entry for entry in found if entry["kernel"].startswith(("attend_blocks", "linear_", "topk_parts"))]
    assert len(multiplying) == 48 and all(entry["tensor_core"] > 0 for entry in multiplying)
    assert not any(entry["stack"] for entry in found)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA_HOME": "/nowhere"}, "mlmfast._cuda cannot be built: no nvcc in /nowhere/bin"),
        ({"MLMFAST_BUILD_CUDA": "2"}, "MLMFAST_BUILD_CUDA=2 is none of auto, 0, 1"),
        ({"TORCH_CUDA_ARCH_LIST": "hopper"}, "'hopper' is no compute capability"),
    ],
    ids=["no nvcc", "no such wish", "no such GPU"],
)
def test_what_cannot_be_built_is_an_error(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    if "TORCH_CUDA_ARCH_LIST" in variables and shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    done = build(tmp_path, **variables)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_beside_a_torch_without_cuda_none_is_built(tmp_path: Path) -> None:
    done = build(tmp_path, MLMFAST_BUILD_CUDA="auto")
    assert done.returncode == 0
    assert "mlmfast._cuda: left out: torch here has no CUDA" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
