"""Small random checkpoints and the sentences they are tested on.

Everything is made here: a grammar, tokenizers trained on it (WordPiece, byte-level BPE, Unigram with Metaspace) and
Hugging Face models of a few thousand weights. Weights are drawn wide, and biases, LayerNorms and tables are moved
away from 0 and 1, so that an error anywhere moves a log-probability by much more than the bounds.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

DETERMINERS = ["the", "a", "every", "some", "no"]
ADJECTIVES = ["small", "quiet", "hungry", "remarkable", "yellow", "unbelievable"]
NOUNS = ["cat", "dogs", "gardener", "children", "lighthouse", "pianist", "sparrows", "grandmother"]
VERBS = ["watches", "follow", "remembers", "repaint", "has forgotten", "are humming to"]
ENDINGS = [".", "!", "?", ", slowly.", " in the rain.", " before breakfast."]


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar: determiner (adjective) noun verb determiner (adjective) noun ending."""

    def noun_phrase() -> str:
        middle = [rng.choice(ADJECTIVES)] if rng.random() < 0.5 else []
        return " ".join([rng.choice(DETERMINERS), *middle, rng.choice(NOUNS)])

    words = f"{noun_phrase()} {rng.choice(VERBS)} {noun_phrase()}{rng.choice(ENDINGS)}"
    return words[0].upper() + words[1:]


def sentences(count: int, seed: int = 0) -> list[str]:
    """``count`` sentences of the grammar, the same for the same seed."""
    rng = random.Random(seed)
    return [sentence(rng) for _ in range(count)]


# Words outside the grammar break into many pieces; the snowman is unknown to WordPiece and Unigram.
TEXTS = [
    "The cat watches every remarkable lighthouse before breakfast.",
    "Children humming, yellowish gardeners repainted!",
    "No ☃ sparrows.",
    "A",
]


def bert_tokenizer() -> PreTrainedTokenizerBase:
    """WordPiece, lower-casing, 120 pieces.

    Its pieces are counted here: what the library's trainer learns differs from run to run, and a random model's scores
    with it.
    """
    words = Counter(re.findall(r"\w+|[^\w\s]", " ".join(sentences(400)).lower()))
    letters = sorted({letter for word in words for letter in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    whole = sorted(words, key=lambda word: (-words[word], word))[:30]
    pieces += [word for word in whole if len(word) > 1]
    parts: Counter[str] = Counter()
    for word, count in words.items():
        for cut in range(2, len(word) - 1):
            parts[word[:cut]] += count
            parts["##" + word[cut:]] += count
    often = sorted(set(parts) - set(pieces), key=lambda part: (-parts[part], part))
    pieces += often[: 120 - len(pieces)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64)


def roberta_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE, 330 pieces."""
    return RobertaTokenizer(**_byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]), model_max_length=64)


def deberta_v1_tokenizer() -> PreTrainedTokenizerBase:
    """The same under DeBERTa's special tokens."""
    return DebertaTokenizer(**_byte_level(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]))


def _byte_level(special: list[str]) -> dict[str, Any]:
    """Vocabulary and merges."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sentences(400), vocab_size=330, special_tokens=special, show_progress=False)
    state = tokenizer_state(tokenizer.to_str())
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in state["merges"]]
    return {"vocab": state["vocab"], "merges": merges}


def tokenizer_state(serialised: str) -> dict[str, Any]:
    """The ``model`` part of a tokenizer's JSON."""
    return json.loads(serialised)["model"]


def unigram_pieces(special: list[str], unknown: str, vocab_size: int = 130) -> list[tuple[str, float]]:
    """Pieces and scores of a Unigram model with Metaspace, special tokens first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=unknown, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(400), trainer)
    return [(piece, score) for piece, score in tokenizer_state(tokenizer.to_str())["vocab"]]


def deberta_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram with Metaspace: a piece's offsets include the white space before it."""
    pieces = unigram_pieces(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], "[UNK]")
    return DebertaV2Tokenizer(vocab=pieces, unk_id=3)


