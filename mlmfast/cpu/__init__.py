"""The cpu backend: oneDNN's products with packed weights, and the compiled extension ``mlmfast._cpu``.

``linear`` needs nothing but torch. Every other op is served by the extension, which registers its functions under
``torch.ops.mlmfast_cpu``. It may be absent (an install without a compiler) or fail to load; neither is an error, since
plain torch serves the same ops: :func:`missing` says so to :mod:`mlmfast.backends`, and through it to the user.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

WITHOUT_EXTENSION = frozenset({"linear"})

REMEDY = (
    "to build it, install a C++17 compiler (g++ 11 or clang 14, or newer), then "
    "`pip install --no-build-isolation --force-reinstall --no-deps mlmfast`, "
    "or in a checkout `pip install --no-build-isolation -e .`"
)


def _load(name: str) -> str | None:
    """Imports the extension; what went wrong, or None."""
    if importlib.util.find_spec(name) is None:
        return "is not installed"
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # undefined symbols, another platform, a failed registration
        return f"does not load ({error})"
    return None


_problem = _load("mlmfast._cpu")


def missing(op: str) -> str | None:
    """Why this backend cannot serve an op here, what that costs and the remedy; None if it can."""
    return None if op in WITHOUT_EXTENSION else extension_missing()


def extension_missing() -> str | None:
    """What is wrong with the compiled extension, what that costs and the remedy; None if it is loaded."""
    if _problem is None:
        return None
    return (
        f"cpu's compiled extension {_problem}, so plain torch serves instead: the same scores, slower and with more "
        f"memory; {REMEDY}"
    )


def instructions() -> str | None:
    """The instruction-set path that the extension uses here, such as ``"avx512_bf16"``; None without the extension."""
    return None if _problem else str(torch.ops.mlmfast_cpu.instructions())
