"""``rank`` beside what its users have without it: every candidate's copies computed on their own.

Candidates that differ in a few tokens share the copies whose masks cover these; ``rank`` computes such copies once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlmfast.bench.pll import Bench
from mlmfast.masking import MaskPlan, TokenSequence, make_plan

# Questions of a case, asked one after another: judged by one alone, bfloat16 would fail by chance.
ASKED = 6


@dataclass(frozen=True)
class Question:
    """What is ranked.

    Attributes:
        prompt: tokens of the prompt, without special ones.
        candidates: how many there are.
        option: tokens of each.
        different: how many of them, in its middle, no two candidates share.
    """

    prompt: int
    candidates: int
    option: int
    different: int

    def __str__(self) -> str:
        tokens = f"{self.option} token{'s' if self.option > 1 else ''}"
        return f"{self.candidates} candidates of {tokens}, {self.different} different, after {self.prompt}"

    @property
    def length(self) -> int:
        """Tokens of a candidate with its prompt and two special ones."""
        return self.prompt + self.option + 2


# Options of a question; answers of a token, the second time after many examples; a pair that differs in a word.
QUESTIONS = (Question(32, 4, 8, 2), Question(128, 4, 1, 1), Question(480, 4, 1, 1), Question(32, 2, 12, 1))


class Candidates(list[TokenSequence]):
    """All candidates of some questions as tokens, each after its prompt.

    Attributes:
        asked: each question as the texts that ``rank`` is given, a prompt and its options.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[str]]] = []


class RankBench(Bench):
    """Questions through ``rank``, one a call, tokenizer and all, and through peers a candidate at a time.

    Compared are the log-probabilities of every candidate's tokens under ``rank``'s own metric.
    """

    spelled: ClassVar[bool] = True

    def candidates(self, question: Question, asked: int = ASKED, seed: int = 0) -> Candidates:
        """Questions of random tokens."""
        draw, roles = np.random.default_rng(seed), list(self.shape.special)
        first, last = ([roles.index(role)] for role in ("cls_token", "sep_token"))
        words = np.arange(len(roles), self.shape.settings["vocab_size"])
        start = (question.option - question.different) // 2
        special, scored = (np.zeros(question.length, bool) for _ in range(2))
        special[[0, -1]] = scored[1 + question.prompt : -1] = True
        found = Candidates()
        for _ in range(asked):
            prompt, option = (draw.choice(words, count) for count in (question.prompt, question.option))
            places = [draw.choice(words, question.candidates, replace=False) for _ in range(question.different)]
            options = []
            for candidate in range(question.candidates):
                option[start : start + question.different] = [tokens[candidate] for tokens in places]
                options.append(" " + self.shape.spell(option))
                found.append(TokenSequence(np.concatenate([first, prompt, option, last]), special, scored))
            found.asked.append((self.shape.spell(prompt), options))
        return found

    def plan(self, texts: Sequence[TokenSequence]) -> MaskPlan:
        return make_plan(texts, self.tokenizer.mask_token_id, "window")

    def ours(self, texts: Sequence[TokenSequence]) -> np.ndarray:
        assert isinstance(texts, Candidates)
        rankings = [self.lm.rank(prompt, options, progress=False) for prompt, options in texts.asked]
        return np.concatenate([score.logprobs for ranking in rankings for score in ranking.scores])

    def theirs(self, texts: Sequence[TokenSequence], label: str | None = None) -> np.ndarray:
        return np.concatenate([super(RankBench, self).theirs([text], label) for text in texts])
