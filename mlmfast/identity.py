"""What tells a model from others, and a machine's software: what answers that are kept in files depend on."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from typing import Any

import torch

import mlmfast

# Of a config: where it came from, not what it says.
_PLACES = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")


def digest(model: Any, tokenizer: Any, extras: dict[str, torch.Tensor] | None = None) -> str:
    """A name for weights, config and tokenizer that changes with any of them.

    Taken of what was loaded, not of files, so that it does not matter where they came from.

    Args:
        model, tokenizer: transformers'.
        extras: tensors beside the model's (:attr:`mlmfast.MaskedLM.extras`).
    """
    found = hashlib.sha256()
    for name, tensor in sorted([*model.state_dict().items(), *(extras or {}).items()]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PLACES}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    found.update(vocabulary.encode())
    found.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Of what last digits depend on."""
    found = {"mlmfast": mlmfast.__version__, "torch": torch.__version__}
    return found | {name: metadata.version(name) for name in ("transformers", "tokenizers")}