def xlm_roberta_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram with Metaspace under RoBERTa's special tokens."""
    pieces = unigram_pieces(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<unk>")
    return XLMRobertaTokenizer(vocab=pieces, model_max_length=64)


def perturb(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draws every weight anew, none near a value that would hide it; tied weights stay tied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.lower().endswith("norm.weight"):
                weight.copy_(1.0 + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            elif "embeddings." in name:  # a table; ELECTRA's embeddings_project is a product
                weight.copy_(0.6 * noise)
            elif weight.dim() == 3:  # the convolution, [d, d / groups, k]
                weight.copy_(noise / (weight.shape[1] * weight.shape[2]) ** 0.5)
            else:
                weight.copy_(1.2 * noise / weight.shape[1] ** 0.5)
    return model.eval()


def small_deberta(vocab_size: int, *, seed: int = 0, **options: Any) -> DebertaV2ForMaskedLM:
    """A DeBERTa-v2 in v3-base's configuration (shared keys, log buckets, no absolute positions) but for ``options``."""
    settings = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    return perturb(DebertaV2ForMaskedLM(DebertaV2Config(**(_deberta_settings(vocab_size) | settings | options))), seed)


def small_deberta_v1(vocab_size: int, *, seed: int = 0, **options: Any) -> DebertaForMaskedLM:
    """A DeBERTa in deberta-base's configuration but for ``options``."""
    return perturb(DebertaForMaskedLM(DebertaConfig(**(_deberta_settings(vocab_size) | options))), seed)


# family -> its small model
SMALL_DEBERTAS: dict[str, Callable[..., PreTrainedModel]] = {"deberta-v2": small_deberta, "deberta": small_deberta_v1}


def _deberta_settings(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
        "relative_attention": True,
        "max_relative_positions": 16,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    }


def small_bert(vocab_size: int, *, seed: int = 0, **options: Any) -> BertForMaskedLM:
    """A BERT of two layers that holds 48 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 48,
        "type_vocab_size": 2,
    }
    return perturb(BertForMaskedLM(BertConfig(**(settings | options))), seed)


def small_roberta(vocab_size: int, *, seed: int = 0, **options: Any) -> RobertaForMaskedLM:
    """A RoBERTa of two layers; positions start at ``pad_token_id + 1 = 2``, so 50 of them hold 48 tokens."""
    return perturb(RobertaForMaskedLM(RobertaConfig(**(_roberta_settings(vocab_size) | options))), seed)


def small_xlm_roberta(vocab_size: int, *, seed: int = 0, **options: Any) -> XLMRobertaForMaskedLM:
    """The same under XLM-RoBERTa's name."""
    return perturb(XLMRobertaForMaskedLM(XLMRobertaConfig(**(_roberta_settings(vocab_size) | options))), seed)


def _roberta_settings(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 50,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Writes a checkpoint as its author would; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add_position_table(folder: Path, rows: int, width: int, seed: int = 5) -> Tensor:
    """Puts the decoder's position table into a saved checkpoint, as the original ones carry it."""
    table = 0.8 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weights = load_file(folder / "model.safetensors")
    weights["deberta.embeddings.position_embeddings.weight"] = table
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return table


def long_text(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int = 0) -> str:
    """Words of the grammar that make exactly ``tokens`` tokens (4 at least) with the special ones."""
    words = itertools.cycle(" ".join(sentences(50, seed)).split())
    text = "a"
    while True:
        longer = f"{text} {next(words)}"
        if len(tokenizer(longer)["input_ids"]) > tokens:
            break
        text = longer
    while len(tokenizer(text)["input_ids"]) < tokens:
        text += " a" if len(tokenizer(text + " a")["input_ids"]) <= tokens else "."
    assert len(tokenizer(text)["input_ids"]) == tokens
    return text


def far_cases(
    tokenizer: PreTrainedTokenizerBase, config: DebertaConfig | DebertaV2Config
) -> list[tuple[str, tuple[int, int] | None]]:
    """Short texts whole; texts of 40 and 67 tokens (16 and 20 were trained) where their far ends show."""
    cases: list[tuple[str, tuple[int, int] | None]] = [(text, None) for text in TEXTS[1:]]
    for length in (40, 67):
        if config.position_biased_input and length > config.max_position_embeddings:
            continue
        text = long_text(tokenizer, length)
        cases += [(text, (0, 9)), (text, (len(text) // 2, len(text) // 2 + 2)), (text, (len(text) - 8, len(text)))]
    return cases
