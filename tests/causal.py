"""A small random GPT-2 and its tokenizer, which keeps line breaks."""

from __future__ import annotations

import checkpoints
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerBase

END = "<|endoftext|>"


def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE, 330 pieces."""
    return GPT2Tokenizer(**checkpoints._byte_level([END]), model_max_length=512)


def small_gpt2(vocab_size: int, *, seed: int = 0, **options: object) -> GPT2LMHeadModel:
    """Wide weights, so that its answers differ."""
    torch.manual_seed(seed)
    settings = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocab_size, initializer_range=0.3, **(settings | options))
    return GPT2LMHeadModel(config).eval()
