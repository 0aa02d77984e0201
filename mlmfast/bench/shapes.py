"""What is measured: published models' shapes with random weights, and texts of random tokens.

Speed depends on shapes, not on what a model has learnt, so nothing is downloaded. Weights are drawn wider than at the
start of training, and biases away from 0: near-uniform predictions would hide an error from the check of agreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from mlmfast.errors import RequestError
from mlmfast.masking import TokenSequence

# What all published DeBERTas share.
DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "max_relative_positions": -1,  # max_position_embeddings
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "pad_token_id": 0,
}
ROBERTA: dict[str, Any] = {
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
XLARGE = {"hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24, "intermediate_size": 6144}
# What published DeBERTa-v2 and v3 share.
DEBERTA_TABLES = {"vocab_size": 128100, "max_position_embeddings": 512, "position_buckets": 256}
ESM: dict[str, Any] = {
    "vocab_size": 33,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "emb_layer_norm_before": False,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 1026,
    "pad_token_id": 1,
    "mask_token_id": 4,
}
MODERNBERT: dict[str, Any] = {
    "vocab_size": 50368,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
DEBERTA_V2 = XLARGE | DEBERTA_TABLES | {"conv_kernel_size": 3, "conv_act": "gelu"}
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

# Standard deviation of a product's output for inputs of unit variance, and of the biases.
GAIN = 1.1
BIAS = 0.05


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        model_class, config_class: of transformers.
        settings: arguments of the config.
        special: special tokens by role, ids counted from 0 in this order.
        max_length: longest text that such a model is trained on, special tokens included.
        held: longest text that it computes.
    """

    model_class: Any
    config_class: Any
    settings: dict[str, Any]
    special: dict[str, str]
    max_length: int
    held: int

    def model(self, seed: int = 0, device: str = "cpu") -> Any:
        """A Hugging Face model with random weights, float32, in evaluation mode, with its eager attention.

        The weights are drawn on the device: the largest shapes would take a CPU half a minute.
        """
        torch.manual_seed(seed)
        spread = GAIN / math.sqrt(self.settings["hidden_size"])
        config = self.config_class(**self.settings, initializer_range=spread, attn_implementation="eager")
        with torch.device(device):
            model = self.model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=BIAS)
        return model.eval()

    def tokenizer(self, spelled: bool = False) -> PreTrainedTokenizerFast:
        """A tokenizer that knows the special tokens and no words: texts are drawn as token ids.

        Args:
            spelled: it knows a word for every other id, see :meth:`spell`, and puts special tokens around a text.
        """
        vocabulary = {token: i for i, token in enumerate(self.special.values())}
        around = [(self.special[role], vocabulary[self.special[role]]) for role in ("cls_token", "sep_token")]
        if spelled:
            others = range(len(vocabulary), self.settings["vocab_size"])
            vocabulary |= {self.spell([i]): i for i in others}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token=self.special["unk_token"]))
        if spelled:
            words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            single = f"{around[0][0]} $A {around[1][0]}"
            words.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
        return PreTrainedTokenizerFast(tokenizer_object=words, **self.special)

    @staticmethod
    def spell(token_ids: Iterable[int]) -> str:
        """A text that the spelling tokenizer reads as these tokens, none of them special."""
        return " ".join(f"w{i}" for i in token_ids)

    def texts(self, length: int, copies: int, seed: int = 0) -> list[TokenSequence]:
        """Texts of ``length`` random tokens, the two special ones included, that ask for ``copies`` copies together.

        A text gives a copy for each of its ``length - 2`` words; there are as many texts as that takes, and of the
        last one only the first words are scored.

        Raises:
            RequestError: a length that the model does not hold or that has nothing to score, or no copies.
        """
        if not 3 <= length <= self.held:
            raise RequestError(f"length {length} is not between 3 and the {self.held} that this shape holds")
        if copies < 1:
            raise RequestError(f"copies={copies} leaves nothing to measure; 1 is the least")
        roles = list(self.special)
        first, last = roles.index("cls_token"), roles.index("sep_token")
        draw = np.random.default_rng(seed)
        special = np.zeros(length, bool)
        special[[0, -1]] = True
        texts = []
        for start in range(0, copies, length - 2):
            words = draw.integers(len(roles), self.settings["vocab_size"], length - 2)
            scored = ~special & (np.arange(length) <= copies - start)
            texts.append(TokenSequence(np.concatenate([[first], words, [last]]), special, scored))
        return texts


