"""torchmetrics' InfoLM: the same arguments and numbers from one packed pass over masked copies.

InfoLM (Colombo, Clavel & Piantanida 2022, arXiv 2112.01589) compares two texts by their distributions over the
vocabulary: the mean of what a masked language model predicts at each token, masked alone, weighted by inverse document
frequency if asked for. torchmetrics makes a pass a position and holds ``[batch, length, vocabulary]``; here rows are
added up while they pass. The information measures are torchmetrics' own code.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import mlmfast
from mlmfast.errors import RequestError
from mlmfast.masking import TokenSequence
from mlmfast.model import MaskedLM

try:
    import torchmetrics.text.infolm as upstream
    from torchmetrics import Metric
    from torchmetrics.functional.text.infolm import _InformationMeasure
    from torchmetrics.utilities.data import dim_zero_cat
except ImportError as error:
    raise ImportError(
        'mlmfast.integrations.torchmetrics needs torchmetrics: pip install "mlmfast[torchmetrics]"'
    ) from error

# Numbers of the distributions that are held at once, float64: texts are compared a group of pairs at a time.
HELD = 1 << 24

Model = str | os.PathLike[str] | MaskedLM | Any


def infolm(
    preds: str | Sequence[str],
    target: str | Sequence[str],
    model_name_or_path: Model = "bert-base-uncased",
    temperature: float = 0.25,
    information_measure: str = "kl_divergence",
    idf: bool = True,
    alpha: float | None = None,
    beta: float | None = None,
    device: str | torch.device | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    num_threads: int = 0,
    verbose: bool = True,
    return_sentence_level_score: bool = False,
    *,
    tokenizer: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoLM of predicted texts and their references, as ``torchmetrics.functional.text.infolm`` computes it.

    Args:
        preds, target: as many texts as references; a single one may be a string.
        model_name_or_path: a name or a folder; also a :class:`MaskedLM`, or a live Hugging Face model beside its
            ``tokenizer``.
        temperature: divides the logits.
        information_measure, alpha, beta: as torchmetrics documents them.
        idf: weights tokens by their inverse document frequency, among ``preds`` and among ``target``.
        device: where a model is loaded to; None for the CPU, as in torchmetrics. A MaskedLM or live model stays where
            it is.
        max_length: tokens that a text is cut to, special ones included. None: what the model holds.
        batch_size, num_threads: without effect; :attr:`MaskedLM.batch_tokens` bounds what is computed at once.
        verbose: a bar on stderr.
        return_sentence_level_score: also the scores of the single texts, in the order given.

    Returns:
        The mean, a float32 scalar, and on request the scores float32 ``[n]``.

    Raises:
        RequestError: no texts, or not as many of one as of the other, or one too long for the model.
        ValueError: a measure that torchmetrics does not know, or one without its ``alpha`` or ``beta``.
    """
    measure = _InformationMeasure(cast(Any, information_measure), alpha, beta)
    lm = _loaded(model_name_or_path, tokenizer, device)
    longest = lm.max_length if max_length is None else max_length
    ids = [_tokenised(lm, texts, longest, what) for texts, what in ((preds, "preds"), (target, "target"))]
    scores = _scores(lm, ids[0], ids[1], measure, temperature, idf, verbose)
    return (scores.mean(), scores) if return_sentence_level_score else scores.mean()


