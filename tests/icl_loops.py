"""What the in-context tasks are compared with: prompts and scores written from the paper's convention, row by row.

Nothing here imports mlmfast. A ranking task is a function from a raw row to its candidates, each the prompt's whole
text, how many of its last words are scored, and what is subtracted; a separator is a backslash, an n and a space.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from truth import Forward

BR = "\\n "
Row = dict[str, Any]


@dataclass
class Candidate:
    text: str
    words: int
    subtract: tuple[str, int] | None = None


def n(text: str) -> int:
    return len(text.split())


def truth_of(value: Any, *words: str) -> int:
    """A label's number: given as such, or as one of the words for 0 and 1 (and 2)."""
    if isinstance(value, (str, bool)):
        known = [one.split("/") for one in words]
        return next(i for i, names in enumerate(known) if str(value) in names)
    return int(value)


def rte(r: Row) -> tuple[list[Candidate], int]:
    found = []
    for a in ("True", "False"):
        text = f"{r['premise']}{BR}question: {r['hypothesis']} True or False?{BR}answer: {a}"
        found.append(Candidate(text, n(a) + n(r["premise"]) + n(r["hypothesis"]) + 3))
    return found, truth_of(r["label"], "True/entailment", "False/not_entailment")


def boolq(r: Row) -> tuple[list[Candidate], int]:
    question = r["question"].removesuffix("?")
    found = []
    for a in ("no", "yes"):
        found.append(Candidate(f"{r['passage']}{BR}question: {question}?{BR}answer: {a}", 1 + n(question)))
    return found, truth_of(r["label"], "no/False", "yes/True")


def cb(r: Row) -> tuple[list[Candidate], int]:
    found = []
    for a in ("true", "false", "neither"):
        text = f"{r['premise']}{BR}question: {r['hypothesis']}; true, false, or neither?{BR}answer: {a}"
        found.append(Candidate(text, n(a) + n(r["premise"]) + n(r["hypothesis"]) + 4))
    return found, truth_of(r["label"], "entailment/true", "contradiction/false", "neutral/neither")


def copa(r: Row) -> tuple[list[Candidate], int]:
    link = {"cause": "because", "effect": "therefore"}[r["question"]]
    found = []
    for a in (r["choice1"], r["choice2"]):
        a = a[0].lower() + a[1:]
        found.append(Candidate(f"{r['premise'][:-1]} {link} {a}", n(a) + n(r["premise"]) + 1))
    return found, truth_of(r["label"], "choice1", "choice2")


def multirc(r: Row) -> tuple[list[Candidate], int]:
    found = []
    for a in (f"[False] {r['answer']}", f"[True] {r['answer']}"):
        text = f"{r['paragraph']}{BR}{BR}{r['question']}{BR}- {a}"
        found.append(Candidate(text, n(a) + n(r["question"]) + 1))
    return found, truth_of(r["label"], "False", "True")


def record(r: Row) -> tuple[list[Candidate], int]:
    passage = r["passage"].replace("\n@highlight\n", f"{BR}- ")
    names = [name for i, name in enumerate(r["entities"]) if name not in r["entities"][:i]]
    found = []
    for name in names:
        sentence = r["query"].replace("@placeholder", name)
        found.append(Candidate(f"{passage}{BR}- {sentence}", n(sentence)))
    return found, min(names.index(answer) for answer in r["answers"] if answer in names)


def wic(r: Row) -> tuple[list[Candidate], int]:
    found = []
    for a in ("no", "yes"):
        text = f"{r['sentence1']}{BR}{r['sentence2']}{BR}question: Is the word '{r['word']}' used in the same way in "
        text += f"the two sentences above?{BR}answer: {a}"
        found.append(Candidate(text, n(a) + n(r["sentence1"]) + n(r["sentence2"]) + n(r["word"]) + 12))
    return found, truth_of(r["label"], "no/False", "yes/True")


def wsc(r: Row) -> tuple[list[Candidate], int]:
    pronoun, words = r["span2_text"], r["text"].split(" ")
    words[r["span2_index"]] = f"*{pronoun}*"
    asked = f"Question: In the passage above, what does the pronoun '*{pronoun}*' refer to?"
    phrases = [phrase for phrase in r.get("candidates", []) if phrase.lower() != r["span1_text"].lower()]
    place = [phrase.lower() for phrase in [*r.get("candidates", []), r["span1_text"]]].index(r["span1_text"].lower())
    phrases.insert(place, r["span1_text"])
    found = [Candidate(f"Passage: {' '.join(words)}{BR}{asked}{BR}answer: {a}", n(a) + 7) for a in phrases]
    return found, place


def hellaswag(r: Row) -> tuple[list[Candidate], int]:
    start = " ".join(part for part in (f"{r['activity_label']}: {r['ctx_a']}", r["ctx_b"]) if part)
    words = n(r["ctx_a"]) + n(r["ctx_b"])
    return [Candidate(f"{start} {a}", n(a) + words) for a in r["endings"]], int(r["label"])


