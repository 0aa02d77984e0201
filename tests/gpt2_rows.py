"""Rows of the GPT-2 paper's tasks, with the fields of the data sets they stand for. The sentences are made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import icl_rows

Row = dict[str, Any]

LAMBADA = [
    {"text": "Ada rowed to the harbour and back. When the wind rose she was glad to be out of the boat"},
    {"text": "Bruno kept a lark and an owl. The lark sang all day; at night he heard only the owl"},
    {"text": "The gardener had lost his hat. Mira found it in the pond, and he thanked Mira"},
]
STORY = [
    "`` Where is the kite ? '' said Mira .",
    "Ivo did n't know -LRB- he never did -RRB- .",
    "The baker 's boy , who was late , ran on .",
]
OPTIONS = ["kite", "boy", "baker", "wind", "door", "hat", "street", "bread", "owl", "rain"]
NAMES = ["Mira", "Ivo", "Ada", "Bruno", "Paul", "Oslo", "Nora", "Otto", "Rosa", "Anton"]
CBT_CN = [
    {"sentences": STORY, "question": "`` There is the XXXXX ! '' she cried .", "answer": "kite", "options": OPTIONS},
    {"sentences": STORY[:2], "question": "XXXXX blew , and they went home .", "answer": "wind", "options": OPTIONS},
]
CBT_NE = [
    {"sentences": STORY, "question": "Then XXXXX 's kite was found .", "answer": "Mira", "options": NAMES},
    {"sentences": STORY[1:], "question": "`` Ask XXXXX , '' he said .", "answer": "Bruno", "options": NAMES},
]
ARTICLE = (
    "The old lighthouse at Oslo was sold on Monday. Mr. Hall, who had kept it, was sad! "
    '"I will miss the light," he said. Nobody knows the price.\nThe harbour is to be closed in June.'
)
NEWS = [
    {"article": ARTICLE, "highlights": "The lighthouse at Oslo was sold.\nMr. Hall will miss the light."},
    {
        "article": "A lark sang in the rain. The owl slept. The gardener listened? The roses got water.",
        "highlights": "The gardener listened to a lark that sang in the rain.",
    },
]
PAIRS = [
    {"translation": {"en": one, "fr": other}}
    for one, other in [
        ("The cat sleeps.", "Le chat dort."),
        ("The boat is red. It is old.", "Le bateau est rouge. Il est vieux."),
        ("The harbour is closed.", "Le port est fermé."),
        ("A lark sings.", "Une alouette chante."),
        ("The gardener waters the roses.", "Le jardinier arrose les roses."),
        ("The owl slept until noon.", "Le hibou a dormi jusqu'à midi."),
        ("Ada sold her boat.", "Ada a vendu son bateau."),
    ]
]
WIKI = (
    ' = The Harbour = \n \n The harbour \'s keeper , Mr. Hall , said : " it is old @-@ fashioned " . \n'
    " It cost 1 @,@ 200 crowns ( in June ) . \n"
)
PTB = " the keeper of <unk> says it is n't old \n prices fell N % to $ N a share \n"

WINOGRAD = icl_rows.ROWS["winograd"][0]
ROWS: dict[str, tuple[list[Row], list[Row]]] = {
    "gpt2_lambada": (LAMBADA, []),
    "gpt2_lambada_filtered": (LAMBADA, []),
    "gpt2_cbt_cn": (CBT_CN, []),
    "gpt2_cbt_ne": (CBT_NE, []),
    "gpt2_wsc_full": (WINOGRAD, []),
    "gpt2_wsc_partial": (WINOGRAD, []),
    "gpt2_summary": (NEWS, []),
    "gpt2_summary_no_hint": (NEWS, []),
    "gpt2_translation_en_fr": (PAIRS[:2], PAIRS[2:]),
    "gpt2_translation_fr_en": (PAIRS[:2], PAIRS[2:]),
    "gpt2_questions": icl_rows.ROWS["nq"],
    "gpt2_wikitext2": ([{"page": WIKI}, {"page": " Owls sleep . \n"}], []),
    "gpt2_wikitext103": ([{"page": WIKI * 3}, {"page": " Larks sing . \n"}], []),
    "gpt2_ptb": ([{"text": PTB}, {"text": " no <unk> sings \n"}], []),
    "gpt2_1bw": ([{"text": '" Ada \'s boat is red , " Bruno said .'}, {"text": "It rained in Oslo ( again ) ."}], []),
    "gpt2_enwik8": ([{"text": "<page>\n  <title>Été &amp; owl</title>\n</page>"}, {"text": "[[lark]]s sing"}], []),
    "gpt2_text8": ([{"text": " the owl slept until noon in one nine two zero "}, {"text": " larks sing "}], []),
}
RANKING = ["gpt2_cbt_cn", "gpt2_cbt_ne", "gpt2_wsc_full", "gpt2_wsc_partial"]
SUMMARIES = ["gpt2_summary", "gpt2_summary_no_hint"]
TRANSLATIONS = ["gpt2_translation_en_fr", "gpt2_translation_fr_en"]
WORDS = ["gpt2_wikitext2", "gpt2_wikitext103", "gpt2_ptb", "gpt2_1bw"]


def write(folder: Path) -> Path:
    """Every task's files."""
    for name, (test, train) in ROWS.items():
        for suffix, some in (("", test), (".train", train)):
            if some:
                lines = "".join(json.dumps(row) + "\n" for row in some)
                (folder / f"{name}{suffix}.jsonl").write_text(lines, encoding="utf-8")
    return folder
