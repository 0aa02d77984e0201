"""Hugging Face models -> :class:`~mlmfast.architectures.spec.EncoderSpec`, a file a family.

A family's module has ``build(model, derived, extras, semantics)`` and may have ``EXTRAS``, the names of tensors that
transformers leaves in the checkpoint but the model as trained needs.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from mlmfast.errors import UnsupportedModelError

# model_type -> module of this package
FAMILIES = {
    "albert": "albert",
    "bert": "bert",
    "camembert": "roberta",
    "data2vec-text": "roberta",
    "deberta": "deberta",
    "deberta-v2": "deberta_v2",
    "distilbert": "distilbert",
    "electra": "electra",
    "ernie": "ernie",
    "esm": "esm",
    "modernbert": "modernbert",
    "mpnet": "mpnet",
    "rembert": "rembert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
}

# What transformers calls an activation -> what the `linear` op calls it.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}


def family_module(model_type: str | None, name: str) -> ModuleType:
    """The module that serves a ``model_type``.

    Raises:
        UnsupportedModelError: no module does; the message names those that are served.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{name}: model type {model_type!r} is not supported; known are {', '.join(sorted(FAMILIES))} "
            "and, by their own code, the other masked language models of transformers (mlmfast doctor lists them)"
        )
    return importlib.import_module(f"mlmfast.architectures.{FAMILIES[model_type]}")


def activation(name: Any, option: str, model: str) -> str:
    """The ``linear`` op's word for an activation of a config.

    Raises:
        UnsupportedModelError: no op computes it.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{model}: {option}={name!r} is not supported; known are {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def require(condition: bool, model: str, what: str) -> None:
    """Refuses by name an option of a known family that nobody has implemented."""
    if not condition:
        raise UnsupportedModelError(f"{model}: {what} is not supported")
