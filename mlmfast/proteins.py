"""Protein and DNA models with a token a residue: marginals, pseudo-perplexity and the effects of mutations.

Conventions are those of esm's ``predict.py`` (Meier et al. 2021, bioRxiv 2021.07.09.450648) and of ProteinGym (Notin
et al. 2023). A sequence longer than its window is read as ProteinGym reads it: a masked residue in the window around
it, an unmasked pass in windows that overlap, with weights that fall off towards their ends (Brandes et al. 2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mlmfast.arguments import check_on_error, listed
from mlmfast.errors import RequestError, TextError
from mlmfast.model import MaskedLM
from mlmfast.protein_windows import Part, Residues, parts_of
from mlmfast.results import Score
from mlmfast.tokenization import EncodedText, TextEncoder

# Of mlmfast.masking: a residue is masked alone, or none is.
METRICS = ("original", "unmasked")
STRATEGIES = ("masked-marginals", "wt-marginals", "pseudo-ppl")
SUBSTITUTION = re.compile(r"([A-Za-z])(-?[0-9]{1,15})([A-Za-z])")
# Windows of mutants that are planned together; each residue of a long sequence has its own.
PARTS = 1 << 16


class MutantError(TextError):
    """One mutant of a request cannot be scored; the others can.

    Attributes:
        index: place of the mutant in the request, counted from 0.
        reason: the message without the place.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.args = (f"mutant {index} {reason}",)


def masked_marginals(
    lm: MaskedLM,
    sequences: Sequence[str],
    *,
    metric: str = "original",
    window: int | None = None,
    on_error: str = "raise",
) -> list[Any]:
    """What the model predicts at each residue.

    Args:
        lm: a model whose tokenizer has a token a residue, such as ESM-2.
        sequences: a letter a residue.
        metric: ``"original"``, each residue masked alone: masked marginals; ``"unmasked"``, one pass that masks
            nothing: wild-type marginals.
        window: most tokens read at once, special ones included; None for as many as the model holds. ProteinGym's is
            1024.
        on_error: ``"raise"``, or ``"return"`` to have a :class:`TextError` stand in the place of a sequence that the
            model has no token a residue for.

    Returns:
        Log-probabilities over the vocabulary in nats, float32 ``[L, V]`` a sequence. A residue's column is its token
        id, ``lm.tokenizer.convert_tokens_to_ids("A")``.

    Raises:
        RequestError: an unknown metric, or a window that is too small or larger than the model holds.
        TextError: a sequence cannot be read, and ``on_error="raise"``.
    """

    def compute(read: list[Residues]) -> list[np.ndarray]:
        tables = Tables(lm, read)
        _run(lm, read, [one.positions for one in read], metric, window, tables.add)
        return [table[one.positions] for table, one in zip(tables.finished(), read)]

    return _each(lm, sequences, on_error, compute)


def score(lm: MaskedLM, sequences: Sequence[str], *, window: int | None = None, on_error: str = "raise") -> list[Any]:
    """Pseudo-log-likelihoods, a residue masked at a time: a :class:`Score` a sequence.

    Arguments and errors are those of :func:`masked_marginals`.
    """

    def compute(read: list[Residues]) -> list[Score]:
        logprobs = [np.empty(len(one.sequence), np.float32) for one in read]

        def add(owner: int, position: int, row: np.ndarray, weight: float) -> None:
            logprobs[owner][position] = row[read[owner].sequence.token_ids[position]]

        _run(lm, read, [one.positions for one in read], "original", window, add)
        return [
            Score(one.text, list(one.text), one.token_ids, None, found[one.positions], generic=lm.generic)
            for one, found in zip(read, logprobs)
        ]

    return _each(lm, sequences, on_error, compute)


