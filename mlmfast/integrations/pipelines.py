"""transformers' pipeline "pseudo-log-likelihood": texts in, a dict each out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from transformers import Pipeline

import mlmfast
from mlmfast.errors import RequestError, TextError
from mlmfast.results import Score, generic_mark

TASK = "pseudo-log-likelihood"
# What may be asked for, of MaskedLM.score.
OPTIONS = ("metric", "window", "stride", "temperature", "ranks", "entropies", "truncation", "on_error")
# Texts of a stream that are scored together, unless batch_size says otherwise.
TOGETHER = 256


class PseudoLogLikelihoodPipeline(Pipeline):
    """Scores texts with a masked language model, all masked copies of all texts packed together.

    ``pipeline("pseudo-log-likelihood", model=..., tokenizer=...)``, after
    :func:`mlmfast.integrations.transformers.register`. Options of :meth:`mlmfast.MaskedLM.score`, :data:`OPTIONS`, are
    taken when it is made and at each call.

    Raises:
        RequestError: an option that is not known.
        UnsupportedModelError, CheckpointError: as :func:`mlmfast.load` of a live model.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lm = mlmfast.load(self.model, self.tokenizer)

    def __call__(
        self, inputs: Any, *args: Any, num_workers: int | None = None, batch_size: int | None = None, **options: Any
    ) -> Any:
        """Scores.

        Args:
            inputs: a text, a list of texts, or any other iterable of texts, a dataset's column say.
            num_workers: as every pipeline takes it; texts are not loaded by workers here.
            batch_size: texts of an iterable that are scored together; a list's always are.
            options: as above.

        Returns:
            For a text a dict: ``text``, ``score`` (the PLL in nats), ``perplexity``, ``tokens``, ``logprobs``, on
            request ``ranks`` and ``entropies``; with ``on_error="return"`` it is ``text`` and ``error`` where a text
            cannot be scored. For a list a list of them, for an iterable an iterator.
        """
        options = {**self._forward_params, **self._sanitize_parameters(**options)[1]}
        if isinstance(inputs, str):
            return self._dicts([inputs], options)[0]
        if isinstance(inputs, (list, tuple)):
            return self._dicts(list(inputs), options)
        if isinstance(inputs, Mapping) or not isinstance(inputs, Iterable):
            raise RequestError(f"{TASK} takes a text, or texts, not a {type(inputs).__name__}")
        return self._stream(inputs, batch_size or self._batch_size or TOGETHER, options)

    def _stream(self, texts: Iterable[str], together: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        rest = iter(texts)
        while window := list(islice(rest, together)):
            yield from self._dicts(window, options)

    def _dicts(self, texts: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
        scores = self._forward(self.preprocess(texts), **options)
        return [self.postprocess((text, score)) for text, score in zip(texts, scores)]

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise RequestError(f"{TASK} has no option {', '.join(unknown)}; it takes {', '.join(OPTIONS)}")
        return {}, options, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> Any:
        """Texts as they are: MaskedLM tokenises them itself."""
        return input_

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        return self._lm.score(input_tensors, **forward_parameters)

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> dict[str, Any]:
        """A text and its score -> what is returned."""
        text, score = model_outputs
        if isinstance(score, TextError):
            return {"text": text, "error": score.reason}
        assert isinstance(score, Score)
        found: dict[str, Any] = {
            "text": text,
            "score": score.total,
            "perplexity": score.perplexity,
            "tokens": score.tokens,
            "logprobs": score.logprobs.tolist(),
        }
        for name, values in (("ranks", score.ranks), ("entropies", score.entropies)):
            if values is not None:
                found[name] = values.tolist()
        return found | generic_mark(score)
