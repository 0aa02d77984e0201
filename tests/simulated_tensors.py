"""The tensors of a simulated GPU: they say that they are on ``cuda:0``, and their numbers are on the host.

What is held to CUDA's rules:

- tensors of the host and of the device do not meet in an operation, but for single numbers, indices and copies;
- what makes the host wait (a value read, a size that depends on values, a copy that is not ``non_blocking``) is an
  error where :func:`torch.cuda.set_sync_debug_mode` says so, and in every recording;
- a recording holds operations with the memory that they were given, and a replay repeats them there (what would be
  gone by then is kept: only values that have changed show);
- memory is counted, and limited by :func:`torch.cuda.set_per_process_memory_fraction`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
# What torch's own code takes the tensors for: it would look for a driver to switch to a cuda device.
META = torch.device("meta")
PROPERTIES = SimpleNamespace(
    name="Simulated GPU",
    major=9,
    minor=0,
    total_memory=8 << 30,
    multi_processor_count=2,
    L2_cache_size=1 << 20,
    shared_memory_per_block_optin=227 << 10,
)
aten = torch.ops.aten
# What the host would wait for: a number, or how many there are.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# Where tensors of the host are welcome beside the device's: the device reads them before the operation returns.
MIXING = {aten.copy_.default, aten._to_copy.default, *INDEXING}


# What makes a tensor of values that the host has: a copy that is waited for.
FROM_VALUES = {torch.tensor, torch.as_tensor}


class Memory:
    """How much of it tensors hold, each storage counted once."""

    def __init__(self) -> None:
        self.limit = PROPERTIES.total_memory
        self._held: dict[int, list[int]] = {}  # address -> tensors on it, bytes

    @property
    def used(self) -> int:
        return sum(size for _, size in self._held.values())

    def take(self, held: Tensor) -> Callable[[], None]:
        """Counts a tensor's storage; returns what gives it back."""
        storage = held.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._held and self.used + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory (simulated): {self.used} + {size} > {self.limit} bytes")
        entry = self._held.setdefault(address, [0, size])
        entry[0] += 1

        def give() -> None:
            entry[0] -= 1
            if entry[0] == 0 and self._held.get(address) is entry:
                del self._held[address]

        return give


class Device:
    """What the simulated device does at the moment.

    Attributes:
        recording: operations of the graph that is being recorded, None if none is.
        sync: of ``set_sync_debug_mode``.
        kernels: how many kernels of Triton have been launched.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self.recording: list[Callable[[], None]] | None = None
        self.sync = 0
        self.kernels = 0

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        if self.recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({why})")
        if self.sync == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({why})")

    def did(self, again: Callable[[], None]) -> None:
        """Something was computed; ``again`` computes it anew in the same memory."""
        if self.recording is not None:
            self.recording.append(again)


DEVICE = Device()


class Holding:
    """Gives memory back when the tensor that has it goes. A weak reference to the tensor itself would forbid
    torch.utils.swap_tensors."""

    def __init__(self, held: Tensor) -> None:
        weakref.finalize(self, DEVICE.memory.take(held)).atexit = False


class OnGPU(Tensor):
    """A tensor of the simulated device. Its numbers are those of ``held``, on the host."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        assert type(held) is Tensor and held.device == HOST
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=META
        )
        made.held, made.holding = held, Holding(held)
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    # torch's stubs give __repr__ another argument, and call the others plain attributes.
    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.held!r})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mlmfast":  # an op chooses its backend by its tensors' device
            with MODE:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        return compute(func, args, kwargs)


def on_device(value: Any) -> bool:
    return isinstance(value, OnGPU)


def held(value: Any) -> Any:
    """The tensor of the host behind a tensor; anything else as it is."""
    return value.held if isinstance(value, OnGPU) else value


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation with tensors of the device among its arguments."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wanted = kwargs.get("device")
    to_device = wanted is None or torch.device(wanted).type in ("cuda", "meta")
    check(func, leaves, kwargs, to_device)
    given, named = tree_map(held, args), tree_map(held, kwargs)
    if wanted is not None:
        named["device"] = HOST
    if func is aten._to_copy.default:
        named.pop("non_blocking", None)
    out = func(*given, **named)
    given_ones = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, OnGPU)}
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    if not views:
        DEVICE.did(again(func, given, named, out))
    if not to_device:
        return out  # a copy for the host
    # A view is an inference tensor if what it shows is one. What was written in place is the tensor that was given.
    with torch.inference_mode(leaves[0].is_inference()) if views and leaves else nullcontext():
        return wrapped(out, given_ones)


def check(func: Any, leaves: list[Tensor], kwargs: dict[str, Any], to_device: bool) -> None:
    """Whether CUDA would take these tensors together, and would not make the host wait where it must not."""
    assert not any(leaf.is_meta for leaf in leaves), f"{func}: torch has made a tensor of a number, and lost it"
    strangers = [leaf for leaf in leaves if not on_device(leaf) and leaf.dim() > 0]
    if strangers and func not in MIXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got some on cuda:0 and cpu")
    if func in WAITING:
        DEVICE.wait(str(func))
    if func in INDEXING and (strangers or any(leaf.dtype in (torch.bool, torch.uint8) for leaf in leaves[1:])):
        DEVICE.wait(f"{func} by a mask or by indices of the host")
    if func is aten._to_copy.default and not to_device and not kwargs.get("non_blocking"):
        DEVICE.wait("a copy to the host")


