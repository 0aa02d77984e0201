"""Tokenizers that know digits, each in its own way, and small models under them."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
)

import mlmfast
from mlmfast.icl import needle

ROOM = 700  # positions of the small models with absolute ones


def byte_level(special: list[str]) -> dict[str, Any]:
    """Vocabulary and merges of a byte-level BPE with pieces of several digits, beginning with a space or not."""
    rng = random.Random(1)
    numbers = [str(rng.randrange(10**5, 10**6)) for _ in range(300)]
    texts = [*checkpoints.sentences(100), *numbers, *(f"It is {n}." for n in numbers)]
    texts += 20 * [needle.INTRODUCTION, needle.QUESTION, needle.ANSWER, "The magic number is"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=700, special_tokens=special, show_progress=False)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in state["merges"]]
    return {"vocab": state["vocab"], "merges": merges}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """WordPiece with later pieces of digits, byte-level BPE under two sets of special tokens, and the bundled one."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = sorted(set(" ".join(checkpoints.sentences(100)).lower().replace(".", "").split()))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += [word for word in words if word.isalpha() and len(word) > 1] + ["12", "482", "##34", "##131"]
    return {
        "bert": BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}),
        "roberta": RobertaTokenizer(**byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])),
        "deberta": AutoTokenizer.from_pretrained(Path(mlmfast.__file__).with_name("tiny")),
        "gpt2": GPT2Tokenizer(**byte_level(["<|endoftext|>"])),
    }


@pytest.fixture(scope="session")
def models(tokenizers: dict[str, PreTrainedTokenizerBase]) -> dict[str, PreTrainedModel]:
    """A random model under each tokenizer; only DeBERTa's holds texts of any length, 96 positions were its trained."""
    sizes = {name: len(tokenizer) for name, tokenizer in tokenizers.items()}
    gpt2 = GPT2Config(vocab_size=sizes["gpt2"], n_embd=32, n_layer=2, n_head=4, n_positions=ROOM)
    return {
        "bert": checkpoints.small_bert(sizes["bert"], max_position_embeddings=ROOM),
        "roberta": checkpoints.small_roberta(sizes["roberta"], max_position_embeddings=ROOM + 2),
        "deberta": checkpoints.small_deberta(sizes["deberta"], seed=7),  # whose answers depend on the text
        "gpt2": checkpoints.perturb(GPT2LMHeadModel(gpt2)),
    }


@pytest.fixture(scope="session")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizers: dict[str, PreTrainedTokenizerBase],
    models: dict[str, PreTrainedModel],
) -> dict[str, Path]:
    return {
        name: checkpoints.save(tmp_path_factory.mktemp(name), model, tokenizers[name]) for name, model in models.items()
    }
