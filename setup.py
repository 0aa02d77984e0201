"""The part of the build that pyproject.toml cannot say: ``kernels/`` is ``mlmfast.kernels``; the extension in csrc/cpu.

The extension needs a C++17 compiler and torch's headers, and no torch at build time: it is written to LibTorch's stable
ABI, so one binary serves torch 2.10 and later and every Python from 3.10. Where the compiler or the headers are
missing, the package is installed without it (`mlmfast doctor` says so). MLMFAST_BUILD_CPU=1 makes that an error, =0
leaves the extension out, auto is the default.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"mlmfast builds with setuptools 77 or newer, found {setuptools.__version__}: "
        'pip install --upgrade "setuptools>=77", or install without --no-build-isolation'
    )

PACKAGES = setuptools.find_packages(include=["mlmfast", "mlmfast.*"])
KERNELS = setuptools.find_packages("kernels")  # its subfolders, if there are any

FOLDER = Path("csrc/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# kernels.cpp is compiled once for each of these, and the best that a processor has is chosen when the package runs.
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16"]
PATHS: dict[str, list[str]] = {"portable": []}
if X86:
    PATHS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _AVX512_BF16}
    PATHS |= {"amx": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c in one rounding; nothing else of fast maths
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC warns of its own AVX-512 headers
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI as of torch 2.10
]


class MissingTool(Exception):
    """What the extension cannot be built without is not here."""


def torch_folder() -> Path:
    """The torch that the package will run with: its headers are read and its library linked, it is never imported.

    An isolated build has another sys.path, but the same interpreter, whose site-packages are where they were.
    """
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    for root in filter(None, roots):
        folder = Path(root, "torch")
        if Path(folder, "include", "torch", "csrc", "stable", "library.h").is_file():
            return folder
    raise MissingTool("no torch 2.10 or newer in this environment: install torch first")


def compiler() -> str:
    """The C++ compiler: $CXX, else the first of the usual names."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise MissingTool("no C++17 compiler: install g++ 11 or clang 14 or newer, or set CXX")


def ninja() -> str:
    """ninja, from the Python package of that name or from the system."""
    beside = Path(sysconfig.get_path("scripts"), "ninja")
    found = str(beside) if beside.is_file() else shutil.which("ninja")
    if found is None:
        raise MissingTool('no ninja: pip install "ninja"')
    return found


class BuildWithNinja(build_ext):
    """Writes a ninja file for csrc/cpu and runs it: flags differ by file, and only what changed is compiled."""

    def run(self) -> None:
        wish = os.environ.get("MLMFAST_BUILD_CPU", "auto")
        if wish not in ("auto", "0", "1"):
            raise SystemExit(f"MLMFAST_BUILD_CPU={wish} is none of auto, 0, 1")
        if wish == "0":
            self.extensions: list[setuptools.Extension] = []
            return
        try:
            self._build(self.extensions[0])
        except (MissingTool, subprocess.CalledProcessError) as error:
            if wish == "1":
                raise SystemExit(f"mlmfast._cpu could not be built: {error}") from error
            print(f"mlmfast is installed without its compiled extension, so slower: {error}", file=sys.stderr)
            self.extensions = []  # nothing to copy, nothing to list

    def _build(self, extension: setuptools.Extension) -> None:
        if os.name == "nt":
            raise MissingTool("the extension is written for GCC and clang")
        torch, cxx, tool = torch_folder(), compiler(), ninja()
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        work = Path(self.build_temp, "cpu").resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        mac = sys.platform == "darwin"
        includes = [f"-isystem {torch / 'include'}", f"-isystem {sysconfig.get_path('include')}"]
        python = "-undefined dynamic_lookup" if mac else ""  # Python's own symbols come from the interpreter
        lines = [
            f"flags = {' '.join(FLAGS)} {os.environ.get('CXXFLAGS', '')}",
            f"includes = {' '.join(includes)}",
            "rule compile",
            f"  command = {cxx} $flags $includes $own -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            f"  command = {cxx} -shared $in -o $out -L{torch / 'lib'} -ltorch_cpu {python}",
            "  description = $out",
        ]
        objects = []
        for source in sorted(FOLDER.glob("*.cpp")):
            # kernels.cpp sees neither torch's nor Python's headers, so it may be compiled for any processor.
            variants = PATHS if source.stem == "kernels" else {"": []}
            for path, own in variants.items():
                name = f"{source.stem}{path and '_'}{path}.o"
                lines.append(f"build {name}: compile {source.resolve()}")
                lines.append(f"  own = {' '.join(own)} {path and '-DMLMFAST_PATH=' + path}")
                objects.append(name)
        lines += [f"build {target}: link {' '.join(objects)}", ""]
        Path(work, "build.ninja").write_text("\n".join(lines))
        subprocess.run([tool, "-C", str(work)], check=True)


setuptools.setup(
    packages=[*PACKAGES, "mlmfast.kernels", *(f"mlmfast.kernels.{name}" for name in KERNELS)],
    package_dir={"mlmfast": "mlmfast", "mlmfast.kernels": "kernels"},
    package_data={"mlmfast": ["py.typed", "tiny/*"]},
    include_package_data=False,
    ext_modules=[setuptools.Extension("mlmfast._cpu", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
