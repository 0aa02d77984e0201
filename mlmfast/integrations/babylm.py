"""The scoring functions of the BabyLM evaluation pipeline (2025, and 2026's strict track) on mlmfast.

    python -m mlmfast.integrations.babylm evaluation_pipeline.sentence_zero_shot.run --backend mlm ...

runs one of the pipeline's own modules, in the pipeline's own folder, with these functions in the place of its own.
"""

from __future__ import annotations

import importlib
import math
import runpy
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlmfast.architectures.spec import Head
from mlmfast.errors import RequestError
from mlmfast.execution import CHUNK, Reader, Targets, read_logprobs
from mlmfast.generic import LogitsHead
from mlmfast.integrations.masked_rows import MaskedRows, loaded, read_rows_of
from mlmfast.model import MaskedLM

# Where the pipeline looks its functions up: module -> the names to be replaced there.
PLACES = {
    "evaluation_pipeline.sentence_zero_shot.compute_results": ("compute_mlm_results",),
    "evaluation_pipeline.reading.evaluation_functions": ("get_p2_mlm", "get_p2_mntp"),
}


def patch() -> None:
    """Puts these functions into the pipeline, before one of its ``run`` modules is imported.

    Raises:
        ImportError: the pipeline is not here.
    """
    for place, names in PLACES.items():
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise ImportError(
                f"{place} cannot be imported ({error}): stand in the folder of the BabyLM pipeline, with its "
                "requirements installed (it is not on PyPI)"
            ) from error
        for name in names:
            setattr(module, name, globals()[name])


# ---- sentence_zero_shot


def compute_mlm_results(
    args: Any, model: Any, dataloader: Iterable[Any], temperatures: Sequence[float]
) -> tuple[dict[float, Any], dict[float, Any]]:
    """Which completion each item's model prefers, for backends ``mlm`` and ``mntp``.

    All temperatures are read from one pass. ``args.non_causal_batch_size`` means nothing here.

    Args:
        args: the pipeline's; read are ``task``, ``images_path`` and ``save_predictions``.
        model: a live Hugging Face model, or what :func:`mlmfast.load` returns.
        dataloader: the pipeline's, whose dataset has the tokenizer.
        temperatures: each divides the logits.

    Returns:
        Correct and total counts by temperature, metadata field and value (``wug``: a correlation), and predictions.
    """
    if getattr(args, "images_path", None) is not None:
        raise RequestError("compute_mlm_results() reads texts only: leave --images_path away")
    lm = loaded(model, getattr(getattr(dataloader, "dataset", None), "tokenizer", None))
    wug = getattr(args, "task", None) == "wug"
    stats: dict[float, Any] = {temperature: {} for temperature in temperatures}
    predictions: dict[float, Any] = {temperature: defaultdict(list) for temperature in temperatures}
    shares: dict[float, list[float]] = {temperature: [] for temperature in temperatures}
    ratios: list[float] = []
    for sentences, rows, labels, metadatas, uids, *_ in tqdm(dataloader):
        totals = completion_totals(lm, rows, temperatures)  # [items, options, temperatures]
        ratios += [metadata["ratio"] for metadata in metadatas] if wug else []
        for temperature, values in zip(temperatures, np.moveaxis(totals, 2, 0)):
            first = torch.from_numpy(values).softmax(1)[:, 0].tolist()
            shares[temperature] += first
            chosen = values.argmax(1).tolist()  # of equals the first, as there
            for sentence, choice, label, metadata, uid, share in zip(sentences, chosen, labels, metadatas, uids, first):
                for field, value in {} if wug else metadata.items():
                    counts = stats[temperature].setdefault(field, {"total": Counter(), "correct": Counter()})
                    counts["total"][value] += 1
                    counts["correct"][value] += int(choice == label)
                earlier = predictions[temperature][uid]
                made = {"id": f"{uid}_{len(earlier)}", "pred": sentence["completions"][choice]}
                earlier.append(made | ({"prob": share} if wug else {}))
    if wug:
        from scipy.stats import spearmanr  # the pipeline needs it too

        stats = {t: {"UID": {"correlation": spearmanr(shares[t], ratios)[0]}} for t in temperatures}
    if not getattr(args, "save_predictions", False):
        return stats, {temperature: {} for temperature in temperatures}
    return stats, {t: {uid: {"predictions": made} for uid, made in predictions[t].items()} for t in temperatures}


