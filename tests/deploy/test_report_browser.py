"""The report page in a browser: what its script does, what it needs, and how long it takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from deploy.report_page.artifacts import gather
from deploy.report_page.layers import Layer, layers_of
from deploy.report_page.render import render

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the report in a browser: chromium is not installed (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render([gather(chain)]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def layers(chain: Path) -> tuple[Layer, ...]:
    return layers_of(gather(chain))


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Page]:
    """The page, open; errors and requests to other hosts fail the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("#layers.live")
    yield page
    context.close()
    assert problems == []


def shown(page: Page) -> list[str]:
    """The labels of the layers that are visible, from top to bottom."""
    rows = page.locator("#layers tr.layer:visible")
    return [str(rows.nth(index).get_attribute("data-label")) for index in range(rows.count())]


def test_blocks_are_folded_and_open(page: Page, layers: tuple[Layer, ...]) -> None:
    assert shown(page) == []
    block = page.locator("tr.block button").first
    assert block.get_attribute("aria-expanded") == "false"
    block.click()
    assert block.get_attribute("aria-expanded") == "true"
    assert shown(page) == [layer.label for layer in layers if layer.block == layers[0].block]
    page.click("#unfold")
    assert len(shown(page)) == len(layers)
    page.click("#unfold")
    assert shown(page) == []


def test_the_table_is_filtered_by_words_and_by_state(page: Page, layers: tuple[Layer, ...]) -> None:
    word = layers[-1].label
    page.fill("#search", word.upper())
    assert shown(page) == [layer.label for layer in layers if word in layer.label]
    assert page.inner_text("#count") == f"{len(shown(page))} of {len(layers)} layers"
    page.fill("#search", "nothing has this name")
    assert shown(page) == []
    page.fill("#search", "")
    for state in {layer.state for layer in layers}:
        page.select_option("#states", state)
        assert shown(page) == [layer.label for layer in layers if layer.state == state]


def test_the_table_is_sorted_and_finds_back(page: Page, layers: tuple[Layer, ...]) -> None:
    heading = page.locator("th[data-key=label]")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    labels = [layer.label for layer in layers]
    assert shown(page) == sorted(labels)
    assert page.locator("#unfold").is_disabled()
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert shown(page) == sorted(labels, reverse=True)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") is None
    page.click("#unfold")
    assert shown(page) == [
        layer.label for layer in sorted(layers, key=lambda one: [x.block for x in layers].index(one.block))
    ]


def test_a_layer_opens_to_what_is_known_about_it(page: Page, layers: tuple[Layer, ...]) -> None:
    chosen = next(layer for layer in layers if layer.reads)
    page.fill("#search", chosen.label)
    button = page.locator(f"tr.layer[data-label='{chosen.label}'] button")
    button.click()
    detail = page.locator("tr.detail")
    assert detail.count() == 1
    assert f"Q/DQ of {chosen.reads[0].tensor}" in detail.inner_text()
    assert f"scale {chosen.reads[0].scale:.4g}" in detail.inner_text()
    button.click()
    assert page.locator("tr.detail").count() == 0


def test_a_link_into_a_folded_block_opens_it(page: Page, path: Path) -> None:
    page.goto(f"{path.as_uri()}#l3")
    page.reload()
    assert page.locator("#l3").is_visible()
    assert page.locator("tr.detail").count() == 1
    page.goto(f"{path.as_uri()}#l4")  # by hand, on the open page
    assert page.locator("#l4").is_visible()


def test_on_paper_all_layers_are_there_and_it_is_light(page: Page, layers: tuple[Layer, ...]) -> None:
    page.click("#theme")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(shown(page)) == len(layers)
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#search").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert shown(page) == []


def test_light_and_dark(page: Page) -> None:
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert background() == "rgb(255, 255, 255)"
    page.click("#theme")
    assert background() == "rgb(22, 24, 28)"
    page.click("#theme")
    assert background() == "rgb(255, 255, 255)"


def test_it_fits_a_phone_and_can_be_used_by_keyboard(browser: Browser, path: Path, layers: tuple[Layer, ...]) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("tr.block button").first.focus()
    page.keyboard.press("Enter")
    assert shown(page)
    context.close()


def test_without_a_script_everything_is_there(browser: Browser, path: Path, layers: tuple[Layer, ...]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#layers tr.layer:visible").count() == len(layers)
    context.close()


def test_it_opens_and_filters_at_once(page: Page) -> None:
    opened = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert opened < 1000
    filtered = page.evaluate(
        """() => { const field = document.getElementById("search"), start = performance.now();
                   field.value = "conv"; field.dispatchEvent(new Event("input")); return performance.now() - start; }"""
    )
    assert filtered < 100