def storycloze(r: Row) -> tuple[list[Candidate], int]:
    s1, s2, s3, s4 = (r[f"input_sentence_{i}"] for i in (1, 2, 3, 4))
    found = [
        Candidate(f"{s1} {s2} {s3} {s4} {a}", n(a) + n(s4) + n(s3)) for a in (r["sentence_quiz1"], r["sentence_quiz2"])
    ]
    return found, int(r["answer_right_ending"]) - 1


def winograd(r: Row) -> tuple[list[Candidate], int]:
    start, end = r["pronoun_loc"], r["pronoun_loc"] + len(r["pronoun"])
    found = []
    for option in r["options"]:
        option = option.replace("The ", "the ") + ("'s" if r["pronoun"] == "his" else "")
        whole = r["text"][:start] + option + r["text"][end:]
        found.append(Candidate(whole, n(whole)))
    return found, r["label"]


def winogrande(r: Row) -> tuple[list[Candidate], int]:
    wholes = [r["sentence"].replace("_", option) for option in (r["option1"], r["option2"])]
    return [Candidate(whole, n(whole)) for whole in wholes], int(r["answer"]) - 1


def piqa(r: Row) -> tuple[list[Candidate], int]:
    return [Candidate(f"{r['goal']} {a}", n(a) + n(r["goal"])) for a in (r["sol1"], r["sol2"])], r["label"]


def arc(r: Row) -> tuple[list[Candidate], int]:
    found = []
    for a in r["choices"]["text"]:
        text = f"Question: {r['question']}{BR}Answer: {a}"
        found.append(Candidate(text, n(a) + n(r["question"]) + 1, (f"Answer: {a}", n(a))))
    return found, r["choices"]["label"].index(r["answerKey"])


def openbookqa(r: Row) -> tuple[list[Candidate], int]:
    found = []
    for a in r["choices"]["text"]:
        a = a.rstrip(".") + "."
        found.append(Candidate(f"{r['question_stem']} {a}", n(a) + n(r["question_stem"]), (a, len(a))))
    return found, r["choices"]["label"].index(r["answerKey"])


RANKING = {
    "rte": rte,
    "boolq": boolq,
    "cb": cb,
    "copa": copa,
    "multirc": multirc,
    "record": record,
    "wic": wic,
    "wsc": wsc,
    "hellaswag": hellaswag,
    "storycloze": storycloze,
    "winograd": winograd,
    "winogrande": winogrande,
    "piqa": piqa,
    "arc_easy": arc,
    "arc_challenge": arc,
    "openbookqa": openbookqa,
}
PREFIXES = {
    "wsc": f"Final Exam with Answer Key{BR}Instructions: Please carefully read the following passages. For each "
    "passage, you must identify which noun the pronoun marked in *bold* refers to." + f"{BR}====={BR}",
    "multirc": f"READING COMPREHENSION ANSWER KEY{BR}{BR}{BR}",
}
ONE_SEPARATOR = ("winograd", "winogrande", "piqa", "openbookqa")


def before(name: str, solved: list[str]) -> str:
    """The task's heading and the demonstrations."""
    join = BR if name in ONE_SEPARATOR else BR + BR
    return PREFIXES.get(name, "") + "".join(one + join for one in solved)


def score(forward: Forward, tokenizer: PreTrainedTokenizerBase, text: str, words: int) -> float:
    """The released code's ``score``: three masks a copy, of the last words' tokens one after the other."""
    encoding = tokenizer(text, add_special_tokens=False)
    ids = [tokenizer.cls_token_id, *encoding["input_ids"], tokenizer.sep_token_id]
    word_ids = encoding.word_ids()
    last = max(word_ids) + 1
    total = 0.0
    for i, word in enumerate(word_ids, 1):
        if word < last - words:
            continue
        masked = list(ids)
        for j in range(i, min(i + 3, len(ids) - 1)):
            masked[j] = tokenizer.mask_token_id
        total += float(torch.log_softmax(forward(masked)[i].double(), dim=-1)[ids[i]])
    return total


def candidate_score(forward: Forward, tokenizer: PreTrainedTokenizerBase, context: str, one: Candidate) -> float:
    total = score(forward, tokenizer, context + one.text, one.words)
    return total - (score(forward, tokenizer, *one.subtract) if one.subtract else 0.0)


def squad(text: str) -> str:
    text = re.sub(r"[^\w\s]|_", "", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


NAMES = {
    "wmt14_fr_en": ("French", "English"),
    "wmt14_en_fr": ("Anglais", "Francais"),
    "wmt16_de_en": ("German", "English"),
    "wmt16_en_de": ("Englisch", "Deutsch"),
    "wmt16_ro_en": ("Romanian", "English"),
    "wmt16_en_ro": ("Engleza", "Romana"),
}


def question(name: str, r: Row) -> tuple[str, list[str]]:
    """A generation task's prompt and every answer that counts; the first one stands in a demonstration."""
    if name in NAMES:
        source, target = name.split("_")[1:]
        first, second = NAMES[name]
        return f"{first}: {r['translation'][source]}{BR}{second}:", [r["translation"][target]]
    prompt = f"Q: {r['question'].removesuffix('?')}?{BR}A:"
    if name == "triviaqa":
        return prompt, [r["answer"]["value"], *r["answer"]["aliases"]]
    return prompt, r["answer" if name == "nq" else "answers"]
