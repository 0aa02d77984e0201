"""The cpu backend: oneDNN's products with packed weights, and the compiled extension ``mlmfast._cpu``.

``linear`` needs nothing but torch. Every other op is served by the extension, which registers its functions under
``torch.ops.mlmfast_cpu``. It may be absent (an install without a compiler) or fail to load; neither is an error, since
plain torch serves the same ops: :func:`missing` says so to :mod:`mlmfast.backends`, and through it to the user.
"""

from __future__ import annotations

import torch

from mlmfast import machine

WITHOUT_EXTENSION = frozenset({"linear"})

# The csrc/cpu/library.cpp that this Python goes with.
VERSION = 6

# An earlier attempt may have left a wheel without the extension in pip's cache.
REMEDY = (
    "to build it, install a C++17 compiler (g++ 11 or clang 14, or newer) and Python's headers, then "
    "`MLMFAST_BUILD_CPU=1 pip install --no-cache-dir --force-reinstall --no-deps mlmfast`, "
    "or in a checkout `MLMFAST_BUILD_CPU=1 pip install -e .`"
)


_problem = machine.extension_problem("mlmfast._cpu", VERSION)


def missing(op: str, device: str = "cpu") -> str | None:
    """Why this backend cannot serve an op here, what that costs and the remedy; None if it can."""
    return None if op in WITHOUT_EXTENSION else extension_missing()


def extension_missing() -> str | None:
    """What is wrong with the compiled extension, what that costs and the remedy; None if it is loaded."""
    if _problem is None:
        return None
    return (
        f"cpu's compiled extension {_problem}, so plain torch serves instead: the same scores with more memory, in 1.3 "
        f"to 1.5 times the time in float32 and 3 to 6 times in bfloat16 (DeBERTa-v3-base, 24 to 128 tokens); {REMEDY}"
    )


def instructions() -> str | None:
    """The instruction-set path that the extension uses here, such as ``"avx512_bf16"``; None without the extension."""
    return None if _problem else str(torch.ops.mlmfast_cpu.instructions())
