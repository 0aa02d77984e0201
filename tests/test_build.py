"""What the build says and packs, with compilers that write empty files: seconds, where the real ones take minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {
    # Makes the files it is asked for, and knows every flag but AMX's.
    "compiler": """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -mamx-tile) exit 1;; -o | -MF) : > "$2";; esac
  shift
done
""",
    # Knows every flag, and compiles nothing.
    "broken": """#!/bin/sh
for word; do [ "$word" = -fsyntax-only ] && exit 0; done
echo 'the moon is missing'; exit 1
""",
}

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not (shutil.which("ninja") or Path(sysconfig.get_path("scripts"), "ninja").is_file()),
    reason="the extensions are built by ninja",
)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with the compilers above, and a CUDA toolkit whose nvcc is the first of them."""
    folder = tmp_path / "tools"
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    for name, text in TOOLS.items():
        Path(folder, name).write_text(text)
        Path(folder, name).chmod(0o755)
    shutil.copy(folder / "compiler", folder / "bin" / "nvcc")
    return folder


def run(*command: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    cleared = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLMFAST_", "CUDA_", "TORCH_"))
    }
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=cleared | variables, capture_output=True, text=True, check=False
    )


def outcomes(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that say what became of an extension."""
    return [line for line in done.stderr.splitlines() if line.startswith("mlmfast._")]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"CXX": "{}/compiler", "CUDA_HOME": "{}", "MLMFAST_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a 8.0"},
            [
                "mlmfast._cpu: built for portable",
                "mlmfast._cuda: built for sm_90a, sm_80 and the PTX of compute_90, by {}/bin/nvcc",
            ],
        ),
        (
            {"CXX": "{}/none", "MLMFAST_BUILD_CUDA": "0"},
            [
                "mlmfast._cpu: left out: CXX={}/none: there is no such program",
                "mlmfast._cuda: left out: MLMFAST_BUILD_CUDA=0",
            ],
        ),
        (
            {"CXX": "{}/broken", "MLMFAST_BUILD_CUDA": "0"},
            [
                "mlmfast._cuda: left out: MLMFAST_BUILD_CUDA=0",
                "mlmfast._cpu: left out: it does not compile (see above)",
            ],
        ),
    ],
    ids=["built", "no compiler", "does not compile"],
)
def test_a_line_for_each_extension(tools: Path, tmp_path: Path, variables: dict[str, str], expected: list[str]) -> None:
    """In the way of auto, where a torch with CUDA is not asked for: what is missing is a line, not an error."""
    pytest.importorskip("torch")
    variables = {name: value.format(tools) for name, value in variables.items()}
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "work")
    done = run(sys.executable, "setup.py", "-q", "build_ext", *folders, **variables)
    assert done.returncode == 0, done.stderr
    found = outcomes(done)
    assert len(found) == len(expected)
    for line, beginning in zip(found, expected):
        assert line.startswith(beginning.format(tools))
    if "portable, avx2" in done.stderr:  # an x86-64
        assert f"; {tools}/compiler does not know amx" in found[0]


def test_metadata_says_nothing_of_extensions(tmp_path: Path) -> None:
    """pip asks for it before each build, whose lines are enough."""
    done = run(sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, MLMFAST_BUILD_CPU="0")
    assert done.returncode == 0, done.stderr
    assert outcomes(done) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="no abi3 without the global lock")
def test_make_wheel(tools: Path, tmp_path: Path) -> None:
    """One wheel with both extensions; without CUDA's, none that an earlier build left behind."""
    pytest.importorskip("build", reason="make wheel installs it")
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, sources)
    for name in ("mlmfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # This interpreter is what the Makefile would make, with all it would install.
    venv = sources / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    for stamp in (".created", ".torch", ".builds"):
        (venv / stamp).touch()
    for wish in ("1", "0"):
        variables = {"CXX": f"{tools}/compiler", "CUDA_HOME": str(tools), "MLMFAST_BUILD_CUDA": wish}
        done = run("make", "wheel", cwd=sources, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = (sources / "dist").iterdir()
        assert "-cp310-abi3-" in wheel.name
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        assert {"mlmfast/_cpu.abi3.so", "mlmfast/kernels/attention.py", "mlmfast/tiny/model.safetensors"} <= names
        assert ("mlmfast/_cuda.abi3.so" in names) is (wish == "1")
    done = run("make", "wheel", cwd=sources, CXX=f"{tools}/none")
    assert done.returncode != 0 and "mlmfast._cpu cannot be built" in done.stderr
