"""The part of the build that pyproject.toml cannot say: ``kernels/`` is ``mlmfast.kernels``; the extension in csrc/cpu.

The extension needs a C++17 compiler and torch's headers, and no torch at build time: it is written to LibTorch's stable
ABI, so one binary serves torch 2.10 and later and every Python from 3.10 (a free-threaded one has its own). Where the
compiler or the headers are missing, the package is installed without it (`mlmfast doctor` says so).
MLMFAST_BUILD_CPU=1 makes that an error, =0 builds none, auto is the default.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import site
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
# One binary for every Python, unless it runs without the global lock.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
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
if LIMITED:
    FLAGS.append("-DPy_LIMITED_API=0x030a0000")


class MissingTool(Exception):
    """What the extension cannot be built without is not here."""


def torch_folder() -> Path:
    """The torch that the package will run with: its headers are read and its library linked, it is never imported.

    pip's isolated builds have another sys.path, but the same interpreter, whose site-packages are where they were.
    """
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}  # a virtual environment may see these, too
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    roots += [site.getusersitepackages(), sysconfig.get_path("platlib", vars=base)]
    for root in filter(None, roots):
        folder = Path(root, "torch")
        if Path(folder, "include", "torch", "csrc", "stable", "library.h").is_file():
            return folder
    raise MissingTool("no torch 2.10 or newer in this environment: install torch first")


def python_headers() -> Path:
    folder = Path(sysconfig.get_path("include"))
    if not Path(folder, "Python.h").is_file():
        raise MissingTool(f"no Python.h in {folder}: install Python's headers (Debian and Ubuntu: python3-dev)")
    return folder


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of the usual names."""
    wish = shlex.split(os.environ.get("CXX", ""))
    if wish and not shutil.which(wish[0]):
        raise MissingTool(f"CXX={os.environ['CXX']}: there is no such program")
    for command in [wish] if wish else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise MissingTool("no C++17 compiler: install g++ 11 or clang 14 or newer, or set CXX")


def ninja() -> str:
    """ninja, from the Python package of that name or from the system."""
    beside = Path(sysconfig.get_path("scripts"), "ninja")
    found = str(beside) if beside.is_file() else shutil.which("ninja")
    if found is None:
        raise MissingTool('no ninja: pip install "ninja"')
    return found


def paths_of(cxx: list[str]) -> dict[str, list[str]]:
    """The instruction sets that the compiler knows."""
    probe = [*cxx, "-fsyntax-only", "-x", "c++", os.devnull]
    known = {
        path: flags
        for path, flags in PATHS.items()
        if subprocess.run([*probe, *flags], capture_output=True, check=False).returncode == 0
    }
    for path in PATHS.keys() - known.keys():
        print(f"{' '.join(cxx)} cannot compile for {path}: left out", file=sys.stderr)
    return known


def escaped(path: Path | str) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quoted(*words: Path | str) -> str:
    """Words of a command, in a ninja file."""
    return " ".join(shlex.quote(str(word)).replace("$", "$$") for word in words)


class BuildWithNinja(build_ext):
    """Writes a ninja file for csrc/cpu and runs it: flags differ by file, and files compile side by side."""

    extensions: list[setuptools.Extension]

    def run(self) -> None:
        for extension in self.extensions:
            try:
                self._build(extension)
            except subprocess.CalledProcessError as error:
                if WISH == "1":
                    raise SystemExit(f"mlmfast._cpu does not compile: {error}") from error
                print("mlmfast._cpu does not compile (see above): installed without it, so slower", file=sys.stderr)
                self.extensions = []  # nothing to copy, nothing to list

    def _build(self, extension: setuptools.Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        work = Path(self.build_temp, "cpu").resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch, cxx = torch_folder(), compiler()
        paths = paths_of(cxx)
        own = {path: [*flags, f"-DMLMFAST_PATH={path}"] for path, flags in paths.items()}
        have = [f"-DMLMFAST_HAS_{path.upper()}" for path in paths]
        includes: list[Path | str] = ["-isystem", torch / "include", "-isystem", python_headers()]
        extra = os.environ.get("CXXFLAGS", "")
        # Python's own symbols come from the interpreter.
        shared = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
        lines = [
            "rule compile",
            f"  command = {quoted(*cxx, *FLAGS, *includes)} {extra} $own -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            f"  command = {quoted(*cxx, *shared)} $in -o $out {quoted('-L', torch / 'lib', '-ltorch_cpu')}",
            "  description = $out",
        ]
        objects = []
        for source in sorted(FOLDER.glob("*.cpp")):
            # kernels.cpp sees neither torch's nor Python's headers, so it may be compiled for any processor.
            for path, flags in own.items() if source.stem == "kernels" else [("", have)]:
                name = f"{source.stem}{path and '_'}{path}.o"
                lines.append(f"build {name}: compile {escaped(source.resolve())}")
                lines.append(f"  own = {quoted(*flags)}")
                objects.append(name)
        lines += [f"build {escaped(target)}: link {' '.join(objects)}", ""]
        Path(work, "build.ninja").write_text("\n".join(lines))
        subprocess.run([ninja(), "-C", str(work)], check=True)


def extensions() -> list[setuptools.Extension]:
    """The extension, or none where it cannot be built: then the package is pure Python, and its wheel says so."""
    if WISH not in ("auto", "0", "1"):
        raise SystemExit(f"MLMFAST_BUILD_CPU={WISH} is none of auto, 0, 1")
    if WISH == "0":
        return []
    try:
        if os.name == "nt":
            raise MissingTool("the extension is written for GCC and clang")
        torch_folder(), python_headers(), compiler(), ninja()
    except MissingTool as error:
        if WISH == "1":
            raise SystemExit(f"mlmfast._cpu cannot be built: {error}") from error
        print(f"mlmfast is installed without its compiled extension, so slower: {error}", file=sys.stderr)
        return []
    return [setuptools.Extension("mlmfast._cpu", sources=[], py_limited_api=LIMITED)]


WISH = os.environ.get("MLMFAST_BUILD_CPU", "auto")
EXTENSIONS = extensions()

setuptools.setup(
    packages=[*PACKAGES, "mlmfast.kernels", *(f"mlmfast.kernels.{name}" for name in KERNELS)],
    package_dir={"mlmfast": "mlmfast", "mlmfast.kernels": "kernels"},
    package_data={"mlmfast": ["py.typed", "tiny/*"], "mlmfast.kernels": ["configs/*.json"]},
    include_package_data=False,
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS and LIMITED else {},
)