def again(func: Any, args: Any, kwargs: Any, out: Any) -> Callable[[], None]:
    """The operation once more, into the same memory."""

    def repeat() -> None:
        for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
            if isinstance(old, Tensor) and old is not new:
                old.copy_(new)

    return repeat


class Simulation(TorchFunctionMode):
    """Carries out what names the device, or asks a tensor for its memory, before torch looks for a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if args and on_device(args[0]):
            if func in ANSWERS:
                return ANSWERS[func](*args)
            args = numbers_placed(func, args)
        if func is Tensor.cuda:
            return to_cuda(args[0], not_waiting(args[2:], kwargs))
        if func is Tensor.to and any(map(names_device, (*args[1:], kwargs.get("device")))):
            return converted(args[0], [value for value in args[1:] if not names_device(value)], kwargs)
        if func is Tensor.copy_ and on_device(args[0]) != on_device(args[1]) and not not_waiting(args[2:], kwargs):
            DEVICE.wait("a copy between host and device")
        if names_device(kwargs.get("device")):
            del kwargs["device"]
            if not any(map(on_device, tree_leaves(args))):
                return made(partial(func, device=HOST), args, kwargs, func in FROM_VALUES)
        return func(*args, **kwargs)


def made(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], from_values: bool) -> Any:
    """A new tensor of the device."""
    if from_values:
        DEVICE.wait("values of the host")
    out = func(*args, **kwargs)
    DEVICE.did(again(func, args, kwargs, out))
    return wrapped(out)


def numbers_placed(func: Any, args: Any) -> Any:
    """Arguments in which is a tensor what torch would make one of itself, on the device that it takes ours for."""
    if func in (Tensor.where, torch.where):
        kind = next(a.dtype for a in reversed(args) if isinstance(a, Tensor) and a.dtype != torch.bool)
        return tuple(a if isinstance(a, Tensor) else torch.tensor(a, dtype=kind) for a in args)
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        args = (args[0], placed(args[1]), *args[2:])
    if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
        args = (*args[:2], OnGPU(torch.tensor(args[2], dtype=args[0].dtype)))
    return args


def placed(index: Any) -> Any:
    """An index whose lists and arrays are tensors of the device."""
    if isinstance(index, tuple):
        return tuple(placed(one) for one in index)
    return OnGPU(torch.as_tensor(index)) if isinstance(index, (list, np.ndarray)) else index


def names_device(value: Any) -> bool:
    """Whether a value is the simulated device, in any of its spellings."""
    if isinstance(value, str):
        return value.partition(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def wrapped(found: Any, known: Mapping[int, OnGPU] = MappingProxyType({})) -> Any:
    """Tensors of the host, as the device's: those that are known by their identity, and new ones."""

    def one(value: Any) -> Any:
        if type(value) is not Tensor:
            return value
        return known[id(value)] if id(value) in known else OnGPU(value)

    return tree_map(one, found)


def to_cuda(tensor: Tensor, non_blocking: bool = False) -> Tensor:
    """A copy on the device; what is there already as it is."""
    if on_device(tensor):
        return tensor
    if not non_blocking:
        DEVICE.wait("a copy from pageable memory")
    moved = OnGPU(torch.clone(tensor.detach()))
    DEVICE.did(lambda: moved.held.copy_(tensor.detach()))
    return moved


def not_waiting(rest: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a copy is asked for with ``non_blocking``, by its name or as the first truth value."""
    return bool(kwargs.get("non_blocking", next((value for value in rest if isinstance(value, bool)), False)))


def converted(tensor: Tensor, rest: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """``tensor.to(device, *rest, **kwargs)``."""
    dtype = next((value for value in (*rest, kwargs.get("dtype")) if isinstance(value, torch.dtype)), tensor.dtype)
    return to_cuda(tensor, not_waiting(rest, kwargs)).to(dtype)


def deep(tensor: OnGPU, memo: dict[int, Any]) -> OnGPU:
    """For copies of whole models."""
    made: Any = OnGPU(tensor.held.detach().clone())
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, tensor.requires_grad)
    memo[id(tensor)] = made
    return made


def values(tensor: OnGPU) -> Any:
    DEVICE.wait("its values")
    return tensor.held.tolist()


def no_array(tensor: OnGPU, *_: Any) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")


def written(tensor: OnGPU, form: str) -> str:
    return tensor.item().__format__(form) if tensor.dim() == 0 else repr(tensor)


# What is asked of a tensor's memory or its numbers.
ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.data_ptr: lambda tensor: tensor.held.data_ptr(),
    Tensor.untyped_storage: lambda tensor: tensor.held.untyped_storage(),
    Tensor.__deepcopy__: deep,
    Tensor.__format__: written,
    Tensor.tolist: values,
    Tensor.numpy: no_array,
}
MODE = Simulation()
