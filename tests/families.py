"""Small random checkpoints of the families, a row each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import bert_tokenizer, deberta_v1_tokenizer, perturb, roberta_tokenizer, unigram_pieces
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertTokenizer,
    CamembertConfig,
    CamembertForMaskedLM,
    CamembertTokenizer,
    Data2VecTextConfig,
    Data2VecTextForMaskedLM,
    DebertaConfig,
    DebertaForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ErnieConfig,
    ErnieForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RemBertConfig,
    RemBertForMaskedLM,
)

HOLDS = 48  # tokens of a text, in every family here whose positions are absolute


def albert_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram with Metaspace, lower-casing."""
    pieces = unigram_pieces(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], "<unk>")
    return AlbertTokenizer(vocab=pieces, model_max_length=64)


def camembert_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram with Metaspace under RoBERTa's special tokens, after pieces that the original left without a use."""
    special = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", "<mask>"]
    return CamembertTokenizer(vocab=unigram_pieces(special, "<unk>"), model_max_length=64)


def protein_tokenizer(folder: Path) -> EsmTokenizer:
    """The published tokenizer's vocabulary: slow, a token a residue."""
    residues = list("LAGVSERTIDPKQNFYMHWCXBUZO.-")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *residues, "<null_1>", "<mask>"]))
    return EsmTokenizer(str(vocabulary))


@dataclass(frozen=True)
class Family:
    """How a family's small model is made.

    Attributes:
        model, config: transformers' classes.
        tokenizer: makes one such as its checkpoints have.
        settings: of the config.
        narrow: settings that give the embeddings a width other than the layers'; empty where there are none.
        activation: what the config calls its activation; None where it has none to choose.
        epsilon: what the config calls that of its norms; None where it has none to choose.
        holds: longest text; None where positions are relative.
    """

    model: type[PreTrainedModel]
    config: type[Any]
    tokenizer: Any
    settings: dict[str, Any]
    narrow: dict[str, Any]
    activation: str | None = "hidden_act"
    epsilon: str | None = "layer_norm_eps"
    holds: int | None = HOLDS

    def small(self, vocab_size: int, *, seed: int = 0, **options: Any) -> PreTrainedModel:
        """A model that holds :data:`HOLDS` tokens."""
        torch.manual_seed(seed)
        settings = {"vocab_size": vocab_size, **self.settings, **self.sized(), **options}
        return perturb(self.model(self.config(**settings)), seed)

    def sized(self, hidden: int = 32, heads: int = 4, layers: int = 2) -> dict[str, Any]:
        """Settings of a model of a size, embeddings as wide as the layers."""
        if self.config is DistilBertConfig:
            return {"dim": hidden, "n_heads": heads, "n_layers": layers, "hidden_dim": 48}
        settings: dict[str, Any] = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "intermediate_size": 48,
        }
        return settings | dict.fromkeys(self.narrow, hidden)


_BERT = {"max_position_embeddings": HOLDS, "type_vocab_size": 2}
_ROBERTA = {"max_position_embeddings": HOLDS + 2, "type_vocab_size": 1, "pad_token_id": 1}

FAMILIES = {
    "electra": Family(ElectraForMaskedLM, ElectraConfig, bert_tokenizer, _BERT, {"embedding_size": 20}),
    "albert": Family(AlbertForMaskedLM, AlbertConfig, albert_tokenizer, _BERT, {"embedding_size": 20}),
    "rembert": Family(
        RemBertForMaskedLM,
        RemBertConfig,
        bert_tokenizer,
        _BERT,
        {"input_embedding_size": 20, "output_embedding_size": 52},
    ),
    "distilbert": Family(
        DistilBertForMaskedLM,
        DistilBertConfig,
        bert_tokenizer,
        {"max_position_embeddings": HOLDS},
        {},
        activation="activation",
        epsilon=None,
    ),
    "ernie": Family(ErnieForMaskedLM, ErnieConfig, bert_tokenizer, _BERT, {}),
    "camembert": Family(
        CamembertForMaskedLM,
        CamembertConfig,
        camembert_tokenizer,
        {**_ROBERTA, "bos_token_id": 5, "eos_token_id": 6},
        {},
    ),
    "data2vec-text": Family(Data2VecTextForMaskedLM, Data2VecTextConfig, roberta_tokenizer, _ROBERTA, {}),
    "deberta": Family(  # no distance here is longer than trained; those are for test_deberta.py
        DebertaForMaskedLM,
        DebertaConfig,
        deberta_v1_tokenizer,
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": True},
        {"embedding_size": 20},
    ),
    "mpnet": Family(
        MPNetForMaskedLM,
        MPNetConfig,
        roberta_tokenizer,
        {"max_position_embeddings": HOLDS + 2, "pad_token_id": 1},
        {},
    ),
    "esm": Family(
        EsmForMaskedLM,
        EsmConfig,
        bert_tokenizer,
        {
            "max_position_embeddings": HOLDS,
            "position_embedding_type": "rotary",
            "token_dropout": True,
            "emb_layer_norm_before": False,
            "pad_token_id": 0,
            "mask_token_id": 4,
        },
        {},
        activation=None,
        holds=None,
    ),
    "modernbert": Family(
        ModernBertForMaskedLM,
        ModernBertConfig,
        bert_tokenizer,
        {
            "max_position_embeddings": HOLDS,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "cls_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
        },
        {},
        activation="classifier_activation",
        epsilon="norm_eps",
        holds=None,
    ),
}
