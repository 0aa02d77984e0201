"""The page of ``--html`` in a headless Chromium: its colours pixel by pixel, its keys, and that nothing is loaded."""

from __future__ import annotations

import io
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import INJECTION, RANKINGS, SCORES, excerpt_of, heading_of, scored

from mlmfast import html
from mlmfast.colours import DARK, LIGHT, luminance, scale, step_of

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright to drive a browser: pip install playwright"
)
image = pytest.importorskip("PIL.Image", reason="no Pillow to read screenshots: pip install pillow")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium on the path: apt install chromium", allow_module_level=True)

# Each token's boxes, several where it is broken over lines, with its log-probability, in the page's order.
BOXES = """() => [...document.querySelectorAll("[data-l]")].map((token) => ({
    logprob: Number(token.dataset.l),
    boxes: [...token.getClientRects()].map((box) => [box.left, box.top + scrollY, box.right, box.bottom + scrollY]),
}))"""
FIRSTS = "() => [...document.querySelectorAll('tbody tr:not([hidden])')].map((row) => row.cells[0].textContent)"
ACTIVE = "() => document.activeElement.textContent"
IN_SIGHT = """() => {
  const { top, bottom } = document.activeElement.getBoundingClientRect();
  return top >= 0 && bottom <= innerHeight;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Root has no sandbox in a container; a profile of colours would change the pixels.
        arguments = ["--no-sandbox", "--force-color-profile=srgb"]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a page of scores, one of rankings, and one of nothing."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, records, kind in (("score", SCORES, "score"), ("rank", RANKINGS, "rank"), ("empty", [], "score")):
        path = folder / f"{name}.html"
        html.write_page(str(path), excerpt_of(records), heading_of(records, kind))
        found[name] = path.as_uri()
    return found


@pytest.fixture
def opened(browser: Any) -> Callable[..., Any]:
    """Opens an address and, at the end, expects that nothing was asked for, complained of or injected."""

    @contextmanager
    def page_of(address: str, **settings: Any) -> Iterator[Any]:
        context = browser.new_context(offline=True, **settings)
        context.set_default_timeout(5_000)
        page = context.new_page()
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(address)
        yield page
        assert asked == [address]
        assert said == []
        if settings.get("java_script_enabled", True):
            assert page.evaluate("window.injected") is None
        assert page.locator("script").count() == 1 and page.locator("img").count() == 0
        context.close()

    return page_of


def size(width: int) -> dict[str, Any]:
    return {"viewport": {"width": width, "height": 800}}


def backgrounds(page: Any) -> list[tuple[float, str]]:
    """Of a screenshot of the whole page: each token's log-probability and the colour that fills most of its box."""
    found = []
    picture = np.asarray(image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
    for token in page.evaluate(BOXES):
        colours: Counter[tuple[int, ...]] = Counter()
        for left, top, right, bottom in token["boxes"]:
            inside = picture[math.ceil(top) : math.floor(bottom), math.ceil(left) : math.floor(right)]
            assert inside.size, "a token lies outside of the page"
            colours.update(map(tuple, inside.reshape(-1, 3).tolist()))
        ((most, _),) = colours.most_common(1)
        found.append((token["logprob"], "#" + "".join(f"{channel:02x}" for channel in most)))
    return found


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["score", "rank"])
def test_the_screenshot_shows_surprisals(
    opened: Any, files: dict[str, str], name: str, scheme: str, width: int
) -> None:
    stops = scale(LIGHT if scheme == "light" else DARK)
    with opened(files[name], color_scheme=scheme, **size(width)) as page:
        found = backgrounds(page)
        assert len(found) == page.locator("[data-l]").count() >= 10
        assert [colour for _, colour in found] == [stops[step_of(logprob)][0] for logprob, _ in found]
        # And apart from our own scale: the more surprising, the further from the page's lightness.
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page_is_light = luminance("#" + "".join(f"{int(x):02x}" for x in re.findall(r"\d+", ground))) > 0.5
        assert page_is_light == (scheme == "light")
        ordered = [luminance(colour) for _, colour in sorted(found, reverse=True)]
        assert ordered == sorted(ordered, reverse=page_is_light)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_theme_can_be_switched(opened: Any, files: dict[str, str]) -> None:
    with opened(files["score"], color_scheme="light", **size(1280)) as page:
        page.get_by_role("button", name="Dark theme").click()
        assert {colour for _, colour in backgrounds(page)} <= {colour for colour, _ in scale(DARK)}
        page.get_by_role("button", name="Light theme").press("Enter")
        assert {colour for _, colour in backgrounds(page)} <= {colour for colour, _ in scale(LIGHT)}


