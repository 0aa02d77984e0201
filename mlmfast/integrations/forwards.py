"""A forward put on a module, and taken away again: by handles, whoever is the last."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from mlmfast.cpu import products
from mlmfast.errors import RequestError


class Acceleration:
    """What :func:`mlmfast.accelerate` returns: ends it, alone or as a context manager, and says what it did.

    Attributes:
        served: calls of an encoder that mlmfast computed.
        passed: calls that the original code computed.
        reason: why, of the last such call; None if there was none.
    """

    def __init__(self) -> None:
        self.served = 0
        self.passed = 0
        self.reason: str | None = None
        self._forwards: list[Forward] = []

    def join(self, forward: Forward) -> None:
        """Holds a forward in its place until :meth:`remove`."""
        forward.handles.append(self)
        self._forwards.append(forward)

    def remove(self) -> None:
        """Puts the original code back, unless another handle holds it; the second time it does nothing."""
        while self._forwards:
            self._forwards.pop().leave(self)

    def refresh(self) -> None:
        """Forgets what was computed from the weights. Only needed after they were written through ``.data``."""
        for forward in self._forwards:
            forward.server.refresh()
        products.forget()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        why = "" if self.reason is None else f", the last because {self.reason}"
        return f"Acceleration(served={self.served}, passed={self.passed}{why})"


class Server(Protocol):
    """Answers a module's calls."""

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer to one, of ``forward.original`` if need be."""

    def refresh(self) -> None:
        """Forgets what was computed from the weights."""


class Forward:
    """Stands on a module, where its class's forward is found otherwise.

    Attributes:
        accelerated: the original forward, by which :mod:`mlmfast.generic` knows that no foreign code is here.
        server: answers calls in its place.
        backend: as asked for.
        handles: those that want it there.
    """

    def __init__(self, module: nn.Module, server: Server, backend: str) -> None:
        functools.update_wrapper(self, module.forward)
        self.__signature__ = inspect.signature(module.forward)  # which Trainer reads
        code = getattr(inspect.unwrap(module.forward), "__code__", None)
        if code is not None:
            self.__code__ = code  # which torch.export reads
        self.accelerated: Callable[..., Any] = module.forward
        self.server = server
        self.backend = backend
        self.handles: list[Acceleration] = []
        self._module = module
        self._before = {name: value for name, value in module.__dict__.items() if name == "forward"}
        module.forward = self

    @classmethod
    def on(cls, module: nn.Module, backend: str) -> Forward | None:
        """The one that a module has; None if it has none.

        Raises:
            RequestError: it runs on another backend.
        """
        standing = module.__dict__.get("forward")
        if not isinstance(standing, cls):
            return None
        if standing.backend != backend:
            raise RequestError(f"the model is accelerated with backend={standing.backend!r} already; remove that first")
        return standing

    def leave(self, handle: Acceleration) -> None:
        """A handle wants it no longer; without any the original is back."""
        self.handles.remove(handle)
        # Where others have wrapped it meanwhile, it stays and does nothing.
        if not self.handles and self._module.__dict__.get("forward") is self:
            del self._module.forward
            self._module.__dict__.update(self._before)

    def original(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        """The original code's answer; the handles hear why."""
        for handle in self.handles:
            handle.passed += 1
            handle.reason = reason
        return self.accelerated(*args, **kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, those that no parameter names among them.

        Raises:
            TypeError: they are none that the original takes.
        """
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.handles:
            return self.accelerated(*args, **kwargs)
        return self.server(self, args, kwargs)

    def __reduce__(self) -> Any:
        # Copying and pickling come to a module's state when its copy exists, still empty: that one's is its class's.
        return getattr, (self._module, "forward")
