"""The page of ``--html``: what stands in it, how it is escaped, which rows it shows. Nothing here needs a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoints import sentences
from pages import INJECTION, RANKINGS, SCORES, excerpt_of, heading_of, logprobs_in, scored
from typer.testing import CliRunner, Result

import mlmfast
from mlmfast import cli, html
from mlmfast.colours import DARK, LIGHT, STEPS, contrast, luminance, scale, step_of


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the cells of the table's body."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self.content: dict[str, str] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("style", "script") else self._inside
        if tag == "tbody":
            self.rows = []
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag in ("style", "script", "tbody") else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.content[self._inside] = self.content.get(self._inside, "") + data
        elif self.rows:
            self.rows[-1] += data


def invoke(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=text)


# ---- colours


@pytest.mark.parametrize("stops", [LIGHT, DARK])
def test_text_is_readable_on_every_colour_and_lightness_alone_tells_them_apart(stops: tuple[str, ...]) -> None:
    pairs = scale(stops)
    assert len(pairs) == STEPS
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    lightness = [116 * max(luminance(colour), 0.0089) ** (1 / 3) - 16 for colour, _ in pairs]  # CIE L*, 0 to 100
    assert lightness == sorted(lightness, reverse=stops is LIGHT)
    assert min(abs(a - b) for a, b in pairwise(lightness)) > 1


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # WebAIM's example of what just fails
    assert luminance("#ff0000") == pytest.approx(0.2126)


def test_the_interface_itself_is_readable_in_both_themes() -> None:
    template = Path(html.__file__).with_name("report.html").read_text(encoding="utf-8")
    variables = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", template))
    for name in ("ink", "quiet", "accent", "wrong"):
        for ground in ("page", "raised"):
            for text, back in zip(variables[name].split(", "), variables[ground].split(", ")):
                assert contrast(text, back) >= 4.5, (name, ground)


def test_a_step_is_half_a_nat() -> None:
    assert [step_of(x) for x in (0.0, 1e-7, -0.49, -0.5, -1.0, -11.99, -12.0, -99.0)] == [0, 0, 0, 1, 2, 23, 24, 24]


# ---- the page


def test_nothing_is_loaded_and_only_what_the_policy_names_may_run() -> None:
    page = html.page(excerpt_of(SCORES), heading_of(SCORES))
    found = Elements(page)
    assert {tag for tag, _ in found.tags} & {"img", "link", "iframe", "object", "base", "form", "svg"} == set()
    assert [tag for tag, _ in found.tags].count("script") == 1
    for _, attributes in found.tags:
        assert not {"src", "href", "style", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    (policy,) = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.content[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not re.search(r"url\(|@import|https?:", found.content["style"] + found.content["script"])
    assert found.tags[0] == ("html", {"lang": "en"}) and ("meta", {"charset": "utf-8"}) in found.tags


@pytest.mark.parametrize(("records", "kind"), [(SCORES, "score"), (RANKINGS, "rank")])
def test_texts_stay_texts(records: list[dict[str, Any]], kind: str) -> None:
    page = html.page(excerpt_of(records), heading_of(records, kind))
    page.encode()  # half a pair would fail
    assert not html.UNSEEN.search(page)
    found = Elements(page)
    allowed = {"tr", "td", "p", "span", "i", "ol", "li", "strong"}
    start = next(place for place, (tag, _) in enumerate(found.tags) if tag == "tbody")
    body = [tag for tag, _ in found.tags[start + 1 :] if tag not in ("div", "dl", "script")]
    assert set(body) - {"strong"} <= allowed
    assert body.count("tr") == len(records)
    assert any(INJECTION in row for row in found.rows)
    assert any("{{rows}} {{policy}}" in row for row in found.rows)
    text = " ".join(found.rows)
    assert all(
        shown in text for shown in ("aU+0000b", "U+202E", "U+2066", "half U+D83D of", "\U0001f469\u200d\U0001f4bb")
    )


def test_every_token_is_there_with_its_exact_value() -> None:
    page = html.page(excerpt_of(SCORES), heading_of(SCORES))
    assert logprobs_in(page) == [x for record in SCORES for x in record.get("logprobs", [])]
    assert "<span class=c12 data-l=-6.23711 data-r=103><i>▁</i>cat</span>" in page
    assert (
        " <span class=c8 data-l=-4.046025><i>▁</i>incomp</span><span class=c2 data-l=-1.1775258>rehens</span>" in page
    )
    assert f"<td class=v data-v={SCORES[0]['pll']!r}>\u221211.76</td>" in page
    assert "Surprisal of each token" in page and "nats" in page
    assert page == html.page(excerpt_of(SCORES), heading_of(SCORES))


def test_rows_with_an_error_are_shown_and_cut() -> None:
    rows = Elements(html.page(excerpt_of(SCORES), heading_of(SCORES))).rows
    assert "Error: row 2 has 900 tokens; tiny holds 512" in rows[1]
    assert "… (4,500 characters)" in rows[1] and len(rows[1]) < 700
    assert rows[5].startswith("6") and "Error: row 6 is not JSON: </p>" in rows[5]


def test_a_perplexity_that_json_cannot_hold_is_infinite() -> None:
    record = scored("▁a", [-8.0]) | {"pll": -800.0, "perplexity": None}
    assert "data-v=Infinity>∞" in html.page(excerpt_of([record]), heading_of([record]))
    for perplexity, shown in ((999.95, "1000"), (266806.65, "266,807"), (1.5e9, "1.5e+09")):
        record["perplexity"] = perplexity
        assert f"data-v={perplexity!r}>{shown}<" in html.page(excerpt_of([record]), heading_of([record]))


def test_options_come_best_first() -> None:
    rows = Elements(html.page(excerpt_of(RANKINGS), heading_of(RANKINGS, "rank"))).rows
    assert re.findall("▁(\\w+)", rows[0]) == ["tea", "coffee", "chairs"]
    assert "67.9%" in rows[0] and "0.750" in rows[0]
    assert rows[3].count("–") == 1  # one option has no margin


@pytest.mark.parametrize(
    ("tokens", "gaps"),
    [
        (["▁a", "b", "▁", "c"], [True, False, True, False]),
        (["a", "Ġb", "c"], [False, True, False]),
        (["a", "##b", "c"], [True, False, True]),
        (["a", "b</w>", "c</w>"], [False, False, True]),
        (["M", "K", "T"], [True, True, True]),
    ],
)
def test_words_are_parted_as_the_tokenizer_marks_them(tokens: list[str], gaps: list[bool]) -> None:
    assert html.gaps_of([{"error": "no"}, {"tokens": tokens}])(tokens) == gaps
    assert html.gaps_of([{"scores": [{"tokens": tokens}]}])(tokens) == gaps


def test_a_page_holds_the_first_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(most: int, records: list[dict[str, Any]]) -> html.Excerpt:
        excerpt = html.Excerpt(most)
        for record in records:
            excerpt.take([record])
        return excerpt

    assert taken(2, SCORES).records == SCORES[:2]
    page = html.page(taken(2, SCORES), heading_of(SCORES, rows=120_000))
    assert "first 2 of 120,000 rows; 2 of all have an error" in page and "--html-rows" in page
    whole = html.page(taken(99, SCORES), heading_of(SCORES))
    assert f"<p>{len(SCORES)} rows, 2 with an error</p>" in whole and "--html-rows" not in whole
    monkeypatch.setattr(html, "TOKENS", 8)
    assert taken(99, SCORES).records == SCORES[:2]  # not the third, and none after it
    assert "never more than 8 tokens" in html.page(taken(99, SCORES), heading_of(SCORES))
    monkeypatch.setattr(html, "TOKENS", 1)
    assert taken(99, SCORES).records == SCORES[:1]
    assert len(taken(99, RANKINGS).records) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "page.txt"], "name ends in .html"),
        (["--html", "-"], "name ends in .html"),
        (["--html", "in.html"], "is the input or the output"),
        (["--html", "./out.html", "--output", "out.html"], "is the input or the output"),
        (["--html", "absent/page.html"], "there is no folder absent"),
        (["--html", "folder.html"], "is a folder"),
        (["--html", "page.html", "--html-rows", "0"], "at least one row"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.html").write_text("The cat.\n")
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(mlmfast, "load", None)
    result = invoke("score", "in.html", *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().split("\n")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "in.html"]
    if "--output" not in arguments:
        (tmp_path / "in.html").write_text('{"prompt": "a", "options": [" b"]}\n')
        result = invoke("rank", "--file", "in.html", *arguments)
        assert result.exit_code == 2 and message in result.stderr


# ---- the commands


@pytest.fixture
def model(bert_folder: Path) -> str:
    return str(bert_folder)


def test_a_page_of_what_was_scored(model: str, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    result = invoke("score", "--model", model, "--html", str(target), text="The cat follows no dogs.\n\nThe cat.\n")
    assert result.exit_code == 1
    page = target.read_text(encoding="utf-8")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert logprobs_in(page) == records[0]["logprobs"] + records[2]["logprobs"]
    assert "<title>Scores of standard input</title>" in page and "<dt>Metric<dd>original<" in page
    assert f"<dt>Model<dd>{model}<" in page and f"<dt>mlmfast<dd>{mlmfast.__version__}<" in page
    assert result.stderr.endswith(f"mlmfast: {target}: 3 rows, 1 with an error\n")
    quiet = invoke("score", "--model", model, "--html", str(target), "--quiet", text="The cat.\n")
    assert quiet.stderr == ""
    approximate = invoke("score", "--model", model, "--html", str(target), "--metric", "strided", text="The cat.\n")
    assert approximate.exit_code == 0 and "strided, 8 copies a text (approximate)" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.gz", "out/"])
def test_rows_of_an_earlier_run_are_on_the_page_too(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("\n".join(sentences(40)))
    command = ["score", "in.txt", "--model", model, "--output", output, "--shard-rows", "12"]
    score, calls = mlmfast.model.MaskedLM.score, []

    def interrupted(self: Any, texts: list[str], **options: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, texts, **options)

    monkeypatch.setattr("mlmfast.corpus.WINDOW_ROWS", 8)
    monkeypatch.setattr("mlmfast.model.MaskedLM.score", interrupted)
    assert invoke(*command, "--html", "page.html").exit_code == 130
    assert not Path("page.html").exists()
    again = invoke(*command, "--html", "page.html", "--html-rows", "30")  # asking for a page is no other request
    assert again.exit_code == 0 and "of them by an earlier run" in again.stderr
    assert again.stderr.endswith("mlmfast: page.html: first 30 of 40 rows; 0 of all have an error\n")
    streamed = invoke("score", "in.txt", "--model", model, "--html", "streamed.html", "--html-rows", "30")
    records = [json.loads(line) for line in streamed.stdout.splitlines()]
    expected = [x for record in records[:30] for x in record["logprobs"]]
    assert logprobs_in(Path("page.html").read_text(encoding="utf-8")) == pytest.approx(expected, rel=1e-5)
    assert logprobs_in(Path("streamed.html").read_text(encoding="utf-8")) == expected


def test_a_page_of_a_ranking(model: str, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    options = [" the dogs.", " no cat."]
    arguments = ["--model", model, "--normalize", "tokens", "--html", str(target)]
    result = invoke("rank", "The cat follows", *options, *arguments)
    assert result.exit_code == 0 and result.stderr == f"mlmfast: {target}: 1 rows, 0 with an error\n"
    ranking = mlmfast.load(model).rank("The cat follows", options, normalize="tokens")
    page = target.read_text(encoding="utf-8")
    expected = [x for place in ranking.order for x in ranking.scores[place].logprobs]
    assert logprobs_in(page) == pytest.approx(expected, rel=1e-5)
    assert "window, 3 positions" in page and "<dt>Normalize<dd>tokens<" in page
    (record,) = (json.loads(line) for line in result.stdout.splitlines())
    assert list(record) == ["prompt", "options", "values", "probabilities", "best", "order", "cache"]
    file = tmp_path / "questions.jsonl"
    lines = [json.dumps({"prompt": "The cat", "options": [" <b>&amp;", " dogs"]}), "{", ""]
    file.write_text("\n".join(lines))
    result = invoke("rank", "--file", str(file), *arguments)
    assert result.exit_code == 1 and "2 rows, 1 with an error" in result.stderr
    assert len(Elements(target.read_text(encoding="utf-8")).rows) == 2
    file.write_text("")
    assert invoke("rank", "--file", str(file), *arguments).exit_code == 0
    assert "Prompt; options" in target.read_text(encoding="utf-8")
