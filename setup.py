"""The part of the build that pyproject.toml cannot say: ``kernels/`` is ``mlmfast.kernels``; the extensions in csrc/.

They need a C++17 compiler and torch's headers, and no torch at build time: they are written to LibTorch's stable ABI,
so one binary serves torch 2.10 and later and every Python from 3.10 (a free-threaded one has its own). The one in
csrc/cuda needs nvcc besides, and is built beside a torch that has CUDA. Where something is missing, the package is
installed without the extension. A line for each says what was done (pip shows it with -v), `mlmfast doctor` what is
there. MLMFAST_BUILD_CPU=1 and MLMFAST_BUILD_CUDA=1 make a missing one an error, =0 builds none, auto is the default;
MLMFAST_BUILD_CUDA=1 builds beside any torch. TORCH_CUDA_ARCH_LIST="8.0;9.0a" says for which GPUs.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
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
    return {
        path: flags
        for path, flags in PATHS.items()
        if subprocess.run([*probe, *flags], capture_output=True, check=False).returncode == 0
    }


def escaped(path: Path | str) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quoted(*words: Path | str) -> str:
    """Words of a command, in a ninja file."""
    return " ".join(shlex.quote(str(word)).replace("$", "$$") for word in words)


def rule(name: str, command: str, *, dependencies: bool = False) -> list[str]:
    """A rule of a ninja file, with the headers that a compiler lists for it."""
    lines = [f"rule {name}", f"  command = {command}", "  description = $out"]
    return lines + (["  depfile = $out.d", "  deps = gcc"] if dependencies else [])


def build(target: str, name: str, sources: str, flags: Sequence[Path | str] = ()) -> list[str]:
    """A line of a ninja file, with what is special about this target."""
    return [f"build {target}: {name} {sources}", f"  own = {quoted(*flags)}"]


def linked(*libraries: Path | str) -> str:
    """The command that makes a module of objects. Python's own symbols come from the interpreter."""
    shared = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    return f"{quoted(*compiler(), *shared)} $in -o $out {quoted('-L', torch_folder() / 'lib', *libraries)}"


def includes() -> list[Path | str]:
    return ["-isystem", torch_folder() / "include", "-isystem", python_headers()]


def compile_command() -> str:
    extra = os.environ.get("CXXFLAGS", "")
    return f"{quoted(*compiler(), *FLAGS, *includes())} {extra} $own -MMD -MF $out.d -c $in -o $out"


def cpu_file(target: Path) -> list[str]:
    """The ninja file of mlmfast._cpu."""
    paths = paths_of(compiler())
    own = {path: [*flags, f"-DMLMFAST_PATH={path}"] for path, flags in paths.items()}
    have = [f"-DMLMFAST_HAS_{path.upper()}" for path in paths]
    lines = [*rule("compile", compile_command(), dependencies=True), *rule("link", linked("-ltorch_cpu"))]
    objects = []
    for source in sorted(Path("csrc/cpu").glob("*.cpp")):
        # kernels.cpp sees neither torch's nor Python's headers, so it may be compiled for any processor.
        for path, flags in own.items() if source.stem == "kernels" else [("", have)]:
            objects.append(f"{source.stem}{path and '_'}{path}.o")
            lines += build(objects[-1], "compile", escaped(source.resolve()), flags)
    return [*lines, *build(escaped(target), "link", " ".join(objects))]


def cuda_file(target: Path) -> list[str]:
    """The ninja file of mlmfast._cuda."""
    device = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-DUSE_CUDA", *architectures()]
    device += [flag for flag in FLAGS if flag.startswith("-D")]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-ccbin", compiler()[0]]
    command = f"{quoted(nvcc(), *device, *includes())} -MMD -MF $out.d -c $in -o $out"
    runtime = cuda_folder() / "lib64" / "libcudart_static.a"
    lines = [*rule("compile", compile_command(), dependencies=True), *rule("nvcc", command, dependencies=True)]
    # The extension must name torch's CUDA half as what it needs: torch loads that for itself alone, and a library sees
    # its own dependencies. Beside a CPU build of torch it is not there, so an empty one of that name stands in.
    needed = ["-Wl,--no-as-needed", "libtorch_cuda.so"]
    lines += rule("name", f"{quoted(*compiler(), '-shared', '-Wl,-soname,libtorch_cuda.so', '-x', 'c++')} $in -o $out")
    lines += build("libtorch_cuda.so", "name", os.devnull)
    lines += rule("link", linked("-ltorch_cpu", runtime, "-lpthread", "-ldl", "-lrt", *needed))
    objects = []
    for source in sorted(Path("csrc/cuda").glob("*.c*")):
        objects.append(f"{source.stem}.o")
        lines += build(objects[-1], "nvcc" if source.suffix == ".cu" else "compile", escaped(source.resolve()))
    return [*lines, *build(escaped(target), "link", f"{' '.join(objects)} | libtorch_cuda.so")]