def test_hover_shows_exact_values(opened: Any, files: dict[str, str]) -> None:
    with opened(files["score"], **size(1280)) as page:
        card = page.get_by_role("tooltip")
        assert card.count() == 0
        page.locator("[data-l]").nth(1).hover()
        shown = card.inner_text().split("\n")
        assert shown == [
            *("▁cat", "surprisal", "6.23711 nats", "8.998 bits", "log-probability", "-6.23711"),
            *("probability", "0.1955 %", "rank", "103", "token", "2 of 4"),
        ]
        page.locator("td.v").first.hover()
        assert card.inner_text().split("\n") == ["exactly", repr(SCORES[0]["pll"])]
        page.locator("h1").hover()
        assert card.count() == 0


def test_the_card_stays_in_sight(opened: Any, files: dict[str, str]) -> None:
    with opened(files["score"], viewport={"width": 400, "height": 500}) as page:
        for place in range(page.locator("[data-l]").count()):
            page.locator("[data-l]").nth(place).hover()
            box = page.get_by_role("tooltip").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 400
            assert box["y"] >= 0 and box["y"] + box["height"] <= 500


def test_everything_is_reached_by_keyboard(opened: Any, files: dict[str, str]) -> None:
    with opened(files["score"], **size(1280)) as page:
        stops = []
        for _ in range(30):
            page.keyboard.press("Tab")
            stops.append(page.evaluate("document.activeElement.tagName"))
            if page.evaluate("document.activeElement.closest('tbody') !== null"):
                break
        assert stops == ["SUMMARY", "INPUT", "INPUT", "BUTTON", *["BUTTON"] * 5, "SPAN"]
        card = page.get_by_role("tooltip")
        assert page.evaluate(ACTIVE) == "▁The" and "0.046118654 nats" in card.inner_text()
        assert page.locator(":focus").get_attribute("aria-describedby") == "card"
        for key, focused in [
            ("ArrowLeft", "▁The"),
            ("ArrowRight", "▁cat"),
            ("End", "4"),
            ("Home", "▁The"),
            ("ArrowRight", "▁cat"),
            ("ArrowDown", "rehens"),  # over the row with an error
            ("ArrowDown", "▁עולם"),
            ("ArrowRight", "▁שלום"),  # that line runs from right to left
            ("ArrowUp", "▁incomp"),
            ("Control+End", "1"),
            ("Control+Home", "▁The"),
            ("PageDown", "▁tea"),
            ("PageUp", "▁The"),
        ]:
            page.keyboard.press(key)
            assert page.evaluate(ACTIVE) == focused, key
        assert page.locator("tbody [tabindex]").count() == 1
        page.keyboard.press("Escape")
        assert card.count() == 0
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !document.activeElement.closest('tbody')")


def test_options_are_reached_by_keyboard(opened: Any, files: dict[str, str]) -> None:
    with opened(files["rank"], **size(1280)) as page:
        page.locator("[data-l]").first.click()
        assert page.evaluate(ACTIVE) == "▁tea"
        page.keyboard.press("ArrowDown")
        assert page.evaluate(ACTIVE) == "▁coffee"
        page.keyboard.press("Home")
        assert "-2.25" in page.get_by_role("tooltip").inner_text()


def test_columns_sort_by_mouse_and_by_keyboard(opened: Any, files: dict[str, str]) -> None:
    scored = [i for i, record in enumerate(SCORES) if "error" not in record]
    failed = [str(i + 1) for i, record in enumerate(SCORES) if "error" in record]

    def expected(key: Callable[[dict[str, Any]], float], reverse: bool = False) -> list[str]:
        order = sorted(scored, key=lambda i: -key(SCORES[i]) if reverse else key(SCORES[i]))
        return [*(str(i + 1) for i in order), *failed]

    def mean(record: dict[str, Any]) -> float:
        return float(record["pll"] / len(record["tokens"]))

    with opened(files["score"], **size(1280)) as page:
        assert page.evaluate(FIRSTS) == [str(i + 1) for i in range(len(SCORES))]
        heads = page.get_by_role("columnheader")
        assert heads.first.get_attribute("aria-sort") == "ascending"
        button = page.get_by_role("button", name="PLL", exact=True)
        button.click()
        assert page.evaluate(FIRSTS) == expected(lambda record: record["pll"])
        assert [one.get_attribute("aria-sort") for one in heads.all()] == [None, None, "ascending", None, None, None]
        button.press("Enter")
        assert page.evaluate(FIRSTS) == expected(lambda record: record["pll"], reverse=True)
        assert heads.nth(2).get_attribute("aria-sort") == "descending"
        for name, key, reverse in (
            ("Per token", mean, False),
            ("Perplexity", lambda record: record["perplexity"], True),
            ("Length", lambda record: len(record["tokens"]), True),
        ):
            page.get_by_role("button", name=name).press("Space")
            assert page.evaluate(FIRSTS) == expected(key, reverse), name
        page.get_by_role("button", name="#").click()
        assert page.evaluate(FIRSTS) == [str(i + 1) for i in range(len(SCORES))]