DEBERTA_TOKENS = {
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
ROBERTA_TOKENS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def _deberta_v1(**settings: Any) -> Shape:
    longest = settings["max_position_embeddings"]
    # No table ends there: farther distances share the last buckets. Four times as long is as far as is measured.
    return Shape(DebertaForMaskedLM, DebertaConfig, DEBERTA | settings, DEBERTA_TOKENS, longest, 4 * longest)


def _deberta(**settings: Any) -> Shape:
    longest, later = settings["max_position_embeddings"], {"share_att_key": True, "norm_rel_ebd": "layer_norm"}
    return Shape(
        DebertaV2ForMaskedLM, DebertaV2Config, DEBERTA | later | settings, DEBERTA_TOKENS, longest, 4 * longest
    )


def _roberta(model: Any = RobertaForMaskedLM, config: Any = RobertaConfig, **settings: Any) -> Shape:
    longest = settings["max_position_embeddings"] - 2  # positions are counted from pad_token_id + 1
    return Shape(model, config, ROBERTA | settings, ROBERTA_TOKENS, longest, longest)


def _esm(hidden: int, layers: int, heads: int = 20) -> Shape:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    settings = ESM | sizes | {"intermediate_size": 4 * hidden}
    # Positions are rotary and end nowhere.
    return Shape(EsmForMaskedLM, EsmConfig, settings, ROBERTA_TOKENS, 1024, 4096)


def _modernbert(**settings: Any) -> Shape:
    longest = MODERNBERT["max_position_embeddings"]
    return Shape(ModernBertForMaskedLM, ModernBertConfig, MODERNBERT | settings, DEBERTA_TOKENS, longest, longest)


SHAPES = {
    "deberta-v3-base": _deberta(**BASE, **DEBERTA_TABLES),
    "deberta-v2-xlarge": _deberta(**DEBERTA_V2),
    "deberta-v2-xxlarge": _deberta(**(DEBERTA_V2 | {"num_hidden_layers": 48})),
    "deberta-v1-base": _deberta_v1(**BASE, vocab_size=50265, max_position_embeddings=512),
    "roberta-base": _roberta(**BASE, vocab_size=50265, max_position_embeddings=514),
    "roberta-large": _roberta(**LARGE, vocab_size=50265, max_position_embeddings=514),
    "xlm-roberta-base": _roberta(
        XLMRobertaForMaskedLM, XLMRobertaConfig, **BASE, vocab_size=250002, max_position_embeddings=514
    ),
    "modernbert-base": _modernbert(**(BASE | {"num_hidden_layers": 22, "intermediate_size": 1152})),
    "esm2-t12-35m": _esm(480, 12),
    "esm2-t30-150m": _esm(640, 30),
    "esm2-t33-650m": _esm(1280, 33),
    # To try the machinery in a second; nobody's model.
    "toy-deberta": _deberta(**TOY, vocab_size=300, max_position_embeddings=64, position_buckets=16),
    "toy-deberta-v1": _deberta_v1(**TOY, vocab_size=300, max_position_embeddings=64),
    "toy-roberta": _roberta(**TOY, vocab_size=300, max_position_embeddings=66),
    "toy-modernbert": _modernbert(**TOY, local_attention=8),
    "toy-esm": _esm(32, 2, 4),
}


def named(name: str) -> Shape:
    """A shape of :data:`SHAPES`.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in SHAPES:
        raise RequestError(f"shape {name!r} is not known; choose from {', '.join(SHAPES)}")
    return SHAPES[name]
