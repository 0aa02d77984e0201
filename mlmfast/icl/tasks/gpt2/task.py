"""The class of the GPT-2 paper's tasks: :class:`mlmfast.icl.tasks.task.ICLTask`, and under ``metadata`` besides:

``pairs``
    a function of a row: its candidates' (context, continuation), of which the continuation is scored.
``request``
    another kind of request than the output type's own: ``last_word``, which ``mlmfast eval`` answers.
``text``
    how a local file that is no JSON Lines is read: ``whole``, one text, or ``lines``, a text a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from mlmfast.errors import RequestError
from mlmfast.icl.tasks.rows import INDEX, SUFFIXES, Rows, Splits, local_files
from mlmfast.icl.tasks.task import ICLTask


class GPT2Task(ICLTask):
    """One task."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        """Text files, too, for the tasks that read texts; and a data set that no Hub name is known of needs a file."""
        metadata = self.config.metadata
        source = (metadata.get("data") or {}).get(self.name)
        if source is None and not self.DATASET_PATH:
            raise RequestError(f"{self.name} is of a data set that is not on the Hub as rows of text: name a file")
        if source is not None and metadata.get("text"):
            path, _ = local_files(self.name, source)
            if not path.name.endswith(SUFFIXES):
                rows = read_text(path, next(iter(metadata["fields"])), metadata["text"] == "lines")
                self.dataset = Splits({self.config.test_split: lambda: rows})
                return
        super().download(dataset_kwargs, **options)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **options: Any) -> list[Instance] | Instance:
        metadata: Mapping[str, Any] = self.config.metadata
        if "pairs" in metadata:
            for name in ("apply_chat_template", "chat_template"):
                options.pop(name, None)
            return [Instance("loglikelihood", doc, pair, i, **options) for i, pair in enumerate(metadata["pairs"](doc))]
        found = super().construct_requests(doc, ctx, **options)
        if "request" in metadata:
            assert isinstance(found, Instance)
            found.request_type = metadata["request"]
        return found


def read_text(path: Path, field: str, lines: bool) -> Rows:
    """A text file as one row, or as a row a line, empty ones left out. Line breaks stay as they are.

    Raises:
        RequestError: it is empty or not UTF-8.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: {error}") from error
    texts = [line for line in text.split("\n") if line.strip()] if lines else [text] if text.strip() else []
    if not texts:
        raise RequestError(f"{path} has no text")
    return Rows([{field: one, INDEX: i} for i, one in enumerate(texts)], [field])
