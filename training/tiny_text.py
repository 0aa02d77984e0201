"""Text and tokenizer of the bundled tiny model: cleaning, sentences, WordNet's glosses, BPE."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path

PAD, CLS, SEP, UNK, MASK = range(5)
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
VOCAB = 8192


def clean(line: str, rng: random.Random) -> str:
    """One line of raw text made plain, or '' where it is no use."""
    s = re.sub(r"\s+", " ", line).strip()
    if "<unk>" in s or re.fullmatch(r"(= )+.*( =)+", s) or not re.search("[A-Za-z]", s):
        return ""
    s = re.sub(r" ?@([-,.])@ ?", r"\1", s)
    s = s.replace("``", '"').replace("''", '"').replace('""', '"').replace("\u2026", "...").replace("\u00a1\u00a6", "'")
    s = re.sub(r" ?([\u2019']) ?(s|t|re|ve|ll|d|m)\b(?!['\u2019])", r"\1\2", s)  # Antie ' s
    s = re.sub(r"\bn 't\b", "n't", s)
    if rng.random() < 0.8:  # some curly quotes stay, so that they are known characters
        s = s.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    s = re.sub(r"(?<=\w)- (?=[a-z])(?!(and|or|to)\b)", "-", s)  # employer- based
    s = re.sub(r"(?<=\w) - (?=\w)", "-", s) if re.search(r" - ", s) and " ," in s else s
    s = re.sub(r" ([,.;:!?%)\]])", r"\1", s)
    s = re.sub(r"([(\[$\u00a3]) ", r"\1", s)
    s = re.sub(r"(\d): (\d\d)\b", r"\1:\2", s)
    s = re.sub(r'" ([^"]*?) ?"(?=[\s,.;:!?)]|$)', r'"\1"', s)  # " quoted "
    s = re.sub(r"(^|\s)_([^_]+)_", r"\1\2", s)
    return s.lstrip("?,.;:!- ").strip()


ABBREV = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Mt|Jr|Sr|Rev|Gen|Col|Capt|Lt|Hon|Prof|Sen|No|vs|etc|e\.g|i\.e|[A-Z])\.$")


def sentences(par: str) -> list[str]:
    """A paragraph split into sentences."""
    out, start = [], 0
    for m in re.finditer(r"""[.!?]["'\u201d\u2019)]*\s+(?=["'\u201c\u2018(]*[A-Z0-9])""", par):
        piece = par[start : m.end()].strip()
        if not ABBREV.search(piece):
            out.append(piece)
            start = m.end()
    return out + [par[start:].strip()]


def wordnet(folder: str) -> tuple[list[str], list[str]]:
    """(examples, definitions) of WordNet's data files, as sentences."""
    examples, glosses = [], []
    for pos in "noun", "verb", "adj", "adv":
        for line in open(Path(folder) / f"data.{pos}", encoding="utf-8", errors="replace"):
            if line.startswith("  ") or "|" not in line:
                continue
            head, gloss = line.split("|", 1)
            f = head.split()
            lemmas = [re.sub(r"\(.*\)", "", w).replace("_", " ") for w in f[4 : 4 + 2 * int(f[3], 16) : 2]]
            for ex in re.findall(r'"([^"]+)"', gloss):
                ex = ex.strip(" ;,")
                if ex.count(" ") >= 2:
                    examples.append(ex[0].upper() + ex[1:] + ("" if ex[-1] in ".!?" else "."))
            text = re.split(r'[;:,]?\s*"', gloss)[0].strip(" ;:\n")
            if text.count(" ") >= 2:
                glosses.append(f"{random.Random(gloss).choice(lemmas)}: {text}.")
    return examples, glosses


def read_text(files: list[str], wordnet_dir: str | None, seed: int) -> dict[str, dict[str, list[str]]]:
    """{train, held} -> {sents, glosses, runs}; lines are held out in groups of twenty."""
    rng = random.Random(seed)
    data = {k: {"sents": [], "glosses": [], "runs": []} for k in ("train", "held")}
    for name in sorted(files):
        op = gzip.open if name.endswith(".gz") else open
        listed = "wikisplit" in name  # single sentences in no order: no running text
        part = "train"
        for i, line in enumerate(op(name, "rt", encoding="utf-8", errors="replace")):
            if i % 20 == 0:
                part = "held" if rng.random() < 0.01 else "train"
            s = clean(line, rng)
            if s:
                data[part]["sents"] += sentences(s)
                if not listed:
                    data[part]["runs"].append(s)
    if wordnet_dir:
        for kind, lines in zip(("sents", "glosses"), wordnet(wordnet_dir), strict=True):
            for s in lines:
                data["held" if rng.random() < 0.01 else "train"][kind].append(s)
    for d in data.values():
        d["sents"] = [s for s in d["sents"] if s.count(" ") >= 1]
    return data


def train_tokenizer(texts: Iterable[str], out: Path) -> None:
    """BPE over Metaspace words; punctuation and digits apart; bytes for unknown characters."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    def build(model):
        t = Tokenizer(model)
        t.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(left=False, right=True)]
        )
        t.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="first"),
                pre_tokenizers.Split(
                    Regex(r"(?<=\p{L})['\u2019]\p{L}+|\u2581?(?:--+|\.\.\.|[^\p{L}\p{M}\p{N}\u2581])"), "isolated"
                ),
                pre_tokenizers.Digits(individual_digits=True),
            ]
        )
        t.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return t

    t = build(models.BPE(unk_token="[UNK]"))
    t.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCAB - 256, special_tokens=SPECIALS, limit_alphabet=200, show_progress=False),
    )
    bpe = json.loads(t.to_str())["model"]
    pieces = sorted(bpe["vocab"], key=bpe["vocab"].get)
    pieces = pieces[:5] + [f"<0x{b:02X}>" for b in range(256)] + pieces[5:]
    t = build(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[tuple(m) for m in bpe["merges"]],
            unk_token="[UNK]",
            byte_fallback=True,
        )
    )
    t.add_special_tokens([AddedToken(s, special=True, normalized=False, lstrip=s == "[MASK]") for s in SPECIALS])
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    os.makedirs(out, exist_ok=True)
    mask = AddedToken("[MASK]", special=True, normalized=False, lstrip=True)
    PreTrainedTokenizerFast(
        tokenizer_object=t,
        model_max_length=512,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token=mask,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(out)
    cfg = Path(out) / "tokenizer_config.json"
    d = json.loads(cfg.read_text())
    d["tokenizer_class"] = "PreTrainedTokenizerFast"
    cfg.write_text(json.dumps(d, indent=2) + "\n")