def nvcc() -> Path:
    """CUDA's compiler: of $CUDA_HOME, else of the path, else where it is usually put."""
    home = os.environ.get("CUDA_HOME", "")
    found = (
        [Path(home, "bin", "nvcc")] if home else [Path(shutil.which("nvcc") or ""), Path("/usr/local/cuda/bin/nvcc")]
    )
    for path in found:
        if path.is_file():
            return path
    raise MissingTool(f"no nvcc in {home}/bin" if home else "no nvcc: install the CUDA toolkit, or set CUDA_HOME")


def cuda_folder() -> Path:
    """The toolkit that nvcc is of."""
    for folder in (nvcc().resolve().parent.parent, Path("/usr/local/cuda")):
        if Path(folder, "lib64", "libcudart_static.a").is_file():
            return folder
    raise MissingTool(f"no lib64/libcudart_static.a beside {nvcc()}: install CUDA's runtime library")


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, and PTX of the newest for GPUs that come after."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or ["8.0", "9.0a"]
    flags = []
    for entry in listed:
        number = entry.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d{2,3}[af]?", number):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is no compute capability like 8.0 or 9.0a")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    # Not of an architecture-specific one, whose PTX runs on that alone.
    newest = max(int(re.sub(r"\D", "", entry)) for entry in listed)
    return [*flags, "-gencode", f"arch=compute_{newest},code=compute_{newest}"]


def parts(name: str) -> str:
    """What an extension is compiled for, in words."""
    if name == "mlmfast._cpu":
        known = paths_of(compiler())
        unknown = [path for path in PATHS if path not in known]
        lacking = f"; {' '.join(compiler())} does not know {', '.join(unknown)}" if unknown else ""
        return ", ".join(known) + lacking
    codes = [flag.rpartition("code=")[2] for flag in architectures() if "code=" in flag]
    return f"{', '.join(codes[:-1])} and the PTX of {codes[-1]}, by {nvcc()}"


def say(name: str, outcome: str) -> None:
    print(f"{name}: {outcome}", file=sys.stderr, flush=True)


class BuildWithNinja(build_ext):
    """Writes a ninja file for each extension and runs it: flags differ by file, and files compile side by side."""

    extensions: list[setuptools.Extension]

    def run(self) -> None:
        for extension in list(self.extensions):
            try:
                self._build(extension)
            except subprocess.CalledProcessError as error:
                if wish(extension.name) == "1":
                    raise SystemExit(f"{extension.name} does not compile: {error}") from error
                say(extension.name, "left out: it does not compile (see above)")
                self.extensions.remove(extension)  # nothing to copy, nothing to list

    def _build(self, extension: setuptools.Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        work = Path(self.build_temp, extension.name.rpartition("._")[2]).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = FILES[extension.name](target)
        Path(work, "build.ninja").write_text("\n".join([*lines, ""]))
        subprocess.run([ninja(), "-C", str(work)], check=True)
        say(extension.name, f"built for {parts(extension.name)}")


FILES = {"mlmfast._cpu": cpu_file, "mlmfast._cuda": cuda_file}


def variable(name: str) -> str:
    """Where the environment says whether an extension is wanted."""
    return f"MLMFAST_BUILD_{name.rpartition('_')[2].upper()}"


def wish(name: str) -> str:
    """Whether an extension is wanted: ``"auto"``, ``"0"`` or ``"1"``."""
    wished = os.environ.get(variable(name), "auto")
    if wished not in ("auto", "0", "1"):
        raise SystemExit(f"{variable(name)}={wished} is none of auto, 0, 1")
    return wished


def check_tools(name: str) -> None:
    """Raises MissingTool for the first thing that an extension cannot be built without, the wish for it among them."""
    if wish(name) == "0":
        raise MissingTool(f"{variable(name)}=0")
    if os.name == "nt":
        raise MissingTool("the extensions are written for GCC and clang")
    torch_folder(), python_headers(), compiler(), ninja()
    if name == "mlmfast._cuda":
        if wish(name) == "auto" and not list(Path(torch_folder(), "lib").glob("libtorch_cuda.*")):
            raise MissingTool("torch here has no CUDA")
        nvcc(), cuda_folder(), architectures()


def extensions() -> list[setuptools.Extension]:
    """Those that can be built; without any the package is pure Python, and its wheel says so."""
    found = []
    # What only asks for metadata, before a build, would say the same once more.
    building = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)
    for name in FILES:
        try:
            check_tools(name)
        except MissingTool as error:
            if wish(name) == "1":
                raise SystemExit(f"{name} cannot be built: {error}") from error
            if building:
                say(name, f"left out: {error}")
        else:
            found.append(setuptools.Extension(name, sources=[], py_limited_api=LIMITED))
    return found


EXTENSIONS = extensions()

setuptools.setup(
    packages=[*PACKAGES, "mlmfast.kernels", *(f"mlmfast.kernels.{name}" for name in KERNELS)],
    package_dir={"mlmfast": "mlmfast", "mlmfast.kernels": "kernels"},
    package_data={
        "mlmfast": ["py.typed", "report.html", "tiny/*", "icl/*.json", "icl/tasks/**/*.yaml", "icl/tasks/**/README.md"],
        "mlmfast.kernels": ["configs/*.json"],
    },
    include_package_data=False,
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS and LIMITED else {},
)
