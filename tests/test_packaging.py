"""From the sources to an archive, to a wheel, to a package that works from another folder."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mlmfast

pytest.importorskip("build", reason="the package build makes the archives: pip install build")

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "NOTICE")
COMPILERS = ("c++", "g++", "clang++")
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", *DOCUMENTS)

# Run outside the checkout, whose editable install must not be what is imported: hence the look at __file__.
PROBE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import mlmfast, mlmfast.cpu, mlmfast.kernels
for module in (mlmfast, mlmfast.kernels):
    assert module.__file__.startswith(sys.argv[1]), f"{module.__name__} came from {module.__file__}"
score = mlmfast.load("tiny").score(["The cat sat on the mat."])[0]
assert len(score) > 4 and score.total < 0, score
print(mlmfast.__version__)
print(mlmfast.cpu.instructions())
"""


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Run this interpreter with the arguments ``command`` and return its output; a failure shows both streams."""
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def skip_without_index(scratch: Path) -> None:
    """An isolated build fetches setuptools; skip where no package index can be reached."""
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--retries=0", "--timeout=10", "setuptools>=77"]
    done = subprocess.run([sys.executable, *command], cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"an isolated build needs a package index: {reason}")


def files_below(folder: Path) -> set[str]:
    """Paths relative to ``folder`` of every file that belongs to a package there."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether the wheel of this parameter must hold the extension."""
    return COMPILER is not None and "no-isolation" in getattr(request, "param", request.node.name)


@pytest.fixture(scope="module", params=["isolated", "no-isolation", "no compiler"])
def archives(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it, of a copy of the sources (building leaves traces beside them)."""
    if request.param == "no compiler" and any(Path(sys.executable).with_name(name).exists() for name in COMPILERS):
        pytest.skip("a compiler lies beside this Python")
    scratch = tmp_path_factory.mktemp("archives")
    if request.param == "isolated":
        skip_without_index(scratch)
    sources = scratch / "the sources"  # with a space
    sources.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    for name in ("mlmfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    how = ["--no-isolation"] if request.param != "isolated" else []
    # 1: a failure to compile must not pass. An isolated build's environment has no torch, hence no headers.
    variables = {"MLMFAST_BUILD_CPU": "1" if compiled(request) else "auto"}
    if request.param == "no compiler":  # on the path, Python alone
        variables = {"MLMFAST_BUILD_CPU": "auto", "CXX": "", "PATH": str(Path(sys.executable).parent)}
    run("-m", "build", *how, "--outdir", scratch / "dist", sources, cwd=scratch, **variables)
    (sdist,) = (scratch / "dist").glob("*.tar.gz")
    (wheel,) = (scratch / "dist").glob("*.whl")
    return sdist, wheel


def test_archives_hold_everything(archives: tuple[Path, Path], request: pytest.FixtureRequest) -> None:
    sdist, wheel = archives
    package = {name for name in files_below(ROOT / "mlmfast") if not name.endswith(".so")}
    kernels, sources = files_below(ROOT / "kernels"), files_below(ROOT / "csrc")

    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert {f"mlmfast/{name}" for name in package} <= members
    assert {f"kernels/{name}" for name in kernels} <= members
    assert {f"csrc/{name}" for name in sources} <= members
    assert set(SOURCES) <= members
    assert not any(name.endswith(".so") for name in members)

    with zipfile.ZipFile(wheel) as archive:
        members = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"mlmfast/{name}" for name in package} | {f"mlmfast/kernels/{name}" for name in kernels}
    if compiled(request):
        expected.add("mlmfast/_cpu.abi3.so")  # one for every Python and torch
        assert "-cp310-abi3-" in wheel.name
    else:
        assert "-py3-none-any" in wheel.name  # one of a platform would hide the source archive, which can compile
    assert members == expected


def test_metadata(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        (place,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_string(archive.read(place).decode())
        scripts = archive.read(place.replace("METADATA", "entry_points.txt")).decode()
    assert fields["Version"] == mlmfast.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    required = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert 'triton>=3.6; sys_platform == "linux"' in required
    assert "torch>=2.10" in required
    assert "mlmfast = mlmfast.cli:main" in scripts


def test_wheel_works_from_another_folder(
    archives: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, archives[1], cwd=elsewhere)
    version = run("-c", PROBE, target, cwd=elsewhere, PYTHONPATH=str(target), HF_HUB_OFFLINE="1")
    lines = version.splitlines()
    assert lines[0] == mlmfast.__version__
    assert (lines[1] == "None") is not compiled(request), f"instructions: {lines[1]}"
