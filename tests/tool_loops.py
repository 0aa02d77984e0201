"""Plain loops in the published conventions of tools that cannot be installed, a pass a row, nothing saved.

Written from the papers' and the pipelines' descriptions, not from mlmfast: nothing here imports it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def logits_at(model: PreTrainedModel, ids: Sequence[int], position: int) -> Tensor:
    """``[V]`` of one row alone."""
    row = torch.tensor([list(ids)])
    return model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, position]


# ---- BabyLM, sentence_zero_shot


def masked_rows(
    tokenizer: PreTrainedTokenizerBase, sentence: str, completion: str, lookback: int
) -> Iterator[tuple[list[int], int, int]]:
    """A row a token that ends beyond where the completion begins: masked ids, where it is read, the token."""
    encoding = tokenizer(sentence, return_offsets_mapping=True)
    ids, begin = encoding["input_ids"], len(sentence) - len(completion)
    for i, (_, end) in enumerate(encoding["offset_mapping"]):
        if end > begin:
            yield [*ids[:i], tokenizer.mask_token_id, *ids[i + 1 :]], i - lookback, ids[i]


def dataloader(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]], batch: int, lookback: int = 0
) -> Any:
    """Batches as the pipeline's dataloader makes them; an item has ``sentences``, ``completions`` and more."""
    batches = []
    for start in range(0, len(items), batch):
        chosen = items[start : start + batch]
        rows: dict[str, Any] = {}
        for option in range(len(chosen[0]["sentences"])):
            made = [
                list(masked_rows(tokenizer, item["sentences"][option], item["completions"][option], lookback))
                for item in chosen
            ]
            flat = [row for of_item in made for row in of_item]
            longest = max(len(ids) for ids, _, _ in flat)
            padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _, _ in flat]
            seen = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in flat]
            name = f"sentence_{option}"
            rows |= {f"{name}_tokens": torch.tensor(padded), f"{name}_attn_mask": torch.tensor(seen)}
            rows[f"{name}_indices"] = torch.tensor([position for _, position, _ in flat])
            rows[f"{name}_targets"] = torch.tensor([target for _, _, target in flat])
            rows[f"{name}_examples_per_batch"] = [len(of_item) for of_item in made]
        columns = [[item[key] for item in chosen] for key in ("label", "metadata", "uid")]
        batches.append((list(chosen), rows, *columns))
    return Batches(batches, SimpleNamespace(tokenizer=tokenizer))


class Batches(list[Any]):
    """Batches with the dataset that they come from."""

    def __init__(self, batches: list[Any], dataset: Any) -> None:
        super().__init__(batches)
        self.dataset = dataset


def completion_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentence: str,
    completion: str,
    temperature: float = 1.0,
    lookback: int = 0,
) -> float:
    """The summed log-probability of a completion's tokens, each masked alone, logits divided by a temperature."""
    total = 0.0
    for ids, position, target in masked_rows(tokenizer, sentence, completion, lookback):
        total += float((logits_at(model, ids, position) / temperature).log_softmax(0)[target])
    return total


def accuracies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    temperature: float,
    lookback: int = 0,
) -> dict[str, dict[str, Counter[Any]]]:
    """Total and correct choices by metadata field and value, as the pipeline counts them."""
    stats: dict[str, dict[str, Counter[Any]]] = {}
    for item in items:
        pairs = zip(item["sentences"], item["completions"])
        scores = [completion_score(model, tokenizer, *pair, temperature, lookback) for pair in pairs]
        for field, value in item["metadata"].items():
            counts = stats.setdefault(field, {"total": Counter(), "correct": Counter()})
            counts["total"][value] += 1
            counts["correct"][value] += scores.index(max(scores)) == item["label"]
    return stats


# ---- BabyLM, reading


def next_piece(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, piece: int, masks: int, lookback: int
) -> float:
    """The probability of a piece at the first of some masks after a text."""
    ids = tokenizer(text + tokenizer.mask_token * masks)["input_ids"]
    first = len(ids) - masks - (ids[-1] != tokenizer.mask_token_id)
    return float(logits_at(model, ids, first - lookback).softmax(0)[piece])


def next_word(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, word: str, masks: int = 3, lookback: int = 0
) -> float:
    """The probability of a word: its pieces one after another, those before it in place as the ids they are."""
    ids = tokenizer(text + tokenizer.mask_token * masks)["input_ids"]
    first = len(ids) - masks - (ids[-1] != tokenizer.mask_token_id)
    total = 1.0
    for piece in tokenizer(word, add_special_tokens=False)["input_ids"]:
        total *= float(logits_at(model, ids, first - lookback).softmax(0)[piece])
        ids = [*ids[:first], piece, *ids[first:]]
        first += 1
    return total


# ---- bert-in-context


def window_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, score_length_in_words: int
) -> float:
    """The last words' summed log-probabilities, each read with the two tokens after it masked too (Samuel 2024)."""
    encoding = tokenizer(text, add_special_tokens=False)
    words = encoding.word_ids()
    count = max(word for word in words if word is not None) + 1
    scored = [word is not None and word >= count - score_length_in_words for word in words]
    ids = [tokenizer.cls_token_id, *encoding["input_ids"], tokenizer.sep_token_id]
    total = 0.0
    for i in (i + 1 for i, wanted in enumerate(scored) if wanted):
        end = min(i + 3, len(ids) - 1)  # the separator stays
        masked = [*ids[:i], *[tokenizer.mask_token_id] * (end - i), *ids[end:]]
        total += float(logits_at(model, masked, i).log_softmax(0)[ids[i]])
    return total