def pseudo_perplexity(lm: MaskedLM, sequences: Sequence[str], *, window: int | None = None) -> list[float]:
    """``exp`` of the negative mean log-probability of a sequence's residues, each masked alone.

    Arguments and errors are those of :func:`masked_marginals`.
    """
    return [one.perplexity for one in score(lm, sequences, window=window)]


def mutation_effects(
    lm: MaskedLM,
    sequence: str,
    mutants: Sequence[str],
    *,
    strategy: str = "masked-marginals",
    offset: int = 1,
    window: int | None = None,
    on_error: str = "raise",
) -> list[Any]:
    """The effect of substitutions in a wild type; above 0 (but for ``pseudo-ppl``) the model prefers the mutant.

    Args:
        lm, window: as in :func:`masked_marginals`.
        sequence: the wild type.
        mutants: ``"A42G"``, alanine 42 becomes glycine; several substitutions as ``"A42G:L50P"``.
        strategy: ``"masked-marginals"``, log-probability of the mutant's residue less that of the wild type's where it
            stands masked, the rest of the wild type in place, summed over the substitutions; ``"wt-marginals"``, the
            same from one pass that masks nothing; ``"pseudo-ppl"``, the mutant's pseudo-log-likelihood.
        offset: number of the sequence's first residue.
        on_error: ``"raise"``, or ``"return"`` to have a :class:`MutantError` stand in the place of a mutant that
            cannot be scored.

    Returns:
        A float a mutant, in nats.

    Raises:
        RequestError: an unknown strategy, or a window as in :func:`masked_marginals`.
        TextError: the wild type cannot be read.
        MutantError: a mutant is malformed or does not fit the wild type.
    """
    return Effects(lm, sequence, strategy=strategy, offset=offset, window=window)(mutants, on_error)


