"""Masked and causal models by name: which of the two one is, and a causal one loaded.

Also the line break of a model's prompts, which depends on its tokenizer.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

import mlmfast
from mlmfast.checkpoint import (
    UNREADABLE,
    check_finite,
    device_of,
    dtype_of,
    load_tokenizer,
    quiet_transformers,
    weight_files,
)
from mlmfast.errors import CheckpointError, RequestError
from mlmfast.icl.tasks import SEPARATOR as LITERAL

KINDS = ("masked", "causal")
NEWLINE = "\n"
SEPARATORS = {"newline": NEWLINE, "literal": LITERAL}
TINY = Path(mlmfast.__file__).with_name("tiny")


def split(spec: str) -> tuple[str | None, str]:
    """``causal:PATH`` -> the kind and the name; the kind None where none is given."""
    kind, colon, name = spec.partition(":")
    return (kind, name) if colon and kind in KINDS else (None, spec)


def kind_of(name: str, revision: str | None = None) -> str:
    """Whether a checkpoint is a masked or a causal language model, by its config.

    Raises:
        CheckpointError: nothing is there.
        RequestError: the config does not say.
    """
    if name == "tiny":
        return "masked"
    try:
        with quiet_transformers():
            config, _ = transformers.PreTrainedConfig.get_config_dict(os.path.expanduser(name), **_options(revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--model {name}: no model is there; give 'tiny', a folder with a config.json, or a name on the Hub "
            f"({error})"
        ) from error
    if not config:
        raise CheckpointError(f"--model {name}: no config.json is there")
    # GPT-2 alone has a head of another name; a BERT that is called a decoder says so in its architecture.
    for architecture in config.get("architectures") or []:
        if architecture.endswith(("ForMaskedLM", "ForPreTraining")):
            return "masked"
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal"
    found = config.get("model_type")
    if found in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked"
    if found in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise RequestError(
        f"--model {name}: its config (model_type {found!r}) says neither masked nor causal: write masked:{name} or "
        f"causal:{name}"
    )


def load_causal(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    allow_random_head: bool = False,
) -> tuple[Any, Any]:
    """A causal model and its tokenizer, under the rules for masked ones: no remote code, no random head.

    Args:
        name: a folder or a name on the Hub.
        dtype, device, revision, allow_random_head: as in :func:`mlmfast.load`.

    Raises:
        RequestError, CheckpointError: as :func:`mlmfast.load` does.
    """
    source, options = os.path.expanduser(name), _options(revision)
    chosen = torch.float32 if dtype == "auto" else dtype_of(dtype)
    place = device_of(device)
    with quiet_transformers():
        try:
            weight_files(source, revision)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=chosen, output_loading_info=True, weights_only=True, **options
            )
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{name}: its .bin file holds more than tensors; use safetensors weights") from error
        except CheckpointError:
            raise
        except UNREADABLE as error:
            raise CheckpointError(f"{name}: it cannot be read as a causal model: {error}") from error
        tokenizer = load_tokenizer(source, options)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing and not allow_random_head:
        raise CheckpointError(
            f"{name}: {len(missing)} tensors are not in the checkpoint and would be freshly initialised "
            f"({', '.join(missing[:3])}), so its answers would be noise"
        )
    check_finite(name, dict(model.named_parameters()))
    return model.eval().to(place), tokenizer


def separator_of(choice: str, tokenizer: Any) -> str:
    """The line break of prompts that a ``--separator`` means for a tokenizer.

    ``auto`` is a line break where the tokenizer keeps it. Where it does not, it is the paper's literal, a backslash, an
    n and a space; but for the bundled tokenizer, whose training texts have spaces for line breaks and no such literals.
    """
    if choice != "auto":
        return written(choice)
    return NEWLINE if keeps_newlines(tokenizer) or is_bundled(tokenizer) else LITERAL


def written(choice: str) -> str:
    r"""A separator by its name, or any text: ``\n`` in it is a line break, ``\\n`` the two characters."""
    return SEPARATORS.get(choice) or choice.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")


def keeps_newlines(tokenizer: Any) -> bool:
    """Whether a line break reads like something else than a space or nothing; BERT's and DeBERTa's drop it."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one.\ntwo", "one. two", "one.two")]
    return ids[0] not in ids[1:]


def is_bundled(tokenizer: Any) -> bool:
    """Whether a tokenizer reads text as that of the bundled model does, whatever it is called and closes texts with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    bundled, own = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8")), json.loads(backend.to_str())
    return all(own[part] == bundled[part] for part in ("normalizer", "pre_tokenizer", "model"))


def slug(name: str) -> str:
    """A model's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _options(revision: str | None) -> dict[str, Any]:
    return {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
