"""Rows of every in-context task, with the fields of the data sets they stand for. The sentences are made up here.

Each entry is ``(test rows, rows for demonstrations)``; Winograd's demonstrations come from its test rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows(fields: str, *values: tuple[Any, ...]) -> list[Row]:
    return [dict(zip(fields.split(), one)) for one in values]


RTE = "premise hypothesis label"
CB = "premise hypothesis label"
COPA = "premise choice1 choice2 question label"
BOOLQ = "passage question label"
MULTIRC = "paragraph question answer label"
RECORD = "passage query entities answers"
WIC = "sentence1 sentence2 word label"
WSC = "text span1_text span2_text span2_index label candidates"
HELLASWAG = "activity_label ctx_a ctx_b endings label"
STORY = (
    "input_sentence_1 input_sentence_2 input_sentence_3 input_sentence_4 sentence_quiz1 sentence_quiz2 "
    "answer_right_ending"
)
WINOGRAD = "text pronoun pronoun_loc options label"
WINOGRANDE = "sentence option1 option2 answer"
PIQA = "goal sol1 sol2 label"
ARC = "question choices answerKey"
OPENBOOK = "question_stem choices answerKey"


def lettered(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": list("ABCDE"[: len(texts)])}


def pronoun_at(text: str, pronoun: str) -> tuple[str, str, int]:
    return text, pronoun, text.index(f" {pronoun} ") + 1


HARBOUR = (
    "Ada rowed to the harbour. Bruno slept in the boat.\n@highlight\nTwo sailors were found\n@highlight\nAda was wet"
)
KITE = "Mira lost her kite near Oslo.\n@highlight\nIvo found the kite"
LARK = "The lark sang. The owl slept until noon."

ROWS: dict[str, tuple[list[Row], list[Row]]] = {
    "rte": (
        rows(
            RTE,
            ("The gardener watered the roses at noon.", "The roses got water.", "True"),
            ("No ship left the harbour today.", "A ship left the harbour.", 1),
            ("Every lamp in the tower is yellow.", "The tower has a lamp.", "entailment"),
        ),
        rows(
            RTE,
            ("The cat slept on the stairs.", "The stairs were empty.", "not_entailment"),
            ("Ada sold her boat to Bruno.", "Bruno bought a boat.", 0),
            ("The baker closed early.", "The bakery was open all night.", "False"),
        ),
    ),
    "boolq": (
        rows(
            BOOLQ,
            ("A lighthouse warns ships of rocks. Its lamp turns.", "does the lamp of a lighthouse turn", 1),
            ("Sparrows are small. They eat seeds.", "do sparrows eat fish?", False),
        ),
        rows(
            BOOLQ,
            ("Ink dries slowly in the cold.", "does ink dry fast in the cold", "no"),
            ("A kite needs wind.", "does a kite need wind", True),
            ("Bread is baked in the morning.", "is bread baked at night", 0),
        ),
    ),
    "cb": (
        rows(
            CB,
            ("A: I doubt that she came. B: So do I.", "she came", "contradiction"),
            ("He knew the lamp was lit.", "the lamp was lit", 0),
            ("Perhaps the boat will sink.", "the boat will sink", "neither"),
        ),
        rows(
            CB,
            ("They never said it rained.", "it rained", 2),
            ("She regrets that the cat left.", "the cat left", "entailment"),
            ("It is false that owls sing.", "owls sing", 1),
        ),
    ),
    "copa": (
        rows(
            COPA,
            ("The vase fell from the shelf.", "It broke.", "It was blue.", "effect", 0),
            ("Ada wore a coat.", "She sang.", "Snow was falling.", "cause", 1),
        ),
        rows(
            COPA,
            ("The dog barked all night.", "The stranger knocked.", "The moon is far.", "cause", 0),
            ("Bruno missed the ferry.", "He grew tall.", "He waited an hour.", "effect", 1),
            ("The soup was cold.", "Nobody ate it.", "Somebody cooked it.", "effect", "choice1"),
        ),
    ),
    "multirc": (
        rows(
            MULTIRC,
            (LARK, "Who slept until noon?", "The owl", 1),
            (LARK, "Who slept until noon?", "The lark", 0),
            (LARK, "Who sang?", "A lark", "True"),
        ),
        rows(
            MULTIRC,
            ("Mice like barley.", "What do mice like?", "Barley", 1),
            ("Rain fell on the market.", "Where did rain fall?", "On a hill", 0),
            ("The clock stopped.", "What stopped?", "The train", False),
        ),
    ),
    "record": (
        rows(
            RECORD,
            (HARBOUR, "@placeholder woke when the boat was found.", ["Ada", "Bruno", "Ada"], ["Bruno"]),
            (KITE, "The kite of @placeholder is back.", ["Mira", "Oslo", "Ivo"], ["Mira", "little Mira"]),
        ),
        rows(
            RECORD,
            ("Olga won.\n@highlight\nA race was run", "@placeholder was fast.", ["Olga", "Lima"], ["Olga"]),
            ("Snow fell on Bern.\n@highlight\nIt was cold", "It snowed in @placeholder.", ["Bern"], ["Bern"]),
            ("Paul met Rita.\n@highlight\nThey spoke", "Rita met @placeholder.", ["Rita", "Paul"], ["Paul"]),
        ),
    ),
    "wic": (
        rows(
            WIC,
            ("He sat on the bank of the river.", "The bank lent him money.", "bank", "False"),
            ("She rang the bell.", "The bell was loud.", "bell", 1),
        ),
        rows(
            WIC,
            ("The bark of the tree.", "The bark of a dog.", "bark", "no"),
            ("A cup of tea.", "The cup fell.", "cup", True),
            ("They play cards.", "They play a waltz.", "play", 0),
        ),
    ),
    "wsc": (
        rows(
            WSC,
            ("Ada thanked Rita because she had helped.", "Rita", "she", 4, 1, ["Ada", "rita"]),
            ("The cup hit the lamp and it broke.", "The cup", "it", 6, 0, ["The cup", "the lamp"]),
            ("Bruno saw the dog when he came home.", "Bruno", "he", 5, "True", ["the dog", "home"]),
        ),
        rows(
            "text span1_text span2_text span2_index label",
            ("The owl fed its young.", "The owl", "its", 3, 1),
            ("The boat left the pier; it was late.", "The boat", "it", 5, True),
            ("Ivo met Paul and he waved.", "Paul", "he", 4, 0),
        ),
    ),
    "hellaswag": (
        rows(
            HELLASWAG,
            ("Baking", "A man kneads dough.", "he", ["bakes it.", "swims off.", "reads a map."], "0"),
            ("Sailing", "Two girls raise a sail.", "", ["A bird sings.", "The wind takes them.", "It is red."], 1),
        ),
        rows(
            HELLASWAG,
            ("Painting", "She dips a brush.", "she", ["paints.", "sleeps."], "0"),
            ("Fishing", "He throws a line.", "the line", ["burns.", "sinks."], "1"),
            ("Knitting", "Wool lies here.", "", ["It rains.", "She takes it."], 1),
        ),
    ),
    "storycloze": (
        rows(
            STORY,
            ("Ada had a kite.", "She ran uphill.", "The wind rose.", "The kite flew.", "She was glad.", "It ate.", 1),
            ("Paul was ill.", "He lay in bed.", "Rita made tea.", "He drank it.", "He sold it.", "He got well.", "2"),
        ),
        rows(
            STORY,
            ("It rained.", "We stayed in.", "We played.", "It was fun.", "We wept.", "We laughed.", 2),
            ("A cup fell.", "It broke.", "Bruno swept.", "He bought one.", "He drank.", "He flew.", 1),
            ("The bus came.", "It was full.", "We walked.", "It was far.", "We got tired.", "We sang.", 1),
        ),
    ),
    "winograd": (
        rows(
            WINOGRAD,
            (*pronoun_at("The nurse thanked the cook when she had eaten.", "she"), ["The nurse", "The cook"], 0),
            (*pronoun_at("The nurse thanked the cook when she had served.", "she"), ["The nurse", "The cook"], 1),
            (*pronoun_at("Ivo lent Paul a coat but forgot his name.", "his"), ["Ivo", "Paul"], 1),
            (*pronoun_at("Ivo lent Paul a coat and missed his coat.", "his"), ["Ivo", "Paul"], 0),
            (*pronoun_at("The jar hit the plate and it broke.", "it"), ["The jar", "The plate"], 1),
        ),
        [],
    ),
    "winogrande": (
        rows(
            WINOGRANDE,
            ("The key did not fit the lock as the _ was bent.", "key", "lock", "1"),
            ("Ada asked Rita to sing but _ was hoarse.", "Ada", "Rita", 2),
        ),
        rows(
            WINOGRANDE,
            ("The bed was too big for the room as the _ was small.", "bed", "room", "2"),
            ("Paul fed Ivo soup since _ was hungry.", "Paul", "Ivo", "2"),
            ("The pen left ink on the page so the _ leaked.", "pen", "page", "1"),
        ),
    ),
    "piqa": (
        rows(
            PIQA,
            ("To dry a wet shoe,", "stuff it with paper.", "put it in water.", 0),
            ("How do I cool soup?", "Heat it more.", "Let it stand in the wind.", 1),
        ),
        rows(
            PIQA,
            ("To open a jar,", "twist the lid.", "sing to it.", 0),
            ("To warm hands,", "hold snow.", "wear gloves.", 1),
            ("To wake up,", "set a clock.", "hide the clock.", 0),
        ),
    ),
    "openbookqa": (
        rows(
            OPENBOOK,
            ("A plant grows toward", lettered("the light", "a stone", "the cold"), "A"),
            ("Ice melts when it is", lettered("sung to", "made warm."), "B"),
        ),
        rows(
            OPENBOOK,
            ("A magnet pulls", lettered("wool", "iron"), "B"),
            ("Rain comes from", lettered("clouds", "shoes"), "A"),
            ("At night one sees", lettered("stars", "noon"), "A"),
        ),
    ),
    "nq": (
        rows("question answer", ("who keeps the lamp", ["Ada", "the keeper Ada"]), ("where is the pier", ["Bern"])),
        rows(
            "question answer", ("who baked", ["Paul"]), ("when did it rain", ["noon", "at noon"]), ("who ran?", ["Ivo"])
        ),
    ),
    "triviaqa": (
        rows(
            "question answer",
            ("Which bird sings at dawn?", {"value": "The lark", "aliases": ["Lark", "A lark"]}),
            ("Who sold the boat?", {"value": "Ada", "aliases": ["Ada", "Miss Ada"]}),
        ),
        rows(
            "question answer",
            ("Who swept?", {"value": "Bruno", "aliases": ["Bruno"]}),
            ("What fell?", {"value": "Snow", "aliases": ["The snow"]}),
            ("Who met Rita?", {"value": "Paul", "aliases": ["Paul"]}),
        ),
    ),
    "webqs": (
        rows("question answers", ("what did rita make?", ["tea"]), ("what is yellow?", ["lamp", "the tower lamp"])),
        rows("question answers", ("who came?", ["Ivo"]), ("what broke?", ["a cup"]), ("who sang?", ["the lark"])),
    ),
}
ROWS["arc_easy"] = (
    rows(
        ARC,
        ("Which of these floats?", lettered("a cork", "a nail", "a stone"), "A"),
        ("What do roots take up?", {"text": ["light", "water"], "label": ["1", "2"]}, "2"),
    ),
    rows(
        ARC,
        ("What is hot?", lettered("fire", "snow"), "A"),
        ("Which one flies?", lettered("a fish", "an owl"), "B"),
        ("What is a metal?", lettered("iron", "wool"), "A"),
    ),
)
ROWS["arc_challenge"] = (ROWS["arc_easy"][0][::-1], ROWS["arc_easy"][1][::-1])

SENTENCES: list[Row] = [
    {"en": "The cat sleeps.", "de": "Die Katze ruht.", "fr": "Le chat dort.", "ro": "Pisica doarme."},
    {"en": "Ada sees a boat.", "de": "Ada sieht ein Boot.", "fr": "Ada voit un bateau.", "ro": "Ada vede o barca."},
    {"en": "It is warm.", "de": "Es ist warm.", "fr": "Il fait chaud.", "ro": "Este cald."},
    {"en": "We sing.", "de": "Wir singen.", "fr": "Nous chantons.", "ro": "Noi cantam."},
    {"en": "The door is red.", "de": "Das Tor ist rot.", "fr": "La porte est rouge.", "ro": "Usa este rosie."},
]
TRANSLATIONS = ["wmt14_fr_en", "wmt14_en_fr", "wmt16_de_en", "wmt16_en_de", "wmt16_ro_en", "wmt16_en_ro"]
for _name in TRANSLATIONS:
    _pair = _name.split("_")[1:]
    _rows = [{"translation": {language: row[language] for language in _pair}} for row in SENTENCES]
    ROWS[_name] = (_rows[:2], _rows[2:])

GENERATION = [*TRANSLATIONS, "nq", "triviaqa", "webqs"]
RANKING = [name for name in ROWS if name not in GENERATION]


def texts() -> list[str]:
    """Every string in every row, to train a tokenizer on."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            for one in value.values() if isinstance(value, dict) else value:
                walk(one)

    walk(ROWS)
    return found


def write(folder: Path) -> Path:
    """Every task's files as ``load(data=...)`` reads them."""
    for name, (test, train) in ROWS.items():
        for suffix, some in (("", test), (".train", train)):
            if some:
                lines = "".join(json.dumps(row) + "\n" for row in some)
                (folder / f"{name}{suffix}.jsonl").write_text(lines, encoding="utf-8")
    return folder
