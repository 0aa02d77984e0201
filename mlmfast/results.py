"""What scoring returns: plain, typed records that print well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def _excerpt(text: str, width: int = 48) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def _mark(generic: bool) -> str:
    """What a repr says of a result that a generic model gave."""
    return ", generic" if generic else ""


def generic_mark(result: Score | Ranking | Generation) -> dict[str, bool]:
    """What a JSON object says of a result that a generic model gave; of others nothing."""
    return {"generic": True} if result.generic else {}


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, the first one left-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Score:
    """The pseudo-log-likelihood of one text, token by token.

    Attributes:
        text: the text as given (prefix and continuation joined, for a continuation).
        tokens: the scored pieces, in text order; special tokens are never among them.
        token_ids: int64 ``[n]``.
        offsets: ``(start, end)`` of each scored token in ``text``, in characters; None where the tokenizer
            keeps none.
        logprobs: float32 ``[n]`` (float64 from a float64 model), natural logarithm of each token's probability where
            it stood masked.
        metric: which positions were masked together with the scored one (see :mod:`mlmfast.masking`).
        ranks: int64 ``[n]``, 1 for the model's first choice; None unless asked for.
        entropies: float32 ``[n]``, entropy in nats of the distribution at each token; None unless asked for.
        truncated: how many tokens were cut from the text to fit the model (0: none).
        generic: the model's own code computed it (:mod:`mlmfast.generic`), not mlmfast's kernels.
    """

    text: str
    tokens: list[str]
    token_ids: np.ndarray
    offsets: list[tuple[int, int]] | None
    logprobs: np.ndarray
    metric: str = "original"
    ranks: np.ndarray | None = None
    entropies: np.ndarray | None = None
    truncated: int = 0
    generic: bool = False

    @property
    def total(self) -> float:
        """The PLL in nats: the sum of ``logprobs``, added in float64."""
        return float(np.sum(self.logprobs, dtype=np.float64))

    @property
    def mean(self) -> float:
        """PLL a token in nats."""
        return self.total / len(self.tokens)

    @property
    def perplexity(self) -> float:
        """Pseudo-perplexity, ``exp(-mean)``; infinite where that overflows."""
        try:
            return math.exp(-self.mean)
        except OverflowError:
            return math.inf

    @property
    def surprisals(self) -> np.ndarray:
        """float32 ``[n]``, ``-logprobs`` in nats."""
        return -self.logprobs

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return (
            f"Score({_excerpt(self.text)}, total={self.total:.4f}, tokens={len(self)}, "
            f"perplexity={self.perplexity:.4g}, metric={self.metric!r}{_mark(self.generic)})"
        )

    def __str__(self) -> str:
        header = ["token", "logprob"]
        columns = [self.tokens, [f"{x:.4f}" for x in self.logprobs]]
        if self.ranks is not None:
            header.append("rank")
            columns.append([str(r) for r in self.ranks])
        if self.entropies is not None:
            header.append("entropy")
            columns.append([f"{x:.4f}" for x in self.entropies])
        table = _columns(header, list(zip(*columns)))
        return f"{table}\ntotal {self.total:.4f} nats, perplexity {self.perplexity:.4g} ({self.metric})"


@dataclass(frozen=True, eq=False)
class Ranking:
    """Options after a prompt, with the value each was ranked by.

    Attributes:
        prompt: the prompt as given.
        options: the options in the order given.
        scores: the :class:`Score` of each option's tokens after the prompt, same order.
        values: float64 ``[len(options)]``, what the ranking compares: the total PLL in nats, divided by the
            number of tokens or lowered by the unconditional PLL where ``normalize`` asks for it.
        normalize: None, ``"tokens"`` or ``"unconditional"``.
        cache: ``"none"``: exact; ``"prefix"``: approximate.
        generic: the model's own code computed it (:mod:`mlmfast.generic`), not mlmfast's kernels.
    """

    prompt: str
    options: list[str]
    scores: list[Score]
    values: np.ndarray
    normalize: str | None = None
    cache: str = "none"
    generic: bool = False

    @property
    def order(self) -> list[int]:
        """Indices of the options, best first; ties keep the order given."""
        return [int(i) for i in np.argsort(-self.values, kind="stable")]

    @property
    def best(self) -> str:
        """The option with the highest value."""
        return self.options[self.order[0]]

    @property
    def probabilities(self) -> np.ndarray:
        """float64 ``[len(options)]``, softmax of ``values``: the share of each among these options only."""
        weights = np.exp(self.values - self.values.max())
        return weights / weights.sum()

    def __len__(self) -> int:
        return len(self.options)

    def __repr__(self) -> str:
        approximate = "" if self.cache == "none" else f", cache={self.cache!r} (approximate)"
        mark = _mark(self.generic)
        return f"Ranking({_excerpt(self.prompt)}, best={self.best!r}, options={len(self)}{approximate}{mark})"

    def __str__(self) -> str:
        shares = self.probabilities
        rows = [
            [repr(self.options[i]), f"{self.values[i]:.4f}", f"{shares[i]:.1%}", str(len(self.scores[i]))]
            for i in self.order
        ]
        return _columns(["option", "value", "share", "tokens"], rows)


@dataclass(frozen=True, eq=False)
class Distribution:
    """What the model expects at each scored token of one text.

    Attributes:
        text: the text as given.
        tokens: the tokens that stand there, ``n`` of them.
        token_ids: int64 ``[n]``.
        candidate_ids: int64 ``[n, k]``, most probable first; None for a whole distribution.
        candidates: the same as pieces, ``n`` lists of ``k``; None for a whole distribution.
        logprobs: float32 ``[n, k]``; ``[n, vocabulary]`` by token id for a whole distribution.
        generic: the model's own code computed it (:mod:`mlmfast.generic`), not mlmfast's kernels.
    """

    text: str
    tokens: list[str]
    token_ids: np.ndarray
    candidate_ids: np.ndarray | None
    candidates: list[list[str]] | None
    logprobs: np.ndarray
    generic: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        width = self.logprobs.shape[1]
        return f"Distribution({_excerpt(self.text)}, tokens={len(self)}, width={width}{_mark(self.generic)})"

    def __str__(self) -> str:
        if self.candidates is None:
            return repr(self)
        rows = [
            [token, *(f"{c} {math.exp(p):.1%}" for c, p in zip(names, values))]
            for token, names, values in zip(self.tokens, self.candidates, self.logprobs)
        ]
        return _columns(["token", *(str(i + 1) for i in range(self.logprobs.shape[1]))], rows)


@dataclass(frozen=True, eq=False)
class Fill:
    """The model's candidates for one mask that stands in a text.

    Attributes:
        text: the text as given.
        position: place of the mask in the token sequence, special tokens counted.
        token_ids: int64 ``[k]``, most probable first.
        tokens: the same as pieces.
        words: the same decoded, as a reader would write them.
        logprobs: float32 ``[k]`` in nats.
        generic: the model's own code computed it (:mod:`mlmfast.generic`), not mlmfast's kernels.
    """

    text: str
    position: int
    token_ids: np.ndarray
    tokens: list[str]
    words: list[str]
    logprobs: np.ndarray
    generic: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Fill({_excerpt(self.text)}, position={self.position}, best={self.words[0]!r}{_mark(self.generic)})"

    def __str__(self) -> str:
        rows = [[word, f"{p:.4f}", f"{math.exp(p):.1%}"] for word, p in zip(self.words, self.logprobs)]
        return _columns(["candidate", "logprob", "share"], rows)


@dataclass(frozen=True, eq=False)
class Generation:
    """A prompt's continuation.

    Attributes:
        prompt: as given.
        text: what was generated, as it follows the prompt; special tokens are left out.
        tokens: the generated pieces, a stop token among them.
        token_ids: int64 ``[n]``.
        logprobs: float32 ``[n]``, natural logarithm of each token's probability under the model, whatever was done to
            the probabilities to choose it.
        stopped: ``"token"`` (a stop token), ``"criterion"`` (a stop string, a time limit, or a criterion of yours),
            ``"length"`` (``max_new_tokens``), ``"room"`` (the model holds no more), ``"interrupted"`` (Ctrl-C).
        passes: passes through the model that this took; drafts make them fewer than the tokens.
        score: what beams were compared by, the total over the length to the power of ``length_penalty``; else None.
        cache: ``"none"``: exact; ``"window"``: approximate.
        generic: the model's own code computed it (:mod:`mlmfast.generic`), not mlmfast's kernels.
    """

    prompt: str
    text: str
    tokens: list[str]
    token_ids: np.ndarray
    logprobs: np.ndarray
    stopped: str
    passes: int
    score: float | None = None
    cache: str = "none"
    generic: bool = False

    @property
    def total(self) -> float:
        """Sum of ``logprobs`` in nats, added in float64."""
        return float(np.sum(self.logprobs, dtype=np.float64))

    @property
    def tokens_per_pass(self) -> float:
        """1 without drafts and beams."""
        return len(self.tokens) / max(1, self.passes)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        approximate = "" if self.cache == "none" else f", cache={self.cache!r} (approximate)"
        return (
            f"Generation({_excerpt(self.prompt)} -> {_excerpt(self.text)}, tokens={len(self)}, "
            f"stopped={self.stopped!r}, total={self.total:.4f}{approximate}{_mark(self.generic)})"
        )

    def __str__(self) -> str:
        return self.prompt + self.text
