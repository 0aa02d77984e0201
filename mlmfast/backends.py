"""Which backend serves which op here, and the reason.

An op has one name everywhere: ``mlmfast.ops.<op>`` holds its schema, and a backend that serves it has a module
``<package>.<op>`` with a function ``<op>`` of the same signature. A backend is chosen by the device and dtype of an
op's first floating-point tensor, in the order of :data:`BACKENDS`, unless :func:`forced` names one. A backend's package
may have a function ``missing(op, device)`` that says why it cannot serve an op on this machine, or None. The module of
an op that hands some shapes to the next backend says in a text ``LIMITS`` which it takes itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mlmfast.errors import BackendError

OPS = (
    "masked_embedding",
    "attention",
    "disentangled_attention",
    "rotary",
    "add_layer_norm",
    "pre_norm",
    "linear",
    "vocab_logprob",
    "vocab_topk",
    "vocab_rows",
)


@dataclass(frozen=True)
class Backend:
    """A family of implementations.

    Attributes:
        name: what users call it.
        package: where its ops live, a module each.
        devices: device types whose tensors it takes; None for every one.
        dtypes: floating-point types that it takes; None for every one.
    """

    name: str
    package: str
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def refusal(self, op: str, device: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve an op on a device in a dtype; None if it can."""
        if self.devices is not None and device not in self.devices:
            return f"{self.name} does not run on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"{self.name} takes {' and '.join(map(dtype_name, self.dtypes))}, not {dtype_name(dtype)}"
        try:
            found = importlib.util.find_spec(f"{self.package}.{op}")
        except ModuleNotFoundError:  # a checkout's ./mlmfast before an installed one, without an editable install
            return f"{self.name}'s package {self.package} is not importable here (in a checkout: pip install -e .)"
        if found is None:
            return f"{self.name} has no {op} in this version"
        missing = getattr(importlib.import_module(self.package), "missing", None)
        return None if missing is None else missing(op, device)


# Fastest first. The reference takes everything, so a choice always exists; what comes after it serves by name only.
BACKENDS = (
    Backend("cpu", "mlmfast.cpu", ("cpu",), (torch.float32, torch.bfloat16)),
    Backend("cuda", "mlmfast.cuda", ("cuda",), (torch.float16, torch.bfloat16)),
    Backend("triton", "mlmfast.kernels", ("cuda",), (torch.float32, torch.float16, torch.bfloat16)),
    Backend("reference", "mlmfast.reference"),
    # The same kernels without a GPU, thousands of times slower: for tests. Its bfloat16 is wrong (it rounds down).
    Backend("interpreter", "mlmfast.kernels", ("cpu",), (torch.float32, torch.float16)),
)

_forced: ContextVar[str | None] = ContextVar("mlmfast_backend", default=None)


@dataclass(frozen=True)
class Service:
    """One line of the report: who serves an op, and why."""

    op: str
    backend: str
    reason: str


@cache
def choose(op: str, device: str, dtype: torch.dtype, name: str | None = None) -> Service:
    """Picks the backend of an op.

    Args:
        op: one of :data:`OPS`.
        device: a device type, ``"cpu"`` or ``"cuda"``.
        dtype: of the op's floating-point tensors.
        name: a backend that must serve, or None for the first that can.

    Raises:
        BackendError: the named backend is unknown or cannot serve; the message says why.
    """
    if name is not None:
        backend = _named(name)
        refusal = backend.refusal(op, device, dtype)
        if refusal:
            raise BackendError(f"backend {name!r} was asked for, but {refusal}; use backend='auto'")
        return Service(op, name, "asked for by name")
    refusals: list[str] = []
    for backend in BACKENDS:
        if backend.devices is not None and device not in backend.devices:
            continue  # no reason that anyone asks for
        refusal = backend.refusal(op, device, dtype)
        if refusal is None:
            return Service(op, backend.name, "; ".join(refusals) or f"first choice on {device}")
        refusals.append(refusal)
    raise BackendError(f"no backend serves {op} on {device} in {dtype_name(dtype)}: {'; '.join(refusals)}")


def report(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Service]:
    """Who serves each op on a device in a dtype, one :class:`Service` an op.

    Raises:
        BackendError: a backend is :func:`forced` that cannot serve them all.
    """
    return [choose(op, device, dtype, _forced.get()) for op in OPS]


def limits(op: str, name: str) -> str | None:
    """What else than device and dtype decides whether a backend computes an op itself: its LIMITS; None if nothing."""
    return getattr(importlib.import_module(f"{_named(name).package}.{op}"), "LIMITS", None)


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Within the block every op runs on the named backend or raises; None leaves the choice open."""
    if name is not None:
        _named(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that serves ``op`` for a floating-point tensor like this one."""
    return _function(op, choose(op, tensor.device.type, tensor.dtype, _forced.get()).backend)


@cache
def _function(op: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{_named(name).package}.{op}"), op)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _named(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise BackendError(f"backend {name!r} is not known; choose 'auto' or one of {', '.join(b.name for b in BACKENDS)}")