class InfoLM(upstream.InfoLM):
    """``torchmetrics.text.infolm.InfoLM`` with mlmfast's passes; arguments as in :func:`infolm`.

    Its states are token ids end to end and the texts' lengths, so that nothing is padded.
    """

    preds_lengths: list[Tensor]
    target_lengths: list[Tensor]

    def __init__(
        self,
        model_name_or_path: Model = "bert-base-uncased",
        temperature: float = 0.25,
        information_measure: str = "kl_divergence",
        idf: bool = True,
        alpha: float | None = None,
        beta: float | None = None,
        device: str | torch.device | None = None,
        max_length: int | None = None,
        batch_size: int = 64,
        num_threads: int = 0,
        verbose: bool = True,
        return_sentence_level_score: bool = False,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        Metric.__init__(self, **kwargs)  # torchmetrics' own __init__ would load the model once more
        self.model_name_or_path = cast(Any, model_name_or_path)
        self.temperature = temperature
        self.information_measure = cast(Any, information_measure)
        self.idf = idf
        self.alpha = alpha
        self.beta = beta
        self.batch_size = batch_size
        self.num_threads = num_threads
        self.verbose = verbose
        self.return_sentence_level_score = return_sentence_level_score
        self.information_measure_cls = _InformationMeasure(cast(Any, information_measure), alpha, beta)
        self.lm = _loaded(model_name_or_path, tokenizer, device)
        self.model, self.tokenizer = self.lm.model, self.lm.tokenizer  # a module of this one: it moves with it
        self.max_length = self.lm.max_length if max_length is None else max_length
        self._device = self.lm.device
        for name in ("preds_input_ids", "preds_lengths", "target_input_ids", "target_lengths"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, preds: str | Sequence[str], target: str | Sequence[str]) -> None:
        """Takes texts and their references."""
        found = [
            _tokenised(self.lm, texts, self.max_length, what) for texts, what in ((preds, "preds"), (target, "target"))
        ]
        _check_pairs(*found)
        for name, ids in zip(("preds", "target"), found):
            getattr(self, f"{name}_input_ids").append(torch.from_numpy(np.concatenate(ids)).to(self.device))
            lengths = torch.tensor([len(one) for one in ids], device=self.device)
            getattr(self, f"{name}_lengths").append(lengths)

    def compute(self) -> Tensor | tuple[Tensor, Tensor]:
        """The mean over all texts so far, and their single scores where these are asked for."""
        ids = []
        for name in ("preds", "target"):
            held, lengths = (getattr(self, f"{name}_{kind}") for kind in ("input_ids", "lengths"))
            if not len(held):
                raise RequestError("InfoLM has no texts to compare; call update() first")
            bounds = dim_zero_cat(lengths).cumsum(0)[:-1].cpu()
            ids.append([part.numpy() for part in dim_zero_cat(held).cpu().tensor_split(bounds)])
        measure = self.information_measure_cls
        scores = _scores(self.lm, ids[0], ids[1], measure, self.temperature, self.idf, self.verbose)
        return (scores.mean(), scores) if self.return_sentence_level_score else scores.mean()


def _loaded(model: Model, tokenizer: Any, device: str | torch.device | None) -> MaskedLM:
    """The model; by name or folder as transformers computes it, which is what torchmetrics does."""
    if isinstance(model, MaskedLM):
        if device is not None and torch.device(device).type != model.device.type:
            raise RequestError(
                f"the MaskedLM stays on {model.device}; load it there: mlmfast.load(..., device={device!r})"
            )
        return model
    named = isinstance(model, (str, os.PathLike))
    place = device or ("cpu" if named else "auto")
    return mlmfast.load(model, tokenizer, semantics="upstream", device=place)


def _tokenised(lm: MaskedLM, texts: str | Sequence[str], max_length: int | None, what: str) -> list[np.ndarray]:
    """Token ids of each text, int64, cut as the tokenizer cuts."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise RequestError(f"{what} holds no text; InfoLM compares at least one pair")
    if max_length is not None and max_length < 3:
        raise RequestError(f"max_length={max_length} leaves no room for a token beside the special ones")
    cut = {"truncation": max_length is not None, "max_length": max_length}
    only = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    found = [np.array(ids, np.int64) for ids in lm.tokenizer(texts, **cut, **only)["input_ids"]]
    longest = lm.max_length
    for i, ids in enumerate(found):
        if longest is not None and len(ids) > longest:
            raise RequestError(
                f"{what} {i} has {len(ids)} tokens; {lm.name} holds {longest}: pass max_length={longest}"
            )
    return found


def _check_pairs(preds: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> None:
    if len(preds) != len(target):
        raise RequestError(f"{len(preds)} preds cannot be compared with {len(target)} targets: give as many of each")


def _scores(
    lm: MaskedLM,
    preds: Sequence[np.ndarray],
    target: Sequence[np.ndarray],
    measure: _InformationMeasure,
    temperature: float,
    idf: bool,
    verbose: bool,
) -> Tensor:
    """The measure of each pair, float32 ``[n]`` on the model's device."""
    _check_pairs(preds, target)
    weights = [_weights(lm.tokenizer, ids, idf) for ids in (preds, target)]
    bare = sum(not own.any() for side in weights for own in side)
    if bare:
        warnings.warn(
            f"{bare} of {2 * len(preds)} texts have no token with a weight (empty or, with idf=True, of tokens "
            "that all texts share), so there is nothing to compare: such a pair's score is 0, as in torchmetrics",
            stacklevel=3,
        )
    each = max(1, HELD // (2 * lm.spec().head.vocab_size))
    found = []
    with tqdm(total=2 * len(preds), desc=f"InfoLM with {lm.name}", unit="text", disable=not verbose) as bar:
        for start in range(0, len(preds), each):
            part = slice(start, start + each)
            means = _mean_distributions(
                lm, [*preds[part], *target[part]], [*weights[0][part], *weights[1][part]], temperature, bar
            )
            first, second = means.chunk(2)
            found.append(measure(first, second).float())
    return torch.cat(found)


def _weights(tokenizer: Any, texts: Sequence[np.ndarray], idf: bool) -> list[np.ndarray]:
    """What each token counts, float64 ``[L]`` a text: 0 at padding, separators and CLS, as torchmetrics has it."""
    special = [i for i in (tokenizer.pad_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id) if i is not None]
    occurs = Counter(token for ids in texts for token in set(ids.tolist()))
    found = []
    for ids in texts:
        own = np.ones(len(ids))
        if idf:
            own = np.array([math.log((len(texts) + 1) / (occurs[token] + 1)) for token in ids.tolist()])
        found.append(np.where(np.isin(ids, special), 0.0, own))
    return found


def _mean_distributions(
    lm: MaskedLM, texts: Sequence[np.ndarray], weights: Sequence[np.ndarray], temperature: float, bar: tqdm
) -> Tensor:
    """The weighted mean of a text's masked distributions, float64 ``[n, V]``; NaN where no token has a weight.

    In float64 a probability that float32 would round to 0 keeps its part in the measures' logarithms.
    """
    # A token without weight is neither masked nor computed.
    sequences = [TokenSequence(ids, special=own == 0, scored=own != 0) for ids, own in zip(texts, weights)]
    starts = np.cumsum([0, *map(len, texts)])
    flat = torch.from_numpy(np.concatenate(weights)).to(lm.device)
    sums = torch.zeros(len(texts), lm.spec().head.vocab_size, dtype=torch.float64, device=lm.device)

    def add(owners: np.ndarray, positions: np.ndarray, logprobs: Tensor) -> None:
        own = flat[torch.from_numpy(starts[owners] + positions).to(lm.device)]
        sums.index_add_(0, torch.from_numpy(owners).to(lm.device), logprobs.double().exp_().mul_(own[:, None]))

    lm.visit(sequences, add, temperature=temperature, advance=bar.update)
    # Their own sums, not those of the weights: float32 log-probabilities add up to 1 within 1e-7 alone, and the
    # arccosine of what is missing would be a distance of 3e-4 between equal texts.
    return sums / sums.sum(1, keepdim=True)
