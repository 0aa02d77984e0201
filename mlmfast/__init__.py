"""Masked language models, as cheap to use as causal ones: exact pseudo-log-likelihoods in one packed pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlmfast.errors import (
    BackendError,
    CheckpointError,
    MLMFastError,
    RequestError,
    TextError,
    UnsupportedModelError,
)
from mlmfast.masking import METRICS
from mlmfast.results import Distribution, Fill, Generation, Ranking, Score

if TYPE_CHECKING:
    from mlmfast.checkpoint import load
    from mlmfast.integrations.transformers import accelerate
    from mlmfast.model import MaskedLM

__version__ = "0.1.0"

__all__ = [
    "METRICS",
    "BackendError",
    "CheckpointError",
    "Distribution",
    "Fill",
    "Generation",
    "MLMFastError",
    "MaskedLM",
    "Ranking",
    "RequestError",
    "Score",
    "TextError",
    "UnsupportedModelError",
    "accelerate",
    "load",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `mlmfast --help` should not.
    if name == "load":
        from mlmfast.checkpoint import load

        return load
    if name == "accelerate":
        from mlmfast.integrations.transformers import accelerate

        return accelerate
    if name == "MaskedLM":
        from mlmfast.model import MaskedLM

        return MaskedLM
    raise AttributeError(f"module 'mlmfast' has no attribute {name!r}")
