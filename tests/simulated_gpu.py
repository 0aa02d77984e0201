"""A GPU that is none, for machines without one: torch.cuda as far as it is used, tensors that say they are on CUDA.

``SIMULATED_GPU=interpreted pytest -m gpu`` runs what waits for a GPU on the CPU: the kernels in Triton's interpreter,
everything around them as it is. With ``SIMULATED_GPU=reference`` the reference's functions stand in for the kernels,
which is a hundred times as fast. ``EMULATED_EXTENSION`` names the CUDA extension as :mod:`emulated_extension` compiles
it. ``make gpu-rehearsal`` and ``make gpu-rehearsal-all`` run them; ``python tests/simulated_gpu.py`` runs a script,
``-m`` and a module, or ``mlmfast``.

It shows what a first run on a GPU would otherwise be spent on: a tensor left on the host, a wait for the device where
none may be, a graph that was given what changes. It shows nothing of the compiled kernels, of memory that was freed and
used again (pools of graphs, pinned buffers), of streams that overtake each other, or of speed.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from simulated_tensors import CUDA, DEVICE, MODE, PROPERTIES, again, held, on_device, wrapped
from torch import Tensor
from torch.utils._pytree import tree_map


class Stream:
    """One after another; nothing overtakes here. The same 32 are handed out in turn, as torch does."""

    count = 0

    def __init__(self, device: Any = None, **_: Any) -> None:
        Stream.count += 1
        self.device, self.cuda_stream = CUDA, 1 + Stream.count % 32

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        DEVICE.wait("a stream")

    def record_event(self, event: Event | None = None) -> Event:
        made = event or Event()
        made.record()
        return made


class Event:
    """The host's clock."""

    def __init__(self, **_: Any) -> None:
        self.at = float("nan")

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        DEVICE.wait("an event")

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    """Operations with their memory."""

    def __init__(self, **_: Any) -> None:
        self.operations: list[Callable[[], None]] = []

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        for operation in self.operations:
            operation()

    def reset(self) -> None:
        self.operations.clear()


class Generator(torch.Generator):
    """Of the host's random numbers, wherever they are asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls)


STREAMS = [Stream()]


@contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    STREAMS.append(stream or STREAMS[-1])
    try:
        yield
    finally:
        STREAMS.pop()


@contextmanager
def record(graph: Graph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    DEVICE.wait("the beginning of a recording")
    DEVICE.recording = graph.operations
    try:
        with use_stream(stream or Stream()):
            yield
    finally:
        DEVICE.recording = None


def limit_memory(fraction: float, device: Any = None) -> None:
    DEVICE.memory.limit = int(fraction * PROPERTIES.total_memory)


def set_sync(mode: int | str) -> None:
    DEVICE.sync = {"default": 0, "warn": 1, "error": 2}.get(mode, mode) if isinstance(mode, str) else mode


@contextmanager
def one_device(device: Any) -> Iterator[None]:
    yield


def bfloat16_rounded(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter cuts float32 down to bfloat16; GPUs round to the nearest, ties to even."""
    import triton.language as tl

    def rounded(given: np.ndarray, before: Any, after: Any, mode: Any) -> Any:
        if before == tl.float32 and after == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(given).view(np.float32).copy())
            return values.bfloat16().view(torch.uint16).numpy().reshape(given.shape)
        return convert(given, before, after, mode)

    return rounded


def bfloat16_products(dot: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter holds bfloat16 as the integers of its bits, and multiplies those."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def wide(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


def interpret() -> None:
    """Triton's interpreter takes the device's tensors, and what it runs can be recorded."""
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        given, named = tree_map(held, args), tree_map(held, kwargs)
        if strangers := [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not on_device(a)]:
            raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor of {strangers[0].shape})")
        DEVICE.kernels += 1
        run(self, *given, **named)
        DEVICE.did(lambda: run(self, *given, **named))

    interpreter.GridExecutor.__call__ = launch
    interpreter._convert_float = bfloat16_rounded(interpreter._convert_float)
    builder = interpreter.InterpreterBuilder
    builder.create_dot = bfloat16_products(builder.create_dot)


def stand_in() -> None:
    """The reference's functions in place of Triton's kernels: each a single launch, whatever it does inside."""
    from mlmfast import backends

    function = backends._function

    def launched(op: str, name: str) -> Callable[..., Any]:
        if name != "triton":
            return function(op, name)
        plain = function(op, "reference")

        def launch(*args: Any, **kwargs: Any) -> Any:
            given, named = tree_map(held, args), tree_map(held, kwargs)
            DEVICE.kernels += 1
            out = plain(*given, **named)
            DEVICE.did(again(plain, given, named, out))
            return wrapped(out)

        return launch

    backends._function = launched
    for op in backends.OPS:  # those of the extension hand to Triton what they do not take
        if importlib.util.find_spec(f"mlmfast.cuda.{op}"):
            module = importlib.import_module(f"mlmfast.cuda.{op}")
            for name in [name for name in vars(module) if name.startswith("triton_")]:
                setattr(module, name, launched(op, "triton"))


def emulate(library: str) -> None:
    """The CUDA extension is there: csrc/cuda as :mod:`emulated_extension` compiles it for the host."""
    from mlmfast import cuda

    torch.ops.load_library(library)
    cuda.missing = lambda op, device: None


def install(kernels: str, extension: str | None = None) -> None:
    """Puts the device in torch's place for this process.

    Args:
        kernels: what runs in place of Triton's: ``"interpreted"``, or the ``"reference"``, a hundred times as fast.
        extension: the CUDA extension as :mod:`emulated_extension` compiles it; None: it is not installed.
    """
    torch.Generator = Generator  # type: ignore[misc]  # a class of torch's, replaced: what this is for
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay one tensor
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "is_bf16_supported": lambda *_, **__: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "synchronize": lambda device=None: DEVICE.wait("synchronize"),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: DEVICE.memory.used,
        "memory_reserved": lambda device=None: DEVICE.memory.used,
        "mem_get_info": lambda device=None: (DEVICE.memory.limit - DEVICE.memory.used, PROPERTIES.total_memory),
        "set_per_process_memory_fraction": limit_memory,
        "set_sync_debug_mode": set_sync,
        "get_sync_debug_mode": lambda: DEVICE.sync,
        "current_stream": lambda device=None: STREAMS[-1],
        "is_current_stream_capturing": lambda: DEVICE.recording is not None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": use_stream,
        "graph": record,
        "device": one_device,
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "simulated"
    from mlmfast import kernels as package

    package.missing = lambda op, device: None
    {"interpreted": interpret, "reference": stand_in}[kernels]()
    if extension is not None:
        emulate(extension)
    MODE.__enter__()


if __name__ == "__main__":  # SIMULATED_GPU=reference python tests/simulated_gpu.py SCRIPT or -m MODULE ...
    import os
    import sys
    from pathlib import Path

    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "benchmarks")]
    import from_checkout

    from_checkout.use_checkout()
    # The module itself, not this copy of it.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import simulated_gpu

    simulated_gpu.install(os.environ.get("SIMULATED_GPU", "reference"), os.environ.get("EMULATED_EXTENSION"))
    from_checkout.use_checkout = lambda: None  # it has been done
    from_checkout.main()