def test_rows_are_filtered_by_their_texts(opened: Any, files: dict[str, str]) -> None:
    with opened(files["score"], **size(1280)) as page:
        search = page.get_by_role("searchbox", name="Filter")
        search.fill("THE CAT")
        assert page.evaluate(FIRSTS) == ["1"] and page.locator("output").inner_text() == "1 of 13 rows"
        search.fill("<script>")
        assert page.evaluate(FIRSTS) == ["6", "7"]
        search.press("Tab")
        search.fill("")
        assert page.locator("output").inner_text() == "13 rows"
        assert not page.get_by_text("incomprehensible theorem").is_visible()
        page.get_by_role("checkbox", name="Texts as given").check()
        assert page.get_by_text("incomprehensible theorem").is_visible()
        page.locator("summary").click()
        assert page.get_by_text(f"/folder/{INJECTION}").is_visible()


def test_it_is_read_without_its_script(opened: Any, files: dict[str, str]) -> None:
    for name, records in (("score", SCORES), ("rank", RANKINGS)):
        with opened(files[name], java_script_enabled=False, **size(400)) as page:
            for record in records:
                for text in (record.get("text"), record.get("prompt"), record.get("error")):
                    if text and not html.UNSEEN.search(text) and len(text) < 1000:
                        assert page.get_by_text(text.strip(), exact=text == record.get("text")).first.is_visible(), text
            assert not page.locator(".controls").is_visible() and not page.locator("#card").is_visible()
            picture = np.asarray(image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
            assert picture.shape[1] == 400


def test_right_to_left_stays_in_its_row(opened: Any, files: dict[str, str]) -> None:
    with opened(files["score"], **size(1280)) as page:
        boxes = [page.locator("[data-l]").get_by_text(text).bounding_box() for text in ("שלום", "עולם")]
        assert boxes[0]["x"] > boxes[1]["x"]
        edges = page.evaluate(
            "() => [...document.querySelectorAll('td:nth-child(3)')].map((cell) => cell.getBoundingClientRect().right)"
        )
        assert len(set(edges)) == 1 and len(edges) == len(SCORES) - 2


def test_a_token_does_not_turn_its_neighbours_around(opened: Any, tmp_path: Path) -> None:
    records = [scored("▁two ▁שלום ▁עולם ▁\u202eabc ▁words", [-1.0, -2.0, -3.0, -4.0, -5.0])]
    html.write_page(str(tmp_path / "mixed.html"), excerpt_of(records), heading_of(records))
    with opened((tmp_path / "mixed.html").as_uri(), **size(1280)) as page:
        lefts = [left for token in page.evaluate(BOXES) for left, *_ in token["boxes"]]
        assert len(lefts) == 5 and lefts == sorted(lefts)  # each in one piece


def test_the_policy_stops_what_escaping_would_have_missed(browser: Any, files: dict[str, str]) -> None:
    page = browser.new_page()
    page.goto(files["score"])
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.injected = 1";
            document.body.append(script);
            const button = document.createElement("button");
            button.setAttribute("onclick", "window.injected = 2");
            document.body.append(button);
            button.click();
        }"""
    )
    assert page.evaluate("window.injected") is None
    assert page.evaluate("() => fetch('data:,').then(() => false, () => true)")
    page.close()


def test_a_page_of_no_rows(opened: Any, files: dict[str, str]) -> None:
    with opened(files["empty"], **size(400)) as page:
        page.get_by_role("button", name="PLL", exact=True).click()
        assert page.locator("output").inner_text() == "0 rows"


def test_a_page_of_many_tokens_is_laid_out_where_it_is_looked_at(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "MANY", 10)
    records = [record for _ in range(40) for record in SCORES]
    html.write_page(str(tmp_path / "many.html"), excerpt_of(records), heading_of(records))
    with opened((tmp_path / "many.html").as_uri(), **size(400)) as page:
        page.locator("[data-l]").first.click()
        page.keyboard.press("Control+End")
        assert page.evaluate(ACTIVE) == "1" and "exactly" in page.get_by_role("tooltip").inner_text()
        page.keyboard.press("Home")
        assert page.evaluate(ACTIVE) == "▁tea"
        page.wait_for_function(IN_SIGHT)  # some frames later: the rows around are laid out then
        box = page.locator(":focus").bounding_box()
        assert 0 <= box["y"] <= 800 - box["height"]
        page.keyboard.press("Escape")  # the card throws a shadow
        shown = image.open(io.BytesIO(page.screenshot())).convert("RGB")
        corner = (round(box["x"] + box["width"] / 2), round(box["y"]) + 2)  # above the letters
        assert shown.getpixel(corner) == tuple(bytes.fromhex(scale(LIGHT)[step_of(-0.1)][0][1:]))
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
