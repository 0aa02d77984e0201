"""csrc/cuda compiled for the host: every op by its extension, launched as on a GPU, threads in many orders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_extension import ROOT, build

pytest.importorskip("triton", reason="what the extension does not take goes to Triton")
pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
LIGHT, SLOW = "linear,attention,add_layer_norm,pre_norm,masked_embedding", ("vocab_topk", "disentangled_attention")


def checked(library: Path, ops: str, repeats: int = 2) -> subprocess.CompletedProcess[str]:
    """benchmarks/check_ops.py on a simulated GPU: each repeat's threads take turns in another order."""
    script = [str(ROOT / "tests/simulated_gpu.py"), str(ROOT / "benchmarks/check_ops.py")]
    flags = ["--backends", "cuda", "--dtypes", "bfloat16", "--repeats", str(repeats), "--ops", ops]
    environment = {**os.environ, "SIMULATED_GPU": "reference", "EMULATED_EXTENSION": str(library)}
    return subprocess.run(
        [sys.executable, *script, *flags], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated") / "right")


@pytest.mark.parametrize(
    "ops",
    [
        LIGHT,
        pytest.param("vocab_topk", marks=pytest.mark.slow),
        pytest.param("disentangled_attention", marks=pytest.mark.slow),
    ],
)
def test_ops_are_right_in_every_order_of_threads(library: Path, ops: str) -> None:
    done = checked(library, ops)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "no faults"


# A file of csrc/cuda, what is taken out of it, and the ops that show it.
MISSING = {
    "barrier before sums of warps": ("linear_kernel.h", "\n  sync_block();", "linear"),
}


@pytest.mark.parametrize("missing", MISSING)
def test_a_missing_barrier_is_found(missing: str, tmp_path: Path) -> None:
    file, text, ops = MISSING[missing]
    done = checked(build(tmp_path / "wrong", (file, text, "")), ops)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "off by" in done.stdout or "other bits" in done.stdout
