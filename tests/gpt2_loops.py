"""What the GPT-2 paper's tasks are compared with: plain loops. Nothing here imports mlmfast."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from nltk.stem.porter import PorterStemmer


class Causal:
    """A token at a time, each after all before it."""

    def __init__(self, model: Any, tokenizer: Any, held: int) -> None:
        self.model, self.tokenizer, self.held = model.eval(), tokenizer, held

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.inference_mode()
    def after(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)

    def tokens(self, context: str, continuation: str) -> list[tuple[torch.Tensor, int]]:
        """Of each of the continuation's tokens the distribution, and which it is."""
        before = [self.tokenizer.bos_token_id] if not context else []
        start = len(self.ids(context)) if context else 1
        ids = before + self.ids(context + continuation)
        return [(self.after(ids[:place]), ids[place]) for place in range(start, len(ids))]

    def rolling(self, text: str) -> float:
        """Each token once, in windows side by side; the last one reaches back."""
        ids, held, total = self.ids(text), self.held, 0.0
        for place in range(len(ids)):
            end = min((place // held + 1) * held, len(ids))
            first = end - held - 1
            before = ids[first:place] if first >= 0 else [self.tokenizer.bos_token_id, *ids[:place]]
            total += float(self.after(before)[ids[place]])
        return total


class Masked:
    """A copy a token: it and the positions after it masked."""

    def __init__(self, forward: Any, tokenizer: Any) -> None:
        self.forward, self.tokenizer = forward, tokenizer

    def tokens(self, context: str, continuation: str, window: int = 3) -> list[tuple[torch.Tensor, int]]:
        text = context + continuation
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [self.tokenizer.cls_token_id, *encoding["input_ids"], self.tokenizer.sep_token_id]
        found = []
        for i, (_, end) in enumerate(encoding["offset_mapping"], 1):
            if end > len(context):
                masked = list(ids)
                for j in range(i, min(i + window, len(ids) - 1)):
                    masked[j] = self.tokenizer.mask_token_id
                found.append((torch.log_softmax(self.forward(masked)[i].double(), -1), ids[i]))
        return found

    def rolling(self, text: str) -> float:
        return sum(float(row[one]) for row, one in self.tokens("", text, window=1))


def total(tokens: list[tuple[torch.Tensor, int]]) -> float:
    return sum(float(row[one]) for row, one in tokens)


def greedy(tokens: list[tuple[torch.Tensor, int]]) -> bool:
    return all(int(row.argmax()) == one for row, one in tokens)


def greedy_among(tokens: list[tuple[torch.Tensor, int]], allowed: list[int]) -> bool:
    """The first token the likeliest of those allowed, the others of all."""
    (row, one), *others = tokens
    return max(allowed, key=lambda i: float(row[i])) == one and greedy(others)


def stems(text: str) -> list[str]:
    """ROUGE's words: small letters and digits; those of more than three letters without their endings."""
    words = "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in text.lower()).split()
    return [PorterStemmer().stem(word) if len(word) > 3 else word for word in words]


def f(right: int, said: int, wanted: int) -> float:
    return 2 * right / (said + wanted) if right else 0.0


def rouge_n(said: list[str], wanted: list[str], n: int) -> float:
    """Sentences as one text."""
    bags = []
    for some in (said, wanted):
        words = stems(" ".join(some))
        bags.append(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)))
    return f(sum((bags[0] & bags[1]).values()), sum(bags[0].values()), sum(bags[1].values()))


def rouge_l(said: list[str], wanted: list[str]) -> float:
    """Of each wanted sentence the words that are in a longest common subsequence with any sentence said, each once."""
    left = Counter(word for one in said for word in stems(one))
    owed = Counter(word for one in wanted for word in stems(one))
    sizes, right = (sum(left.values()), sum(owed.values())), 0
    for sentence in wanted:
        words = stems(sentence)
        places = sorted({place for one in said for place in common(words, stems(one))})
        for word in (words[place] for place in places):
            if left[word] > 0 and owed[word] > 0:
                right += 1
                left[word] -= 1
                owed[word] -= 1
    return f(right, *sizes)


def common(a: list[str], b: list[str]) -> list[int]:
    """Places in ``a`` of one longest common subsequence; of two that are as long, what rouge_score takes."""
    size = np.zeros((len(a) + 1, len(b) + 1), int)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            size[i, j] = size[i - 1, j - 1] + 1 if a[i - 1] == b[j - 1] else max(size[i - 1, j], size[i, j - 1])
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(i - 1)
            i, j = i - 1, j - 1
        elif size[i, j - 1] > size[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return found


def rouges(said: list[str], wanted: list[str]) -> dict[str, float]:
    found = {"rouge1": rouge_n(said, wanted, 1), "rouge2": rouge_n(said, wanted, 2), "rougeL": rouge_l(said, wanted)}
    return {"rouge_avg": sum(found.values()) / 3} | found


def perplexity(logprobs: list[float], units: int) -> float:
    return math.exp(-sum(logprobs) / units)
