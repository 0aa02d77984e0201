"""What is asked of the machine before a backend is chosen, in one place, so that a test can tell of another machine."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GPU:
    """A GPU that torch can use.

    Attributes:
        name: as it calls itself.
        capability: its compute capability, (8, 0) for an A100.
        memory_bytes: all of its memory, free or not.
        maker: ``"NVIDIA"``, or ``"AMD"`` where torch is built for ROCm.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    maker: str = "NVIDIA"


def gpus() -> list[GPU]:
    """The GPUs that torch can use, the current one first: that one decides which backends serve."""
    if not torch.cuda.is_available():
        return []
    maker = "NVIDIA" if torch.version.hip is None else "AMD"
    current = torch.cuda.current_device()
    found = []
    for i in sorted(range(torch.cuda.device_count()), key=lambda i: i != current):
        properties = torch.cuda.get_device_properties(i)
        found.append(GPU(properties.name, (properties.major, properties.minor), properties.total_memory, maker))
    return found


def torch_has_cuda() -> bool:
    """Whether torch is built for GPUs: a CPU build finds none, whatever the machine has."""
    return torch.version.cuda is not None or torch.version.hip is not None


def extension(name: str) -> int | str:
    """Loads a compiled extension of mlmfast.

    Args:
        name: of its module, such as ``"mlmfast._cuda"``, whose ops are ``torch.ops.mlmfast_cuda``.

    Returns:
        Its version, 0 if it is so old that it does not say; or what is wrong with it, such as ``"is not installed"``.
    """
    if importlib.util.find_spec(name) is None:
        return "is not installed"
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # undefined symbols, another platform, a failed registration
        return f"does not load ({error})"
    try:
        return int(getattr(torch.ops, name.replace(".", "")).version())
    except AttributeError:
        return 0


def extension_problem(name: str, version: int) -> str | None:
    """What is wrong with an extension that must be of ``version``, as the end of a sentence; None if it is loaded."""
    found = extension(name)
    if isinstance(found, str):
        return found
    return None if found == version else f"is of version {found} where {version} is needed"


def gpu_problem(least: tuple[int, int]) -> str | None:
    """Why kernels for NVIDIA's GPUs from capability ``least`` have none here, as the end of a sentence; or None."""
    found = gpus()
    if not found:
        return "need a GPU, and " + ("torch finds none" if torch_has_cuda() else "this torch is built without CUDA")
    if found[0].maker != "NVIDIA":
        return f"here were never run on {found[0].maker}'s GPUs"
    if found[0].capability < least:
        needed, has = (".".join(map(str, capability)) for capability in (least, found[0].capability))
        return f"need compute capability {needed} or newer, and this GPU has {has}"
    return None
