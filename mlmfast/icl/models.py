"""A model by name, masked or causal, as a model of lm_eval's, and what its answers depend on.

Masked models answer through :class:`mlmfast.integrations.lm_eval.MLMFastLM`, causal ones through lm_eval's own ``hf``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM

from mlmfast.checkpoint import quiet_transformers
from mlmfast.errors import RequestError
from mlmfast.icl.checkpoints import kind_of, load_causal, separator_of, slug, split
from mlmfast.identity import digest, versions
from mlmfast.integrations.lm_eval import LENGTHS, MLMFastLM

METRIC = "window"
MASKS = 3  # appended where masked models generate
# Rows of a causal model's batch: their logits are all held at once, in float32 twice.
CAUSAL_TOKENS, CAUSAL_ROWS = 2048, 64


@dataclass(frozen=True)
class Settings:
    """How models are loaded and asked.

    Attributes:
        metric, window: of masked models, as in :meth:`mlmfast.MaskedLM.score`; None: the paper's.
        dtype, device, backend, batch_tokens, revision, semantics, objective, allow_random_head: as in
            :func:`mlmfast.load`.
    """

    metric: str | None = None
    window: int = 3
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    batch_tokens: int | None = None
    revision: str | None = None
    semantics: str = "trained"
    objective: str = "mlm"
    allow_random_head: bool = False


@dataclass(frozen=True, eq=False)
class Opened:
    """A model that has been loaded.

    Attributes:
        name: as it was asked for, without the kind before it.
        kind: ``masked`` or ``causal``.
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
        own = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return f"{slug(Path(self.name).name)[:40]}-{own[:16]}"

    def lengths(self, kind: str, requests: Sequence[Any]) -> list[int]:
        """Tokens of each request, special ones, masks and those to be generated included.

        Raises:
            RequestError: a causal model does not hold what is scored, or to be generated, alone.
        """
        if kind == "generate_until":
            texts = [request.args[0] for request in requests]
            masks = MASKS - 1 if self.kind == "masked" else 0  # the last token is predicted with them
            added = [_generated(request.args[1]) + masks for request in requests]
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


def open_model(spec: str, settings: Settings, separator: str = "auto") -> Opened:
    """Loads a model.

    Args:
        spec: a name or folder, perhaps after ``masked:`` or ``causal:``.
        settings: how.
        separator: the line break of its prompts, as :func:`mlmfast.icl.checkpoints.separator_of` takes it.

    Raises:
        MLMFastError: a model that is not there or cannot be used.
    """
    kind, name = split(spec)
    kind = kind or kind_of(name, settings.revision)
    common: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "batch_tokens": settings.batch_tokens}
    if kind == "masked":
        own: dict[str, Any] = {
            "metric": settings.metric or METRIC,
            "window": settings.window,
            "backend": settings.backend,
            "semantics": settings.semantics,
            "objective": settings.objective,
        }
        head = settings.allow_random_head
        lm = MLMFastLM(name, revision=settings.revision, allow_random_head=head, **own, **common)
        model, tokenizer, extras = lm.lm.model, lm.lm.tokenizer, lm.lm.extras
        own["num_masks"] = MASKS
        if own["metric"] != "window":
            del own["window"]
    else:
        own, lm = {}, _causal(name, settings)
        model, tokenizer, extras = lm.model, lm.tokenizer, {}
    common |= {"dtype": str(next(model.parameters()).dtype), "device": lm.device.type}
    # Neither name nor revision: the same weights give the same answers wherever they lie.
    identity: dict[str, Any] = {"kind": kind} | own | common | versions() | {"lm_eval": lm_eval.__version__}
    identity["weights"] = digest(model, tokenizer, extras)
    return Opened(
        name=name,
        kind=kind,
        lm=lm,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        limit=lm.max_length,
        separator=separator_of(separator, tokenizer),
        identity=identity,
    )


def _causal(name: str, settings: Settings) -> Any:
    """A causal model behind lm_eval's ``hf``."""
    model, tokenizer = load_causal(
        name,
        dtype=settings.dtype,
        device=settings.device,
        revision=settings.revision,
        allow_random_head=settings.allow_random_head,
    )
    ids = tokenizer("a")["input_ids"]
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of every choice it makes; contexts that are cut are counted here
    try:
        with quiet_transformers():
            return HFLM(
                model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=1,
                # A tokenizer that closes every text would put its mark between context and continuation.
                add_bos_token=False if ids and ids[-1] in tokenizer.all_special_ids else None,
            )
    finally:
        log.setLevel(level)


def _generated(settings: dict[str, Any]) -> int:
    return int(next((settings[name] for name in LENGTHS if settings.get(name) is not None), 0))
