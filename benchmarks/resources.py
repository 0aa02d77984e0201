"""Compiles every Triton kernel, no GPU needed, and tables the registers, stack and shared memory that it takes.

    python benchmarks/resources.py --output benchmarks/results/triton_resources
    python benchmarks/resources.py --targets 90 --case bfloat16

A kernel is compiled as it would be at run time: the ops' own functions are called on tensors without data, and each
launch is recorded instead of made: its argument types, which of them are 1 or divisible by 16, its tiles. (What asked
such a tensor for a value would fail, so this also shows that no op waits for the device.) Exit status 1: a kernel keeps
something on the stack (registers were spilled), wants more shared memory than the GPU has, or multiplies float32 in
TF32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Compute capability -> shared memory of a block, in bytes (CUDA C++ programming guide, technical specifications).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")  # of the compiler, not of the kernel
TOKENS = 4096


@dataclass(frozen=True)
class Recorded:
    """A launch: what Triton would compile for it."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # warps and stages

    @classmethod
    def of(cls, kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> Recorded:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(kernel.arg_names, args)) | kwargs
        signature, constants, divisible = {}, {}, []
        for parameter in kernel.params:
            value = values[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                divisible.append(parameter.name)  # as torch's allocators give them out
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if special and value % 16 == 0:
                    divisible.append(parameter.name)
        return cls(
            kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(sorted(options.items()))
        )

    @property
    def tiles(self) -> str:
        """``"BLOCK_M=64 BLOCK_N=64 num_warps=4"``."""
        blocks = [(name, value) for name, value in self.constants if name.isupper() and type(value) is int]
        return " ".join(f"{name}={value}" for name, value in [*blocks, *self.options] if name != "enable_fp_fusion")

    def compiled(self, capability: int) -> Any:
        """Triton's result for a GPU of this capability."""
        places = {name: place for place, (name, _) in enumerate(self.signature)}
        source = ASTSource(
            fn=self.kernel,
            signature=dict(self.signature),
            constexprs={(places[name],): value for name, value in self.constants},
            attrs={(places[name],): [["tt.divisibility", 16]] for name in self.divisible},
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one kind of GPU; bytes but for the registers of a thread."""

    op: str
    case: str
    dtype: str
    kernel: str
    tiles: str
    capability: int
    registers: int
    stack: int
    shared: int
    faults: tuple[str, ...]


def resources(op: str, case: str, dtype: str, launch: Recorded, capability: int) -> Resources:
    """Compiles a launch for a GPU and reads what it takes."""
    built = launch.compiled(capability)
    registers, stack = registers_and_stack(built.asm["cubin"])
    shared = built.metadata.shared
    faults = [*too_much(stack, shared, capability)]
    if dtype == "float32" and "tf32" in built.asm["ptx"]:
        faults.append("TF32 in float32")
    name = launch.kernel.__name__
    return Resources(op, case, dtype, name, launch.tiles, capability, registers, stack, shared, tuple(faults))


def registers_and_stack(binary: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary)
        cubin.flush()
        dump = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([dump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    return int(found[1]), int(found[2])


def too_much(stack: int, shared: int, capability: int) -> Iterator[str]:
    """What of a kernel's bytes is more than there should be or is there."""
    if stack:
        yield f"{stack} bytes of stack"
    room = SHARED[max(known for known in SHARED if known <= capability)]
    if shared > room:
        yield f"{shared} bytes of shared memory where {room} are there"


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within the block launches are recorded, not made."""
    launches: list[Recorded] = []
    run = JITFunction.run

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Recorded.of(self, *args, **kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


# ---- what is compiled: the shapes that models have


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def op(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"mlmfast.kernels.{name}"), name)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """An op, what is special about the case, and a call that launches its kernels."""
    floats, ids = partial(numbers, dtype=dtype), partial(numbers, dtype=torch.int64)
    for width in (256, 768, 1024, 1536):
        x, vector = floats(TOKENS, width), floats(width)
        for name in ("add_layer_norm", "pre_norm"):
            yield name, f"d={width}", partial(op(name), x, x, vector, vector, vector, 1e-7)
        tables = (floats(30522, width), ids(TOKENS), floats(512, width), None, floats(2, width), vector, vector, 1e-12)
        embed = partial(op("masked_embedding"), ids(TOKENS), ids(64), 103, *tables)
        yield "masked_embedding", f"d={width}", embed
    scaled = partial(
        op("masked_embedding"), ids(TOKENS), ids(64), 32, floats(33, 480), norm_weight=floats(480),
        copy_scale=floats(64), cu_seqlens=numbers(65, dtype=torch.int32),
    )  # fmt: skip
    yield "masked_embedding", "d=480, scaled", scaled
    for activation in ("gelu", "gelu_tanh", "relu", "tanh", "geglu"):
        call = partial(op("linear"), floats(TOKENS, 768), floats(3072, 768), floats(3072), activation)
        yield "linear", activation, call
    for width in (32, 64, 128):
        heads = 12
        rows = floats(TOKENS, heads, width)
        for length in (24, 64, 512):
            bounds = numbers(TOKENS // length + 1, dtype=torch.int32)
            every = (bounds, bounds, length, length, None, 0.1)
            few = (bounds, bounds, 1, length, ids(TOKENS // length), 0.1)
            some = floats(TOKENS // length, heads, width)
            plain, banded = op("attention"), op("disentangled_attention")
            yield "attention", f"D={width}, L={length}", partial(plain, rows, rows, rows, *every)
            yield "attention", f"D={width}, L={length}, few queries", partial(plain, some, rows, rows, *few)
            yield "attention", f"D={width}, L={length}, local", partial(plain, rows, rows, rows, *every, 128)
            biased = {"distance_bias": numbers(heads, 257, dtype=torch.float32)}
            call = partial(plain, rows, rows, rows, *every, **biased)
            yield "attention", f"D={width}, L={length}, distance bias", call
            yield "attention", f"D={width}, L={length}, distance bias, local", partial(call, 128)
            call = partial(plain, some, rows, rows, *few, **biased)
            yield "attention", f"D={width}, L={length}, distance bias, few queries", call
            # Tables of 512 rows: at 512 tokens slots are table rows, below they are distances.
            terms = (floats(512, heads, width), floats(512, heads, width), numbers(1023, dtype=torch.int32))
            yield "disentangled_attention", f"D={width}, L={length}", partial(banded, rows, rows, rows, *terms, *every)
            call = partial(banded, some, rows, rows, *terms, *few)
            yield "disentangled_attention", f"D={width}, L={length}, few queries", call
    for width in (64, 128):
        x = floats(TOKENS, 3, 12, width)[:, 0]
        angles = [numbers(512, width // 2, dtype=torch.float32) for _ in range(2)]
        yield "rotary", f"D={width}", partial(op("rotary"), x, *angles, ids(TOKENS))
    for width, tokens in ((256, 8192), (768, 128100)):
        hidden, words, bias = floats(512, width), floats(tokens, width), floats(tokens)
        call = partial(op("vocab_logprob"), hidden, words, bias, ids(512), ids(512), 1.0)
        yield "vocab_logprob", f"d={width}, V={tokens}", call
        whole = partial(call, ranks=True, entropies=True)
        yield "vocab_logprob", f"d={width}, V={tokens}, ranks and entropies", whole
        yield "vocab_topk", f"d={width}, V={tokens}", partial(op("vocab_topk"), hidden, words, bias, 5)
        yield "vocab_rows", f"d={width}, V={tokens}", partial(op("vocab_rows"), hidden[:64], words, bias)


def examine(capabilities: list[int], dtypes: list[str], ops: list[str] | None = None) -> Iterator[Resources]:
    """What every kernel takes on each GPU, each compiled once however many cases share it."""
    seen: set[tuple[Recorded, int]] = set()
    for dtype in dtypes:
        for op_name, case, call in cases(DTYPES[dtype]):
            if ops and op_name not in ops:
                continue
            with recording() as launches:
                call()
            for launch in launches:
                for capability in capabilities:
                    if (launch, capability) not in seen:
                        seen.add((launch, capability))
                        yield resources(op_name, case, dtype, launch, capability)


def table(found: list[Resources], versions: str) -> str:
    """Markdown: a row a kernel and case, a group of columns a GPU."""
    capabilities = sorted({entry.capability for entry in found})
    lines = ["# What the Triton kernels take", "", f"Compiled, not run: {versions}. Registers a thread, then bytes of "]
    lines[-1] += "stack (spilled registers; there are none) and of shared memory a block."
    lines += ["", f"| op | case | dtype | kernel | tiles | {' | '.join(f'sm_{c}' for c in capabilities)} |"]
    lines.append(f"|---|---|---|---|---|{'---:|' * len(capabilities)}")
    groups: dict[tuple[str, str, str, str, str], dict[int, Resources]] = {}
    for entry in found:
        key = (entry.op, entry.case, entry.dtype, entry.kernel, entry.tiles)
        groups.setdefault(key, {})[entry.capability] = entry
    for key, entries in groups.items():
        cells = [
            f"{e.registers} / {e.stack} / {e.shared}" if (e := entries.get(capability)) else ""
            for capability in capabilities
        ]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities; commas between")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32", help="commas between")
    parser.add_argument("--ops", help="only these; commas between")
    parser.add_argument("--output", type=Path, help="path of a table and a JSON file, without .md and .json")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and interpreted kernels do not compile")
    capabilities = [int(target) for target in arguments.targets.split(",")]
    ops = arguments.ops.split(",") if arguments.ops else None
    found = []
    for entry in examine(capabilities, arguments.dtypes.split(","), ops):
        found.append(entry)
        print(json.dumps(asdict(entry)), flush=True)
    if arguments.output:
        versions = f"Triton {triton.__version__}"
        Path(f"{arguments.output}.md").write_text(table(found, versions), encoding="utf-8")
        text = json.dumps({"triton": triton.__version__, "kernels": [asdict(entry) for entry in found]}, indent=1)
        Path(f"{arguments.output}.json").write_text(text + "\n", encoding="utf-8")
    faulty = [entry for entry in found if entry.faults]
    for entry in faulty:
        print(
            f"{entry.op} ({entry.case}, {entry.dtype}) sm_{entry.capability}: {'; '.join(entry.faults)}",
            file=sys.stderr,
        )
    sys.exit(1 if faulty or not found else 0)


if __name__ == "__main__":
    main()
