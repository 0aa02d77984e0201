"""What lm-evaluation-harness's model ``mlmfast`` is compared with: a small checkpoint and the loops over it."""

from __future__ import annotations

from typing import Any

from appending import appending, loop
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import Truth, continuation_loop, forward_of

from mlmfast.integrations.lm_eval import MLMFastLM


class Family:
    """One small checkpoint with the loops over it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.forward = forward_of(model)

    def lm(self, **arguments: Any) -> MLMFastLM:
        return MLMFastLM(self.model, self.tokenizer, **arguments)

    def truth(self, context: str, continuation: str, metric: str = "original", **options: Any) -> Truth:
        return continuation_loop(self.forward, self.tokenizer, context, continuation, metric, **options)

    def generated(self, prompt: str, tokens: int, most: int | None = None) -> str:
        """The text that the loop generates; with ``most`` after that many of the prompt's last tokens."""
        tokenizer = self.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"][-(most or 0) :]
        stops = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
        new, _ = loop(appending(self.model, tokenizer), ids, tokens, stops)
        alone, whole = (
            tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for part in (ids, ids + new)
        )
        assert whole.startswith(alone)
        return whole[len(alone) :]
