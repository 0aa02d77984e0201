"""What the op tests share: the backends under test, packed shapes that hurt, and the bound on a backend's error.

A later backend joins by one line in :data:`BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mlmfast import backends, cpu, cuda
from mlmfast.errors import BackendError


@dataclass(frozen=True)
class Backend:
    """A backend, where its tensors live, the dtypes it takes, and the instructions that it is held to, if any."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    instructions: str | None = None

    @property
    def narrow(self) -> torch.dtype:
        """A dtype of two bytes that it takes."""
        return torch.bfloat16 if torch.bfloat16 in self.dtypes else torch.float16

    def __str__(self) -> str:
        return self.name if self.instructions is None else f"{self.name}.{self.instructions}"


def lesser_instructions() -> list[str]:
    """What this machine can be held to below its best; nothing without the extension."""
    return torch.ops.mlmfast_cpu.instruction_sets().split(",")[1:] if cpu.instructions() else []


BACKENDS = [
    Backend("reference", "cpu"),
    Backend("cpu", "cpu", (torch.float32, torch.bfloat16)),  # with the best instructions of this machine
    *(Backend("cpu", "cpu", (torch.float32, torch.bfloat16), lesser) for lesser in lesser_instructions()),
    *([Backend("cuda", "cuda", (torch.bfloat16, torch.float16))] if cuda.missing("", "cuda") is None else []),
    Backend("triton", "cuda", (torch.float32, torch.bfloat16, torch.float16))
    if torch.cuda.is_available()
    else Backend("interpreter", "cpu", (torch.float32, torch.float16)),
]

# Lengths of the sequences of a packed batch: one row, primes, block edges and their neighbours, a long one among short.
LENGTHS = [
    [1],
    [2, 1, 1, 3],
    [13, 13, 7],
    [15, 16, 17, 31, 32, 33],
    [63, 64, 65],
    [131, 1, 2, 5, 1, 1],
]


def on_every_backend(test: Callable[..., Any]) -> Callable[..., Any]:
    """Parametrises a test over ``backend`` and each ``dtype`` it takes."""
    cases = [
        pytest.param(b, d, id=f"{b}-{backends.dtype_name(d)}", marks=skip_if_refused(test, b, d))
        for b in backends_of(test)
        for d in b.dtypes
    ]
    return pytest.mark.parametrize(("backend", "dtype"), cases)(test)


def on_every_backend_in_float32(test: Callable[..., Any]) -> Callable[..., Any]:
    """Parametrises a test over ``backend`` alone."""
    cases = [pytest.param(b, id=str(b), marks=skip_if_refused(test, b, torch.float32)) for b in backends_of(test)]
    return pytest.mark.parametrize("backend", cases)(test)


def on_every_cpu_path(test: Callable[..., Any]) -> Callable[..., Any]:
    """Parametrises a test over the ``backend`` of the CPU alone, on each instruction set."""
    paths = [b for b in backends_of(test) if b.name == "cpu"]
    cases = [pytest.param(b, id=str(b), marks=skip_if_refused(test, b, torch.float32)) for b in paths]
    return pytest.mark.parametrize("backend", cases)(test)


def op_of(test: Callable[..., Any]) -> str:
    """The op that the test's file is named after."""
    return test.__module__.rpartition("test_")[2]


def backends_of(test: Callable[..., Any]) -> list[Backend]:
    """The backends that a test runs on: on each instruction set only if its op has code of its own for them."""
    return [b for b in BACKENDS if b.instructions is None or op_of(test) not in cpu.WITHOUT_EXTENSION]


def skip_if_refused(test: Callable[..., Any], backend: Backend, dtype: torch.dtype) -> tuple[pytest.MarkDecorator, ...]:
    """A skip with the reason where a backend cannot serve the test's op.

    Whether it ought to serve is for ``test_backends.py`` to say.
    """
    try:
        backends.choose(op_of(test), backend.device, dtype, backend.name)
    except BackendError as refusal:
        return (pytest.mark.skip(reason=str(refusal)),)
    return ()


@contextmanager
def serving(backend: Backend) -> Iterator[None]:
    """Within the block every op runs on this backend, and memory that nobody has written reads NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    try:
        with forced(backend):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Within the block every op runs on this backend, with its instructions."""
    before = cpu.instructions()
    if backend.instructions is not None:
        torch.ops.mlmfast_cpu.use_instructions(backend.instructions)
    try:
        with backends.forced(backend.name):
            yield
    finally:
        if backend.instructions is not None:
            torch.ops.mlmfast_cpu.use_instructions(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """float64 normal numbers, the same for the same seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bounds(lengths: Sequence[int]) -> Tensor:
    """int32 ``cu_seqlens`` of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def moved(arguments: Any, backend: Backend, dtype: torch.dtype) -> Any:
    """The same arguments on the backend's device, the float ones in ``dtype``."""
    if isinstance(arguments, Tensor):
        return arguments.to(backend.device, dtype if arguments.is_floating_point() else arguments.dtype)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(moved(a, backend, dtype) for a in arguments)
    if isinstance(arguments, dict):
        return {name: moved(a, backend, dtype) for name, a in arguments.items()}
    return arguments


def assert_as_good_as_torch(
    backend: Backend,
    dtype: torch.dtype,
    op: Callable[..., Any],
    plain: Callable[..., Any],
    arguments: Sequence[Any],
    same_dtype: Callable[..., Any] | None = None,
    **options: Any,
) -> None:
    """The op's error against ``plain`` in float64 is at most twice that of plain torch in this dtype, plus 1e-6 (1e-3).

    ``plain`` takes the op's arguments and returns one tensor, or a tuple of which only floats are compared. Plain torch
    in this dtype is ``same_dtype`` where torch has functions of its own for it, else ``plain`` again. The inputs are
    rounded to ``dtype`` first, so that all three read the same numbers.
    """
    rounded = moved(tuple(arguments), backend, dtype)
    options = moved(options, backend, dtype)
    wide = [moved(a, backend, torch.float64) for a in (rounded, options)]
    with serving(backend):
        got = op(*rounded, **options)
    truth, own = plain(*wide[0], **wide[1]), (same_dtype or plain)(*rounded, **options)
    slack = 1e-6 if dtype in (torch.float32, torch.float64) else 1e-3
    for g, t, o in zip(_tuple(got), _tuple(truth), _tuple(own)):
        assert g.shape == t.shape
        if not g.is_floating_point() or g.numel() == 0:
            continue
        assert bool(torch.isfinite(g).all()), "NaN, infinite, or never written"
        error, allowed = (g.double() - t).abs().max(), 2 * (o.double() - t).abs().max() + slack
        assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_registration(backend: Backend, op: Any, arguments: Sequence[Any], **options: Any) -> None:
    """Schema, fake and dynamic shapes by ``opcheck``; the op stands in a compiled graph without a break."""
    arguments, options = moved(tuple(arguments), backend, torch.float32), moved(options, backend, torch.float32)
    torch.compiler.reset()  # each call compiles anew; without this they count as recompilations of one function
    with forced(backend):
        torch.library.opcheck(op, arguments, options)
        eager = op(*arguments, **options)
        compiled = torch.compile(lambda *a, **o: op(*a, **o), fullgraph=True, backend="eager")(*arguments, **options)
    for a, b in zip(_tuple(eager), _tuple(compiled)):
        assert torch.equal(a, b)
