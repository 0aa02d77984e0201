"""csrc/cuda as a torch extension of the host: what checks and launches the kernels, too, runs without a GPU.

The sources are compiled as they are but for what is no C++: launches, shared memory, and the device that they ask for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
# What a source says -> what the host's compiler is given.
CHANGES = (
    (r"^(\s*)(\S.*?)<<<(.*)>>>\((.*)\);$", r"\1Launch::run(\3, [=] { \2(\4); });"),
    (r"extern __shared__ __align__\(16\) char memory\[\];", "char* const memory = Launch::memory;"),
    (r"is_cuda\(\)", "is_cpu()"),
    (r"const torch::stable::accelerator::DeviceGuard guard\(.*\);", ""),
    (r"aoti_torch_get_current_cuda_stream\(.*?\) == 0", "true"),
    (r"STABLE_TORCH_LIBRARY_IMPL\(mlmfast_cuda, CUDA, m\)", "STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CPU, m)"),
)
STORAGE = """#include "cuda_runtime.h"
namespace mlmfast::cuda {
thread_local dim3 Launch::block(0);
thread_local char* Launch::memory = nullptr;
thread_local size_t Launch::allowed = Launch::UNASKED;
}  // namespace mlmfast::cuda
"""


def build(folder: Path, fault: tuple[str, str, str] | None = None) -> Path:
    """Compiles the extension in an empty folder; returns the library, whose ops take tensors of the host.

    Args:
        fault: a file of ``csrc/cuda``, what stands there once, and what is to stand there instead.
    """
    kernels, stubs = folder / "csrc/cuda", folder / "tests/emulated/cuda"
    kernels.mkdir(parents=True)
    shutil.copytree(ROOT / "tests/emulated/cuda", stubs)
    sources = []
    for source in sorted((ROOT / "csrc/cuda").iterdir()):
        text = source.read_text(encoding="utf-8")
        if fault is not None and source.name == fault[0]:
            assert text.count(fault[1]) == 1, f"{source.name} has {text.count(fault[1])} times {fault[1]!r}"
            text = text.replace(*fault[1:])
        if source.name not in ("emulation.h", "device.h"):
            for said, given in CHANGES:
                text = re.sub(said, given, text, flags=re.MULTILINE)
        assert "<<<" not in text, f"{source.name} launches a kernel in a way that CHANGES does not know"
        target = kernels / (source.stem + "_cu.cpp" if source.suffix == ".cu" else source.name)
        target.write_text(text, encoding="utf-8")
        if source.suffix == ".cu":
            sources.append(target)
    storage = folder / "storage.cpp"
    storage.write_text(STORAGE, encoding="utf-8")
    library = folder / "emulated_cuda.so"
    compiler = next(filter(None, map(shutil.which, ("g++", "c++"))))
    flags = [
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    includes = [f"-I{path}" for path in (stubs, *include_paths())]
    linked = Path(torch.__file__).parent / "lib"
    command = [compiler, *flags, *includes, *map(str, [*sources, storage]), f"-L{linked}", "-ltorch_cpu", "-o"]
    subprocess.run([*command, str(library), f"-Wl,-rpath,{linked}"], check=True)
    return library


if __name__ == "__main__":  # python tests/emulated_extension.py FOLDER, which must not exist
    print(build(Path(sys.argv[1])))
