"""ERNIE (Sun et al. 2019, arXiv 1904.09223; 2.0: arXiv 1907.12412): BERT, in later ones with a task's embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from mlmfast.architectures import bert
from mlmfast.architectures.spec import Derived, EncoderSpec, table


def build(model: Any, derived: Derived, extras: dict[str, Tensor], semantics: str) -> EncoderSpec:
    """The spec of an ``ErnieForMaskedLM``; both semantics are the same."""
    spec = bert.build(model, derived, extras, semantics)
    embeddings = model.ernie.embeddings
    if not embeddings.use_task_id:
        return spec
    types, tasks = table(embeddings.token_type_embeddings), table(embeddings.task_type_embeddings)
    # Every token is of task 0 unless the caller says otherwise, so the task goes into the token types.
    both = derived.get("task and token types", [types, tasks], lambda: types + tasks[0])
    return replace(spec, embedding=replace(spec.embedding, types=both))
