"""``MaskedLMScorer`` of minicons (Misra 2022, arXiv 2203.13112) on mlmfast: same methods, same numbers.

minicons itself is not needed. ``docs/minicons.md`` says what differs, and which of its bugs are not copied.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import mlmfast
from mlmfast.errors import RequestError
from mlmfast.execution import read_logprobs, read_rows
from mlmfast.integrations.masked_rows import MaskedRows, read_rows_of
from mlmfast.masking import TokenSequence, masks_of

PLL_METRICS = ("original", "within_word_l2r")
LOAD_OPTIONS = tuple(inspect.signature(mlmfast.load).parameters)[2:]  # all but model and tokenizer

Texts = str | Sequence[str]
Blanks = tuple[str, str] | Sequence[tuple[str, str]]
Reduction = Callable[[Tensor], Any]


def mean(scores: Tensor) -> float:
    """The default reduction of minicons."""
    return scores.mean(0).item()


class MaskedLMScorer:
    """Scores texts with a masked language model, as ``minicons.scorer.MaskedLMScorer`` does.

    Args:
        model: a name, a folder, or a live Hugging Face model, which needs its tokenizer.
        device: ``"cpu"``, ``"cuda:0"`` and so on, or ``"auto"``. A live model is moved there; ``"auto"`` leaves it.
        tokenizer: a tokenizer or the name of one.
        PLL_metric: ``"original"`` or ``"within_word_l2r"``, for every method that is not given its own.
        options: further arguments of :func:`mlmfast.load`; ``torch_dtype`` is ``dtype``.

    Attributes:
        lm: the :class:`mlmfast.MaskedLM` underneath.
        model: its Hugging Face model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        device: str | None = "cpu",
        tokenizer: Any = None,
        PLL_metric: str = "original",
        **options: Any,
    ) -> None:
        self.PLL_metric = _checked(PLL_metric)
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        unknown = [option for option in options if option not in LOAD_OPTIONS]
        if unknown:
            raise RequestError(
                f"MaskedLMScorer passes its options to mlmfast.load(), which has no {unknown[0]!r}; load the model "
                "yourself and pass it with its tokenizer"
            )
        place = device or "auto"
        if isinstance(model, nn.Module):
            if place != "auto":
                model.to(place)
            model.eval()
            self.lm = mlmfast.load(model, tokenizer, **options)
        else:
            self.lm = mlmfast.load(model, tokenizer, **{"semantics": "upstream", "device": place, **options})
        self.device = device
        self.model = self.lm.model
        self.tokenizer = self.lm.tokenizer
        self.cls_token_id = self.bos_token_id = self.tokenizer.cls_token_id
        self.sep_token_id = self.eos_token_id = self.tokenizer.sep_token_id
        self.mask_token_id = self.tokenizer.mask_token_id
        self.pad_token_id = self.tokenizer.pad_token_id

    @cached_property
    def vocab(self) -> dict[str, list[int]]:
        """Ids of each decoded piece."""
        found = defaultdict(list)
        for i in range(self.tokenizer.vocab_size):
            found[self.tokenizer.decode([i]).strip()].append(i)
        return dict(found)

    # ---- text to masked rows

    def add_special_tokens(self, text: Texts) -> list[str]:
        """Texts between the written special tokens."""
        first, last = self.tokenizer.cls_token, self.tokenizer.sep_token
        return [f"{first} {one} {last}" for one in _listed(text)]

    def encode(self, text: Texts, manual_special: bool = True, return_tensors: str | None = "pt") -> BatchEncoding:
        """Token ids, padded to the longest; lists unless the special tokens are added by hand, as in minicons."""
        if manual_special:
            texts = self.add_special_tokens(text)
            return self.tokenizer(
                texts, add_special_tokens=False, padding="longest", return_tensors=return_tensors, verbose=False
            )
        return self.tokenizer(_listed(text), padding="longest", return_attention_mask=True, verbose=False)

    def decode(self, idx: Iterable[int]) -> list[str]:
        """The text of each id."""
        return [self.tokenizer.decode([int(i)]).strip() for i in idx]

    def get_masked_tensors(
        self,
        encoded: BatchEncoding,
        PLL_metric: str | None = None,
        targets_start: Sequence[int] | None = None,
        targets_end: Sequence[int] | None = None,
    ) -> Iterator[MaskedRows]:
        """Each text's rows, one a token from ``targets_start`` to before ``targets_end``, counted in tokens."""
        metric = self._metric(PLL_metric)
        skipped = [i for i in (self.cls_token_id, self.sep_token_id, self.pad_token_id) if i is not None]
        for i, (ids, attention) in enumerate(zip(encoded["input_ids"], encoded["attention_mask"])):
            token_ids = torch.as_tensor(ids).cpu().numpy()
            every = np.arange(len(token_ids))
            scored = ~np.isin(token_ids, skipped)
            if targets_start is not None:
                scored &= every >= targets_start[i]
            if targets_end is not None:
                scored &= every < targets_end[i]
            last = np.flatnonzero(scored)[-1:]
            words = encoded.word_ids(i) if encoded.is_fast else None
            if words is not None:  # pieces of no word are no word together
                words = [-1 - at if word is None else word for at, word in enumerate(words)]
            sequence = TokenSequence(
                token_ids=token_ids,
                # What comes after the scored tokens is never masked with them, not even the rest of a word.
                special=np.isin(token_ids, skipped) | (every > last if len(last) else True),
                scored=scored,
                word_ids=None if words is None else np.array(words),
            )
            masked, _, positions = masks_of(sequence, metric)  # [T, L], a copy a token
            yield MaskedRows(
                torch.from_numpy(np.where(masked, self.mask_token_id, token_ids)),
                torch.as_tensor(attention).cpu().expand(len(positions), -1),
                torch.from_numpy(token_ids[positions]),
                torch.from_numpy(positions),
            )

    def prepare_text(self, text: Texts | BatchEncoding, PLL_metric: str | None = None) -> Iterator[MaskedRows]:
        """What :meth:`compute_stats` takes, of whole texts."""
        if not isinstance(text, BatchEncoding):
            text = _listed(text)
            if not text:
                return iter(())  # which a tokenizer does not take
            text = self.encode(text, manual_special=False)
        return self.get_masked_tensors(text, PLL_metric)

    def prime_text(
        self,
        prefix: Texts,
        stimuli: Texts,
        suffix: Texts | None = None,
        separator: str = " ",
        PLL_metric: str | None = None,
    ) -> Iterator[MaskedRows]:
        """What :meth:`compute_stats` takes, of stimuli in their contexts.

        As in minicons, the stimulus begins after as many tokens as the prefix has alone, and before a suffix ends after
        as many as it has itself alone.
        """
        parts = [_listed(prefix), _listed(stimuli), *([] if suffix is None else [_listed(suffix)])]
        if len({len(part) for part in parts}) != 1:
            raise RequestError(f"{' and '.join(str(len(part)) for part in parts)} parts of texts do not go together")
        if not parts[0]:
            return iter(())
        starts = self._counts(parts[0], {self.sep_token_id, self.pad_token_id})
        ends = None
        if suffix is not None:
            lengths = self._counts(parts[1], {self.cls_token_id, self.sep_token_id, self.pad_token_id})
            ends = [start + length for start, length in zip(starts, lengths)]
        encoded = self.encode([separator.join(pieces) for pieces in zip(*parts)], manual_special=False)
        return self.get_masked_tensors(encoded, PLL_metric, starts, ends)

    def _counts(self, texts: list[str], skipped: set[int]) -> list[int]:
        """How many tokens each text has alone, with its special ones but for some."""
        return [sum(i not in skipped for i in ids) for ids in self.encode(texts, manual_special=False)["input_ids"]]

    # ---- masked rows to scores

    def compute_stats(
        self,
        batch: Iterable[Any],
        rank: bool = False,
        base_two: bool = False,
        prob: bool = False,
        return_tensors: bool = False,
    ) -> Any:
        """Scores of prepared texts, a list or tensor a text, and with ``rank`` also the ranks: ``(scores, ranks)``.

        Args:
            batch: from :meth:`prepare_text` or :meth:`prime_text`, or any such tuples of tensors.
            rank: also the rank of each token, 1 for the likeliest.
            base_two: logarithms to the base two.
            prob: probabilities instead.
            return_tensors: float32 tensors instead of lists.
        """
        if base_two and prob:
            raise RequestError("base_two=True is of a logarithm and prob=True of a probability; choose one")
        scores: list[Any] = []
        ranks: list[list[int]] = []
        for values in read_rows_of(self.lm, batch, read_logprobs(ranks=rank)):
            logprobs = torch.from_numpy(values.get("logprobs", np.zeros(0))).float()
            score = logprobs / math.log(2) if base_two else logprobs.exp() if prob else logprobs
            scores.append(score if return_tensors else score.tolist())
            ranks.append(values["ranks"].tolist() if "ranks" in values else [])
        return (scores, ranks) if rank else scores

    def logprobs(self, batch: Iterable[Any], rank: bool = False) -> list[tuple[Any, ...]]:
        """The old name of :meth:`compute_stats`: for each text its scores, its tokens, and with ``rank`` its ranks."""
        warnings.warn("logprobs is deprecated, use compute_stats instead", DeprecationWarning, stacklevel=2)
        prepared = list(batch)
        found = self.compute_stats(prepared, rank=rank, return_tensors=True)
        scores, ranks = found if rank else (found, [])
        tokens = [self.tokenizer.convert_ids_to_tokens(text[2].tolist()) for text in prepared]
        columns = [scores, tokens, *([[torch.tensor(row) for row in ranks]] if rank else [])]
        return list(zip(*columns))

    def sequence_score(
        self,
        batch: Texts | BatchEncoding,
        reduction: Reduction = mean,
        prob: bool = False,
        base_two: bool = False,
        PLL_metric: str | None = None,
    ) -> list[Any]:
        """One value a text: ``reduction`` of its tokens' scores, their mean unless told otherwise."""
        prepared = self.prepare_text(batch, PLL_metric)
        return [reduction(x) for x in self.compute_stats(prepared, base_two=base_two, prob=prob, return_tensors=True)]

    def token_score(
        self,
        batch: Texts | BatchEncoding,
        surprisal: bool = False,
        prob: bool = False,
        base_two: bool = False,
        rank: bool = False,
        PLL_metric: str | None = None,
    ) -> list[list[tuple[Any, ...]]]:
        """For each text its ``(token, score)``, or with ``rank`` ``(token, score, rank)``."""
        if surprisal and prob:
            raise RequestError("surprisal=True is of a logarithm and prob=True of a probability; choose one")
        targets: list[list[int]] = []

        def prepared() -> Iterator[MaskedRows]:
            for rows in self.prepare_text(batch, PLL_metric):
                targets.append(rows.targets.tolist())
                yield rows

        found = self.compute_stats(prepared(), rank=rank, base_two=base_two, prob=prob)
        scores, ranks = found if rank else (found, None)
        if surprisal:
            scores = [[-score for score in row] for row in scores]
        columns = [[self.decode(ids) for ids in targets], scores, *([ranks] if rank else [])]
        return [list(zip(*rows)) for rows in zip(*columns)]

    def word_score(
        self,
        batch: Texts,
        surprisal: bool = False,
        prob: bool = False,
        base_two: bool = False,
        PLL_metric: str | None = None,
    ) -> list[list[tuple[str, float]]]:
        """For each text its ``(word, score)``: logarithms of a word's tokens added, probabilities multiplied.

        Words are runs of letters, digits and apostrophes; every other character but white space is one of its own.
        """
        texts = _listed(batch)
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            raise RequestError("word_score() needs each token's place in the text: load a fast tokenizer")
        encoded = self.encode(texts, manual_special=False)
        prepared = list(self.get_masked_tensors(encoded, PLL_metric))
        if prob and (surprisal or base_two):
            raise RequestError("prob=True is of a probability; surprisal and base_two are of logarithms: choose one")
        found = self.compute_stats(prepared, base_two=base_two, return_tensors=True)
        results = []
        for i, (text, rows, scores) in enumerate(zip(texts, prepared, found)):
            words = list(re.finditer(r"[\w']+|[^\w\s]", text))
            ends = [word.end() for word in words]
            totals = [0.0] * len(words)
            for position, score in zip(rows.positions.tolist(), scores.tolist() if words else []):
                span = encoded.token_to_chars(i, position)
                assert span is not None  # only of special tokens
                # White space goes with the word after it, and at the end with the last.
                place = bisect_right(ends, span.end - 1)
                totals[min(place, len(words) - 1)] += score
            sign = -1.0 if surprisal else 1.0
            values = [math.exp(total) if prob else sign * total for total in totals]
            results.append([(word.group(), value) for word, value in zip(words, values)])
        return results

    def conditional_score(
        self,
        prefix: Texts,
        stimuli: Texts,
        suffix: Texts | None = None,
        separator: str = " ",
        reduction: Reduction = mean,
        prob: bool = False,
        base_two: bool = False,
        PLL_metric: str | None = None,
    ) -> list[Any]:
        """One value a stimulus: ``reduction`` of its tokens' scores between its prefix and its suffix."""
        primed = self.prime_text(prefix, stimuli, suffix, separator, PLL_metric)
        return [reduction(x) for x in self.compute_stats(primed, base_two=base_two, prob=prob, return_tensors=True)]

    def partial_score(self, preamble: Texts, stimuli: Texts, *args: Any, **kwargs: Any) -> list[Any]:
        """The old name of :meth:`conditional_score`."""
        warnings.warn("partial_score is deprecated, use conditional_score instead", DeprecationWarning, stacklevel=2)
        return self.conditional_score(preamble, stimuli, *args, **kwargs)

    # ---- words in sentences

    def cloze(self, sentence_words: Blanks, PLL_metric: str | None = None, probs: bool = False) -> list[float]:
        """Log-probability, or probability, of each word where it stands in its sentence, its tokens' added."""
        metric = self._metric(PLL_metric)
        pairs = _listed_pairs(sentence_words)
        if not pairs:
            return []
        encoded = self.encode([sentence for sentence, _ in pairs], manual_special=False)
        whole = PLL_metric == "within_word_l2r"  # as in minicons not for the constructor's
        places = [self._find(encoded, i, sentence, word, whole) for i, (sentence, word) in enumerate(pairs)]
        starts, ends = [start for start, _ in places], [end for _, end in places]
        rows = self.get_masked_tensors(encoded, metric, starts, ends)
        totals = [float(score.sum()) for score in self.compute_stats(rows, return_tensors=True)]
        return [math.exp(total) for total in totals] if probs else totals

    def _find(self, encoded: BatchEncoding, i: int, sentence: str, word: str, whole: bool) -> tuple[int, int]:
        """From where to where a word's tokens stand: at first, or at last as a whole word."""
        ids = list(encoded["input_ids"][i])
        words = encoded.word_ids(i) if whole else None
        for spelling in (word, f" {word}"):  # a byte-level tokenizer spells a word otherwise after a space
            wanted = self.tokenizer(spelling, add_special_tokens=False, verbose=False)["input_ids"]
            n = len(wanted)
            places = [at for at in range(len(ids) - n) if n and ids[at : at + n] == wanted]
            if words is not None:
                edges = {0, *(at for at in range(1, len(words)) if words[at] != words[at - 1])}
                places = [at for at in places[::-1] if {at, at + n} <= edges and len(set(words[at : at + n])) == 1]
            if places:
                return places[0], places[0] + n
        raise RequestError(
            f"sentence {i}, {sentence!r}, does not hold {word!r} as tokens of its own"
            + ("; within_word_l2r wants one whole word" if words is not None else "")
        )

    def cloze_distribution(self, queries: Blanks) -> Tensor:
        """Log-probabilities ``[n, V]`` of what could stand in the place of each query's word, a blank."""
        pairs = _listed_pairs(queries)
        if not pairs:
            return torch.tensor([])
        rows = []
        for i, (sentence, word) in enumerate(pairs):
            pieces = re.split(rf"(?<!\w){re.escape(word)}(?!\w)", sentence)
            ids = self.tokenizer(self.tokenizer.mask_token.join(pieces), verbose=False)["input_ids"]
            if len(pieces) != 2 or ids.count(self.mask_token_id) != 1:
                raise RequestError(f"query {i}, {sentence!r}, does not hold {word!r} once")
            at = ids.index(self.mask_token_id)
            rows.append(MaskedRows(*(torch.tensor(x) for x in ([ids], [[1] * len(ids)], [ids[at]], [at]))))
        return self.distribution(rows)

    def distribution(self, batch: Iterable[Any]) -> Tensor:
        """Log-probabilities ``[N, V]`` at every row of prepared texts, which are held together."""
        found = [values["logprobs"] for values in read_rows_of(self.lm, batch, read_rows()) if values]
        return torch.from_numpy(np.concatenate([np.zeros((0, self.lm.vocab_size), np.float32), *found]))

    def entropy(
        self, sentence_words: Blanks, space: list[list[str]] | list[str] | None = None, base_two: bool = False
    ) -> Tensor:
        """Entropy ``[n]`` of :meth:`cloze_distribution`, or among the words of ``space[n]`` only.

        Of a single query ``space`` may be a list of words.
        """
        found = list(self.cloze_distribution(sentence_words))
        if space is not None:
            if space and isinstance(space[0], str):
                space = [[str(word) for word in space]]
            if len(space) != len(found):
                raise RequestError(f"space has words for {len(space)} queries, and there are {len(found)}")
            found = [row[[self._likeliest(row, word) for word in words]] for row, words in zip(found, space)]
        logprobs = [row.log_softmax(0) for row in found]  # of a part of the vocabulary: they sum to one again
        bits = [-(row.exp() * row).sum() / (math.log(2) if base_two else 1.0) for row in logprobs]
        return torch.stack(bits) if bits else torch.tensor([])

    def _likeliest(self, logprobs: Tensor, word: str) -> int:
        """Of the ids that decode to a word, the one it is likeliest with."""
        if word not in self.vocab:
            raise RequestError(f"{word!r} is no token of {self.lm.name}; an entropy among words needs single tokens")
        return max(self.vocab[word], key=lambda i: float(logprobs[i]))

    def _metric(self, PLL_metric: str | None) -> str:
        return self.PLL_metric if PLL_metric is None else _checked(PLL_metric)


def _checked(PLL_metric: str) -> str:
    if PLL_metric not in PLL_METRICS:
        raise RequestError(
            f"PLL_metric={PLL_metric!r} is not known to minicons; choose one of {', '.join(PLL_METRICS)}, or call "
            "scorer.lm.score(), which knows more"
        )
    return PLL_metric


def _listed(text: Texts) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def _listed_pairs(pairs: Blanks) -> list[tuple[str, str]]:
    """``(sentence, word)`` pairs, or a single one."""
    listed: list[Any] = list(pairs)
    return [(listed[0], listed[1])] if listed and isinstance(listed[0], str) else listed
