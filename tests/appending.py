"""The truth that generation is compared with: a Hugging Face model with masks appended, one prompt at a time.

Written from the paper's definition, not from the package: nothing here imports mlmfast.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput


class Appending(PreTrainedModel, GenerationMixin):
    """A masked model that transformers' own ``generate`` takes for a causal one: the paper's wrapper.

    ``forward`` puts CLS before the tokens, masks and the final token after them, and gives the first mask's logits, or
    those ``shift`` rows to its left.
    """

    config_class = PretrainedConfig
    base_model_prefix = "inner"
    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self, model: PreTrainedModel, before: list[int], masks: list[int], after: list[int], shift: int = 0
    ) -> None:
        super().__init__(PretrainedConfig(vocab_size=model.config.vocab_size))
        self.inner = copy.deepcopy(model).eval()
        self.before, self.masks, self.after, self.shift = before, masks, after, shift
        self.generation_config.use_cache = False
        self.anchor = nn.Parameter(torch.zeros(1))  # transformers asks the first parameter for the device

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> CausalLMOutput:
        rows = len(input_ids)
        before, masks, after = (
            torch.tensor(ids, dtype=torch.long).expand(rows, -1) for ids in (self.before, self.masks, self.after)
        )
        whole = torch.cat([before, input_ids.long(), masks, after], 1)
        logits = self.inner(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
        first = len(self.before) + input_ids.shape[1] - self.shift
        return CausalLMOutput(logits=logits[:, first : first + 1])


def appending(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, masks: int = 3, final: bool = True, shift: int = 0
) -> Appending:
    before, after = [tokenizer.cls_token_id], [tokenizer.sep_token_id] if final else []
    return Appending(model, before, [tokenizer.mask_token_id] * masks, after, shift)


@torch.no_grad()
def loop(
    model: Appending, prompt: list[int], tokens: int, stops: set[int] | None = None
) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, a whole pass each."""
    ids, logprobs = list(prompt), []
    for _ in range(tokens):
        row = model(input_ids=torch.tensor([ids])).logits[0, 0].double().log_softmax(0)
        ids.append(int(row.argmax()))
        logprobs.append(float(row.max()))
        if stops and ids[-1] in stops:
            break
    return ids[len(prompt) :], logprobs


def own_generate(model: Appending, prompt: list[int], pad: int, **options: Any) -> list[list[int]]:
    """transformers' ``generate``: the generated tokens of each returned sequence, padding taken away."""
    given = torch.tensor([prompt])
    out = model.generate(given, pad_token_id=pad, attention_mask=torch.ones_like(given), use_cache=False, **options)
    return [[int(token) for token in row[len(prompt) :]] for row in out]