class Effects:
    """Scores mutants of one wild type: arguments as in :func:`mutation_effects`.

    What the model predicts in the wild type is computed once and kept; after its weights have changed make another.
    """

    def __init__(
        self,
        lm: MaskedLM,
        sequence: str,
        *,
        strategy: str = "masked-marginals",
        offset: int = 1,
        window: int | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise RequestError(f"strategy {strategy!r} is not known; choose one of {', '.join(STRATEGIES)}")
        if isinstance(offset, bool) or not isinstance(offset, (int, np.integer)):
            raise RequestError(f"offset={offset!r} is not the number of the first residue")
        _window(lm, window)
        self._lm, self._strategy, self._offset, self._limit = lm, strategy, offset, window
        (wild,) = residues(lm, [sequence])
        if isinstance(wild, TextError):
            raise wild
        self._wild = wild
        self._metric = "unmasked" if strategy == "wt-marginals" else "original"
        self._known = np.zeros(len(sequence), bool)
        self._rows = np.empty((0, 0), np.float32)  # [L, V] as soon as V is known

    def __call__(self, mutants: Sequence[str], on_error: str = "raise") -> list[Any]:
        """A float or, with ``on_error="return"``, a :class:`MutantError` a mutant."""
        check_on_error(on_error)
        found: list[Any] = []
        mutants = listed(mutants, "mutants")
        for i, mutant in enumerate(mutants):
            changes = substitutions(mutant, self._wild.text, self._offset)
            found.append(MutantError(i, f"({mutant}): {changes}") if isinstance(changes, str) else changes)
        letters = residue_ids(self._lm, (to for one in found if isinstance(one, dict) for to in one.values()))
        for i, changes in enumerate(found):
            strange = [to for to in changes.values() if to not in letters] if isinstance(changes, dict) else []
            if strange:
                found[i] = MutantError(i, f"({mutants[i]}): {self._lm.name} has no token for residue {strange[0]}")
        good = [i for i, changes in enumerate(found) if isinstance(changes, dict)]
        if on_error == "raise" and len(good) < len(found):
            raise next(one for one in found if isinstance(one, MutantError))
        compute = self._likelihoods if self._strategy == "pseudo-ppl" else partial(self._marginals, letters)
        for i, value in zip(good, compute([found[i] for i in good])):
            found[i] = value
        return found

    def _marginals(self, letters: dict[str, int], good: Sequence[dict[int, str]]) -> list[float]:
        wanted = np.unique([place for changes in good for place in changes]).astype(np.int64)
        new = wanted[~self._known[wanted]]
        if self._metric == "unmasked" and len(new):  # one pass gives them all
            new = np.arange(len(self._known))
        if len(new):
            tables = Tables(self._lm, [self._wild])
            places = self._wild.positions[new]
            _run(self._lm, [self._wild], [places], self._metric, self._limit, tables.add)
            rows = tables.finished()[0][places]
            if not self._known.any():
                self._rows = np.empty((len(self._known), rows.shape[1]), np.float32)
            self._rows[new] = rows
            self._known[new] = True
        ids = self._wild.token_ids
        return [
            sum(float(self._rows[at][letters[to]]) - float(self._rows[at][ids[at]]) for at, to in changes.items())
            for changes in good
        ]

    def _likelihoods(self, good: Sequence[dict[int, str]]) -> list[float]:
        texts = []
        for changes in good:
            letters = list(self._wild.text)
            for at, to in changes.items():
                letters[at] = to
            texts.append("".join(letters))
        each = max(1, PARTS // len(self._wild.text))
        groups = [texts[start : start + each] for start in range(0, len(texts), each)]
        return [one.total for group in groups for one in score(self._lm, group, window=self._limit)]


def substitutions(mutant: str, sequence: str, offset: int = 1) -> dict[int, str] | str:
    """The places, counted from 0, and new residues of a mutant, or why it is none of this sequence."""
    changes: dict[int, str] = {}
    for part in mutant.split(":") if isinstance(mutant, str) else [""]:
        read = SUBSTITUTION.fullmatch(part.strip())
        if read is None:
            return f"{part!r} is not a substitution such as A42G, several of them joined by colons"
        wild, place, to = read[1], int(read[2]) - offset, read[3]
        if not 0 <= place < len(sequence):
            last = offset + len(sequence) - 1
            return f"there is no residue {read[2]}, the sequence has {offset} to {last}; is offset right?"
        if sequence[place] != wild:
            return f"residue {read[2]} is {sequence[place]}, not {wild}; is offset={offset} right?"
        if place in changes:
            return f"residue {read[2]} is replaced twice"
        changes[place] = to
    return changes


def _each(
    lm: MaskedLM, sequences: Sequence[str], on_error: str, compute: Callable[[list[Residues]], list[Any]]
) -> list[Any]:
    """What ``compute`` gives of the sequences that can be read, errors in the place of the others."""
    check_on_error(on_error)
    results: list[Any] = list(residues(lm, sequences))
    good = [i for i, one in enumerate(results) if isinstance(one, Residues)]
    if on_error == "raise" and len(good) < len(results):
        raise next(one for one in results if isinstance(one, TextError))
    try:
        found = compute([results[i] for i in good])
    except TextError as error:  # of the good ones
        raise TextError(good[error.index], error.reason) from error
    for i, value in zip(good, found):
        results[i] = value
    return results


def residues(lm: MaskedLM, sequences: Sequence[str]) -> list[Residues | TextError]:
    """Sequences as tokens, one a residue, however long; an error for one that the tokenizer reads otherwise."""
    texts = listed(sequences, "sequences")
    encoder = TextEncoder(lm.tokenizer, lm.name, None, lm.vocab_size)
    judged = [_judged(lm, text, encoded) for text, encoded in zip(texts, encoder.encode(texts))]
    return [TextError(i, one) if isinstance(one, str) else one for i, one in enumerate(judged)]


def residue_ids(lm: MaskedLM, letters: Iterable[str]) -> dict[str, int]:
    """The token ids of some residues, of those that the model has a token for."""
    names = sorted(set(letters))
    encoder = TextEncoder(lm.tokenizer, lm.name, None, lm.vocab_size)
    found = [_judged(lm, name, one) for name, one in zip(names, encoder.encode(names))]
    return {name: int(one.token_ids[0]) for name, one in zip(names, found) if isinstance(one, Residues)}


def _judged(lm: MaskedLM, text: str, encoded: EncodedText | TextError) -> Residues | str:
    """The residues of an encoding, or what is wrong with it."""
    if isinstance(encoded, TextError):
        return encoded.reason
    positions = np.flatnonzero(encoded.sequence.scored)
    pieces = lm.tokenizer.convert_ids_to_tokens(encoded.sequence.token_ids[positions].tolist())
    same = [letter.upper() == piece.upper() for letter, piece in zip(text, pieces)]
    if len(pieces) == len(text) and all(same):
        return Residues(text, encoded.sequence, positions)
    if False not in same and text != text.strip():
        return "has white space around its letters: take it out"
    place = same.index(False) if False in same else min(len(text), len(pieces)) - 1
    return (
        f"has {len(text)} letters that {lm.name} reads as {len(pieces)} tokens, from letter {place + 1} on "
        f"({text[place]!r} as {pieces[place]!r}): take out what is no residue, or use a model that has a token "
        "a residue (with k-mers no residue can be masked alone)"
    )


class Tables:
    """Log-probabilities at tokens of some sequences, weighted means where windows overlap."""

    def __init__(self, lm: MaskedLM, sequences: Sequence[Residues]) -> None:
        width = lm.spec().head.vocab_size
        self._sums = [np.zeros((len(one.sequence), width)) for one in sequences]
        self._weights = [np.zeros((len(one.sequence), 1)) for one in sequences]

    def add(self, owner: int, position: int, row: np.ndarray, weight: float) -> None:
        """Takes a row ``[V]`` at a sequence's token."""
        self._sums[owner][position] += weight * row
        self._weights[owner][position] += weight

    def finished(self) -> list[np.ndarray]:
        """float32 ``[L, V]`` a sequence, special tokens included; NaN where nothing came."""
        with np.errstate(invalid="ignore"):
            return [(sums / weights).astype(np.float32) for sums, weights in zip(self._sums, self._weights)]


def _run(
    lm: MaskedLM,
    sequences: Sequence[Residues],
    wanted: Sequence[np.ndarray],
    metric: str,
    window: int | None,
    add: Callable[[int, int, np.ndarray, float], None],
) -> None:
    """Computes rows at some tokens of each sequence and gives them to ``add``: owner, token, row ``[V]``, weight."""
    if metric not in METRICS:
        raise RequestError(f"metric {metric!r} does not apply to residues; choose one of {', '.join(METRICS)}")
    limit = _window(lm, window)
    parts: list[Part] = []
    for owner, (one, positions) in enumerate(zip(sequences, wanted)):
        parts += parts_of(one, owner, positions, metric, limit)

    def take(owners: np.ndarray, positions: np.ndarray, logprobs: Tensor) -> None:
        for place, position, row in zip(owners.tolist(), positions.tolist(), logprobs.cpu().numpy()):
            part = parts[place]
            add(part.owner, part.start + position, row, part.weights[position])

    try:
        lm.visit([part.sequence for part in parts], take, metric=metric)
    except TextError as error:  # of a window
        raise TextError(parts[error.index].owner, error.reason) from error


def _window(lm: MaskedLM, window: int | None) -> int | None:
    """Most tokens that are read at once; None for any number."""
    holds = lm.max_length
    if window is None:
        return holds
    if not isinstance(window, (int, np.integer)) or window < 8:
        raise RequestError(
            f"window={window!r} is too small to read a residue in its surroundings; 8 tokens are the least"
        )
    if holds is not None and window > holds:
        raise RequestError(f"window={window} is more than the {holds} tokens that {lm.name} holds")
    return int(window)
