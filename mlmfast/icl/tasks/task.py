"""The class of every task here: lm_eval's own, but for what the paper does differently.

A YAML file says what lm_eval's say, and under ``metadata`` besides:

``fields``
    field of a row -> what it holds (:data:`mlmfast.icl.tasks.rows.KINDS`).
``test_fields``
    fields that only test rows need.
``labels``
    class by class the words that name it in a row.
``beside``, ``words``
    the scored span: the last so many words of the prompt are as many as the candidate has, and the fields named in
    ``beside``, and ``words`` more.
``unconditional``
    from a candidate's score is subtracted what it has after this text.
``around``
    demonstrations come from the test split, none of them so near to the test example.

``<br>`` in templates and stop strings is the separator. A function for ``doc_to_text`` is called with the row and the
separator; one for ``process_results`` as :mod:`mlmfast.icl.tasks.metrics` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import apply_template

from mlmfast.errors import RequestError
from mlmfast.icl.tasks import PREFIX, SEED, SEPARATOR
from mlmfast.icl.tasks.demonstrations import PerExample
from mlmfast.icl.tasks.rows import INDEX, Rows, Splits, checked, local_files, read_file

BREAK = "<br>"
SCORE = "score"


class ICLTask(ConfigurableTask):
    """One task. Among its metrics ``score`` is the one that the paper's tables print, which its file lists first."""

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = config["metadata"]
        self.separator: str = metadata.get("separator", SEPARATOR)
        self.name: str = config["task"].removeprefix(PREFIX)
        self.beside: list[str] = metadata.get("beside", [])
        self.words: int = metadata.get("words", 0)
        self.unconditional: str | None = metadata.get("unconditional")
        own = {key: value for key, value in config.items() if key != "class"}
        for key in ("doc_to_text", "description", "fewshot_delimiter"):
            if isinstance(own.get(key), str):
                own[key] = own[key].replace(BREAK, self.separator)
        if "generation_kwargs" in own:
            # Its first character but a space: a backslash, which is a piece of its own, or a real line break.
            stop = self.separator.lstrip(" ")[0]
            given = own["generation_kwargs"]
            own["generation_kwargs"] = {**given, "until": [stop if one == BREAK else one for one in given["until"]]}
        first = own["metric_list"][0]
        own["metric_list"] = [*own["metric_list"], {**first, "metric": SCORE}]
        super().__init__(config=own)
        self.sampler = PerExample(rnd=None)
        self.sampler.task = self.name
        if self.config.fewshot_split == self.config.test_split:
            self.sampler.around = metadata.get("around", 0)
        self.set_fewshot_seed(SEED)
        self._drawn_from: Rows | None = None

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        """The rows of ``metadata["data"]``; without an entry there, the Hub's."""
        metadata = self.config.metadata
        test, shots = self.config.test_split, self.config.fewshot_split
        labels = metadata.get("labels", [])
        fields = dict.fromkeys((shots, test), metadata["fields"])
        fields[test] = fields[test] | metadata.get("test_fields", {})
        sources = metadata.get("data") or {}
        source = sources.get(self.name, sources.get(PREFIX + self.name))
        if source is not None:
            if shots == test and isinstance(source, Mapping) and source.get("train"):
                raise RequestError(f"{self.name} draws its demonstrations from its test rows: leave its train file out")
            files = dict(zip((shots, test), reversed(local_files(self.name, source))))
            self.dataset = Splits(
                {split: partial(read_file, path, fields[split], labels) for split, path in files.items()}
            )
            return
        from datasets import load_dataset

        whole = load_dataset(self.DATASET_PATH, self.DATASET_NAME, **(dataset_kwargs or {}))

        def read(split: str) -> Rows:
            where = f"{self.DATASET_PATH}, {split}"
            columns = fields[split]
            rows = (checked(row, i, columns, labels, f"{where}, row {i + 1}") for i, row in enumerate(whole[split]))
            return Rows(rows, columns)

        self.dataset = Splits({split: partial(read, split) for split in {test, shots}})

    def fewshot_docs(self) -> None:
        """Nothing yet: the rows are read when the first demonstration is drawn."""

    def demonstrations(self, doc: dict[str, Any], count: int) -> Sequence[dict[str, Any]]:
        """The solved examples before ``doc``, in their order."""
        if not count:
            return []
        if self._drawn_from is None:
            rows = self.dataset[self.config.fewshot_split]
            chosen = self.fewshot_cfg.process_docs
            self._drawn_from = chosen(rows) if chosen else rows
        return self.sampler.sample(count, doc, self._drawn_from)

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        **options: Any,
    ) -> str:
        """All that stands before the answer."""
        if system_instruction or apply_chat_template:
            raise RequestError("the paper's prompts have no system instruction and no chat template")
        shots = "".join(
            self.solved(shot) + self.config.fewshot_delimiter for shot in self.demonstrations(doc, num_fewshot)
        )
        return (self.config.description or "") + shots + self.doc_to_text(doc)

    def solved(self, doc: dict[str, Any]) -> str:
        """An example with its answer."""
        answer = self.doc_to_target(doc)
        if self.OUTPUT_TYPE == "multiple_choice":
            assert isinstance(answer, int)
            answer = self.doc_to_choice(doc)[answer]
        elif isinstance(answer, list):
            answer = answer[0]
        assert isinstance(answer, str)
        return joined(self.doc_to_text(doc), answer)

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        template = self.config.doc_to_text
        return template(doc, self.separator) if callable(template) else apply_template(template, doc)

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: Any = None) -> Any:
        """The right candidate's place; of a text to generate what it should be, or a list of what it may be."""
        template = self.config.doc_to_target
        if self.OUTPUT_TYPE != "multiple_choice" and isinstance(template, str):
            return apply_template(template, doc)
        target = super().doc_to_target(doc)
        if self.OUTPUT_TYPE == "multiple_choice" and not 0 <= target < len(self.doc_to_choice(doc)):
            raise RequestError(f"{self.name}, row {doc[INDEX] + 1}: the right candidate, {target}, is none of them")
        return target

    def construct_requests(self, doc: dict[str, Any], ctx: str, **options: Any) -> list[Instance] | Instance:
        """A request a candidate, its span in the continuation; then, of some tasks, those without the question."""
        for name in ("apply_chat_template", "chat_template"):
            options.pop(name, None)
        if self.OUTPUT_TYPE != "multiple_choice":
            return super().construct_requests(doc, ctx, **options)
        choices = self.doc_to_choice(doc)
        beside = self.words + sum(count(doc[field]) for field in self.beside)
        pairs = [split(joined(ctx, choice), count(choice) + beside) for choice in choices]
        if self.unconditional is not None:
            pairs += [split(joined(self.unconditional, choice), count(choice)) for choice in choices]
        return [Instance("loglikelihood", doc, pair, i, **options) for i, pair in enumerate(pairs)]

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """The metrics of one example.

        The file's ``process_results`` is called with the row and: the candidates, the best one's place and the right
        one's; or the text generated and what it should be.
        """
        if self.OUTPUT_TYPE == "multiple_choice":
            choices = self.doc_to_choice(doc)
            values = np.array([value for value, _ in results])
            if self.unconditional is not None:
                values = values[: len(choices)] - values[len(choices) :]
            found = self.config.process_results(doc, choices, int(values.argmax()), self.doc_to_target(doc))
        else:
            found = self.config.process_results(doc, results[0], self.doc_to_target(doc))
        return {**found, SCORE: found[next(iter(self._metric_fn_list))]}


def joined(before: str, answer: str) -> str:
    """A space between the two unless one of them brings it; an answer that is all of the text has none before it."""
    return before + (" " if before and not before[-1].isspace() else "") + answer


def count(text: str) -> int:
    """Words between white space, which is what the released code counts."""
    return len(text.split())


def split(text: str, words: int) -> tuple[str, str]:
    """A text before its last ``words`` words, and those words with the white space before them."""
    rest = text.rstrip()
    for _ in range(min(words, count(text))):
        rest = rest[: len(rest) - len(rest.rsplit(maxsplit=1)[-1])].rstrip()
    return rest, text[len(rest) :]
