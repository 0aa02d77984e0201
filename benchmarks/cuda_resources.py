"""What each CUDA kernel takes of a GPU: registers, spills, shared memory, and the tensor-core instructions in it.

    MLMFAST_BUILD_CUDA=1 python setup.py build_ext --inplace
    python benchmarks/cuda_resources.py mlmfast/_cuda.abi3.so --output benchmarks/results/cuda_resources

Reads the compiled extension with cuobjdump; no GPU is needed. Exit status 1: a kernel spills registers, or one of those
that multiply has no tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

# Kernels that must multiply on the tensor cores.
MULTIPLYING = ("attend_blocks", "linear_tiles", "topk_parts_of")


@dataclass(frozen=True)
class Usage:
    """A kernel on one kind of GPU; bytes but for registers and instructions.

    Attributes:
        shared: static; what a launch asks for beside it stands in the launching source.
        tensor_core: instructions HMMA and HGMMA in its machine code.
    """

    kernel: str
    architecture: str
    registers: int
    stack: int
    shared: int
    tensor_core: int


def cuobjdump(*arguments: str | Path) -> str:
    program = shutil.which("cuobjdump") or triton.knobs.nvidia.cuobjdump.path  # Triton brings its own
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def readable(symbol: str) -> str:
    """A mangled name as C++ has it, without its arguments."""
    plain = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(anonymous namespace\)::|mlmfast::cuda::|^void ", "", plain)
    return plain.partition("(")[0].replace("void ", "")


def usages(library: Path) -> list[Usage]:
    """Every kernel of a library, on each architecture that machine code was made for."""
    code: dict[tuple[str, str], int] = {}
    for part in cuobjdump("-sass", library).split("arch = ")[1:]:
        architecture = part.partition("\n")[0].strip()
        for text in part.split("Function : ")[1:]:
            code[text.partition("\n")[0].strip(), architecture] = len(re.findall(r"\bHG?MMA\b", text))
    found = []
    for part in cuobjdump("-res-usage", library).split("arch = ")[1:]:
        architecture = part.partition("\n")[0].strip()
        pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
        for symbol, registers, stack, shared in re.findall(pattern, part):
            numbers = (int(registers), int(stack), int(shared), code.get((symbol, architecture), 0))
            found.append(Usage(readable(symbol), architecture, *numbers))
    return sorted(found, key=lambda usage: (usage.kernel, usage.architecture))


def faults(usage: Usage) -> list[str]:
    wrong = [f"{usage.stack} bytes of stack"] if usage.stack else []
    return wrong + (
        ["no tensor-core instructions"] if usage.kernel.startswith(MULTIPLYING) and not usage.tensor_core else []
    )


def table(found: list[Usage]) -> str:
    lines = [
        "# What the CUDA kernels take",
        "",
        "Compiled by nvcc, not run. Stack is where spilled registers would go.",
    ]
    lines += ["", "| kernel | architecture | registers | stack | static shared memory | HMMA |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    lines += [f"| `{u.kernel}` | {' | '.join(str(value) for value in list(asdict(u).values())[1:])} |" for u in found]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="the compiled extension")
    parser.add_argument("--output", type=Path, help="path of a table and a JSON file, without .md and .json")
    arguments = parser.parse_args()
    found = usages(arguments.library)
    print(table(found))
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(table(found), encoding="utf-8")
        text = json.dumps([asdict(usage) for usage in found], indent=1)
        arguments.output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    wrong = [f"{u.kernel} {u.architecture}: {', '.join(faults(u))}" for u in found if faults(u)]
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong or not found else 0)


if __name__ == "__main__":
    main()
