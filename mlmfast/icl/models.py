"""A model by name, masked or causal, as a model of lm_eval's, and what its answers depend on.

Masked models answer through :class:`mlmfast.integrations.lm_eval.MLMFastLM`, causal ones through lm_eval's own ``hf``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

import mlmfast
from mlmfast.checkpoint import DTYPES, UNREADABLE, load_tokenizer, quiet_transformers
from mlmfast.errors import CheckpointError, RequestError
from mlmfast.integrations.lm_eval import LENGTHS, MLMFastLM

KINDS = ("masked", "causal")
METRIC = "window"
# What the paper writes for a line break where the tokenizer has none of its own, and what everyone else writes.
LITERAL, NEWLINE = "\\n ", "\n"
# Rows of a causal model's batch: their logits are all held at once, in float32 twice.
CAUSAL_TOKENS, CAUSAL_ROWS = 2048, 64
# Of a config: where it came from, not what it says.
_PLACES = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Settings:
    """How models are loaded and asked.

    Attributes:
        metric, window: of masked models, as in :meth:`mlmfast.MaskedLM.score`; None: the paper's.
        dtype, device, backend, batch_tokens, revision: as in :func:`mlmfast.load`.
    """

    metric: str | None = None
    window: int = 3
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    batch_tokens: int | None = None
    revision: str | None = None


@dataclass(frozen=True, eq=False)
class Opened:
    """A model that has been loaded.

    Attributes:
        name: as it was asked for, without the kind before it.
        kind: one of :data:`KINDS`.
        lm: the model of lm_eval's.
        parameters: their number.
        limit: tokens that it holds; None: any number.
        separator: the line break of its prompts.
        identity: what its answers depend on besides the requests.
    """

    name: str
    kind: str
    lm: Any
    parameters: int
    limit: int | None
    separator: str
    identity: dict[str, Any]

    @property
    def file(self) -> str:
        """A file name that no other identity has."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        readable = "".join(letter if letter.isalnum() else "_" for letter in Path(self.name).name)
        return f"{readable[:40]}-{digest[:16]}"

    def lengths(self, kind: str, requests: Sequence[Any]) -> list[int]:
        """Tokens of each request, special ones and those to be generated included.

        Raises:
            RequestError: a causal model does not hold what is scored, or to be generated, alone.
        """
        if kind == "generate_until":
            texts = [request.args[0] for request in requests]
            added = [_generated(request.args[1]) for request in requests]
        else:
            texts = ["".join(request.args) for request in requests]
            # A causal model does not read the last token.
            added = [-1 if self.kind == "causal" else 0] * len(requests)
        encoded = self.lm.tokenizer(texts, verbose=False)["input_ids"]
        found = [len(ids) + more for ids, more in zip(encoded, added)]
        for request, length in zip(requests, found):
            if self.kind == "causal" and self.limit is not None and length > self.limit:
                self._check_holds(kind, request)
        return found

    def _check_holds(self, kind: str, request: Any) -> None:
        """lm_eval's ``hf`` cuts contexts and asserts that all else fits."""
        text = request.args[-1]
        own = (
            _generated(text) + 1
            if kind == "generate_until"
            else len(self.lm.tokenizer(text, verbose=False)["input_ids"])
        )
        if own > (self.limit or own):
            raise RequestError(
                f"{self.name} holds {self.limit} tokens, fewer than the {own} that a request scores or generates "
                f"({str(text)[:60]!r}): take a model that holds more, or leave the task out"
            )

    def prepare(self, longest: int) -> None:
        """Sets a causal model's rows of a batch by its longest row. Masked models pack by tokens themselves."""
        if self.kind == "causal":
            most = self.identity["batch_tokens"] or CAUSAL_TOKENS
            self.lm.batch_size_per_gpu = min(CAUSAL_ROWS, max(1, most // max(1, longest)))


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
    options = {} if revision is None else {"revision": revision}
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(os.path.expanduser(name), **options)
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


def open_model(spec: str, settings: Settings, separator: str | None = None) -> Opened:
    """Loads a model.

    Args:
        spec: a name or folder, perhaps after ``masked:`` or ``causal:``.
        settings: how.
        separator: the line break of its prompts. None: :data:`LITERAL` where the tokenizer drops line breaks, else
            :data:`NEWLINE`.

    Raises:
        MLMFastError: a model that is not there or cannot be used.
    """
    kind, name = split(spec)
    kind = kind or kind_of(name, settings.revision)
    common: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "batch_tokens": settings.batch_tokens}
    versions = {"mlmfast": mlmfast.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if kind == "masked":
        own: dict[str, Any] = {
            "metric": settings.metric or METRIC,
            "window": settings.window,
            "backend": settings.backend,
        }
        lm = MLMFastLM(name, revision=settings.revision, **own, **common)
        model, tokenizer, extras = lm.lm.model, lm.lm.tokenizer, lm.lm._extras
        own |= {"semantics": lm.lm.semantics, "objective": lm.lm.objective, "num_masks": 3}
        if own["metric"] != "window":
            del own["window"]
    else:
        own, lm = {}, _causal(name, settings)
        model, tokenizer, extras = lm.model, lm.tokenizer, {}
    common |= {"dtype": str(next(model.parameters()).dtype), "device": lm.device.type}
    # Neither name nor revision: the same weights give the same answers wherever they lie.
    identity: dict[str, Any] = {"kind": kind} | own | common | versions
    identity["weights"] = digest(model, tokenizer, extras)
    return Opened(
        name=name,
        kind=kind,
        lm=lm,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        limit=lm.max_length,
        separator=separator or (LITERAL if drops_newlines(tokenizer) else NEWLINE),
        identity=identity,
    )


def _causal(name: str, settings: Settings) -> Any:
    """A causal model behind lm_eval's ``hf``."""
    if settings.dtype != "auto" and settings.dtype not in DTYPES:
        raise RequestError(f"--dtype {settings.dtype} is not known; choose auto or one of {', '.join(DTYPES)}")
    path = os.path.expanduser(name)
    options = {"trust_remote_code": False} | ({} if settings.revision is None else {"revision": settings.revision})
    with quiet_transformers():
        tokenizer = load_tokenizer(path, options)
    ids = tokenizer("a")["input_ids"]
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of every choice it makes; contexts that are cut are counted here
    try:
        with quiet_transformers():
            return HFLM(
                path,
                backend="causal",
                tokenizer=tokenizer,
                device=device,
                dtype="float32" if settings.dtype == "auto" else settings.dtype,
                revision=settings.revision or "main",
                batch_size=1,
                # A tokenizer that closes every text would put its mark between context and continuation.
                add_bos_token=False if ids and ids[-1] in tokenizer.all_special_ids else None,
            )
    except UNREADABLE as error:
        raise CheckpointError(f"--model {name} cannot be loaded as a causal model: {error}") from error
    finally:
        log.setLevel(level)


def drops_newlines(tokenizer: Any) -> bool:
    """Whether a line break reads like a space, as BERT's and DeBERTa's tokenizers have it."""
    return bool(tokenizer("a\na")["input_ids"] == tokenizer("a a")["input_ids"])


def digest(model: Any, tokenizer: Any, extras: dict[str, torch.Tensor]) -> str:
    """A name for weights, config and tokenizer that changes with any of them.

    Taken of what was loaded, not of files, so that it does not matter where they came from.
    """
    found = hashlib.sha256()
    for name, tensor in sorted([*model.state_dict().items(), *extras.items()]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PLACES}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    found.update(vocabulary.encode())
    found.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _generated(settings: dict[str, Any]) -> int:
    return int(next((settings[name] for name in LENGTHS if settings.get(name) is not None), 0))