def completion_totals(lm: MaskedLM, rows: dict[str, Any], temperatures: Sequence[float]) -> np.ndarray:
    """Summed log-probabilities, float64 ``[items, options, temperatures]``, of one batch of the pipeline's dataloader.

    Args:
        rows: ``sentence_<option>_tokens``, ``..._attn_mask``, ``..._indices`` (where a prediction is read),
            ``..._targets`` and ``..._examples_per_batch`` (rows an item).
    """
    options = sum(name.endswith("attn_mask") for name in rows)
    texts = [
        MaskedRows(*(rows[f"sentence_{option}_{part}"] for part in ("tokens", "attn_mask", "targets", "indices")))
        for option in range(options)
    ]
    totals = []
    for option, values in enumerate(read_rows_of(lm, texts, read_temperatures(temperatures))):
        ends = np.cumsum(rows[f"sentence_{option}_examples_per_batch"])
        found = values.get("logprobs", np.zeros((0, len(temperatures))))
        totals.append([part.sum(0, dtype=np.float64) for part in np.split(found, ends[:-1])])
    return np.stack(totals, 1)


def read_temperatures(temperatures: Sequence[float]) -> Reader:
    """Reads ``logprobs`` ``[N, temperatures]``, the head's product being made once."""
    if len(temperatures) == 1:
        single = read_logprobs(temperatures[0])
        return lambda head, hidden, targets: {"logprobs": single(head, hidden, targets)["logprobs"][:, None]}

    def read(head: Head | LogitsHead, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        found = []
        for rows, ids in zip(targets.rows.split(CHUNK), targets.ids.split(CHUNK)):
            logprobs = head.vocab_rows(hidden[rows], 1.0)  # [r, V], the logits but for a constant
            scaled = [(logprobs / t).log_softmax(1).gather(1, ids.to(logprobs.device)[:, None]) for t in temperatures]
            found.append(torch.cat(scaled, 1))
        return {"logprobs": torch.cat(found)}

    return read


# ---- reading


def get_p2_mlm(sentence: str, word: str, model: Any, tokenizer: Any, num_mask_tokens: int = 3) -> tuple[float, int]:
    """The probability of a word after a context, read at the first of some appended masks (Samuel 2024).

    Args:
        sentence: the context.
        word: what follows, with its white space, if the tokenizer minds.
        model: a live Hugging Face model, or what :func:`mlmfast.load` returns.
        tokenizer: its tokenizer, or a processor that has it.
        num_mask_tokens: masks after the context.

    Returns:
        The product over the word's pieces, and 1 if there are several.

    Raises:
        RequestError: the word has no tokens, or no mask is appended.
    """
    return _next_word(sentence, word, model, tokenizer, num_mask_tokens, 0)


def get_p2_mntp(sentence: str, word: str, model: Any, tokenizer: Any, num_mask_tokens: int = 3) -> tuple[float, int]:
    """The same of a masked-next-token model: read one position before the first mask."""
    return _next_word(sentence, word, model, tokenizer, num_mask_tokens, 1)


def _next_word(sentence: str, word: str, model: Any, tokenizer: Any, masks: int, lookback: int) -> tuple[float, int]:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    lm = loaded(model, tokenizer)
    if masks < 1:
        raise RequestError(f"num_mask_tokens={masks} leaves nothing to predict; 1 is the least")
    pieces = tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
    if not pieces:
        raise RequestError(f"the word {word!r} has no tokens")
    ids = tokenizer(sentence + tokenizer.mask_token * masks, verbose=False)["input_ids"]
    first = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id][-masks]
    if first < lookback:
        raise RequestError("an empty context has no position to read at: the tokenizer puts nothing before a text")
    # A row a piece, those before it in place. They are ids, not text, so none is tokenised to something else.
    rows = [
        MaskedRows(*(torch.tensor(x) for x in ([row], [[1] * len(row)], [piece], [first + k - lookback])))
        for k, piece in enumerate(pieces)
        for row in [[*ids[:first], *pieces[:k], *ids[first:]]]
    ]
    logprobs = [float(values["logprobs"][0]) for values in read_rows_of(lm, rows, read_logprobs())]
    return math.exp(sum(logprobs)), int(len(pieces) > 1)


def main() -> None:
    """Runs the module that is named first, with the arguments after it."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m mlmfast.integrations.babylm evaluation_pipeline.<task>.run ...")
    patch()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
