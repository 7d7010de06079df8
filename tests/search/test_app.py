"""The page in a real browser: one journey per tab, looking at what is on the page.

The browser is Chromium, found by OPENCLOC_CHROMIUM or on the PATH.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.search.conftest import photo

CHROMIUM = os.environ.get("OPENCLOC_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_MS = 120_000  # on a machine that is busy; nothing depends on it where it isn't

pytest.importorskip("gradio", reason="needs the extra `app`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (`pip install 'opencloc[dev]'`)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it, or name it by OPENCLOC_CHROMIUM")


@pytest.fixture(scope="module")
def address(index: str) -> Iterator[str]:
    """The address of `opencloc app`, run as a user does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "opencloc", "app", index, "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A visitor's page, which must ask no other machine for anything."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("tab", name="Regions").wait_for()
    yield page
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def upload(page: Any, path: Path) -> None:
    page.set_input_files("input[type=file] >> nth=0", str(path))


def save(path: Path) -> Path:
    photo(3, 300, 200).save(path)
    return path


def seen(image: Any) -> np.ndarray:
    """The pixels of an element as they are on the screen."""
    return np.asarray(Image.open(io.BytesIO(image.screenshot())).convert("RGB")).astype(int)


def fits(page: Any) -> bool:
    """Whether nothing reaches over the side of the window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_regions_are_marked_by_clicks_and_keyboard_and_named(page: Any, tmp_path: Path) -> None:
    upload(page, save(tmp_path / "photo.png"))
    marked = page.locator("#marked img")
    page.locator("#marked img[alt^='Photo, 0 regions']").wait_for()
    before = seen(marked)
    page.get_by_label("Names to choose from").fill("a red dog, pizza")
    page.get_by_label("Names to choose from").press("Enter")
    box = marked.bounding_box()
    marked.click(position={"x": 0.1 * box["width"], "y": 0.2 * box["height"]})
    page.locator("#marked img[alt^='Photo, 0 regions, one corner of a box']").wait_for()
    marked.click(position={"x": 0.6 * box["width"], "y": 0.8 * box["height"]})
    page.locator("#marked img[alt^='Photo, 1 regions']").wait_for()
    assert np.abs(seen(marked) - before).max() > 50  # it is drawn
    alt = marked.get_attribute("alt")
    name = alt.split(". 1 ")[1].rsplit(" ", 1)[0]
    assert name in ("a red dog", "pizza")
    page.get_by_role("gridcell", name=name, exact=True).first.wait_for()
    page.get_by_label("Or type a region").fill("10 20 200 150")
    page.get_by_label("Or type a region").press("Enter")
    page.locator("#marked img[alt^='Photo, 2 regions']").wait_for()
    page.get_by_label("Or type a region").fill("10 20 2000 150")
    page.get_by_label("Or type a region").press("Enter")
    page.get_by_text("it reaches outside").first.wait_for()
    page.get_by_role("button", name="Undo").click()
    page.locator("#marked img[alt^='Photo, 1 regions']").wait_for()
    page.get_by_role("button", name="Clear", exact=True).last.click()
    page.locator("#marked img[alt^='Photo, 0 regions']").wait_for()
    assert fits(page)


def test_a_phrase_is_found_with_its_box_and_heat_map(page: Any, tmp_path: Path) -> None:
    upload(page, save(tmp_path / "photo.png"))
    page.locator("#marked img[alt^='Photo']").wait_for()
    page.get_by_role("tab", name="Find").click()
    page.get_by_label("What to find").fill("a red dog")
    page.get_by_label("What to find").press("Enter")
    page.locator("#found").get_by_text("“a red dog” is").wait_for()
    heat = page.locator("#heat img[alt='Similarity of the photo with a red dog']")
    grounded = page.locator("#grounded img[alt^='“a red dog” is']")
    heat.wait_for()
    grounded.wait_for()
    assert seen(heat).std(axis=(0, 1)).min() > 1  # a picture, not a blank
    assert fits(page)


def test_a_library_is_asked_and_a_result_searched_on(page: Any) -> None:
    page.get_by_role("tab", name="Library").click()
    page.get_by_text("8 photos.").wait_for()
    page.get_by_label("What to look for").fill("a red dog")
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator("#answer").get_by_text("“a red dog” in 8 photos").or_(
        page.locator("#answer").get_by_text("Nothing found for “a red dog” in 8 photos")
    ).wait_for()
    results = page.locator("#gallery img")
    results.first.wait_for()
    assert results.count() == 8
    pixels = seen(results.first)
    orange = (np.abs(pixels - [228, 87, 46]) < 40).all(-1)  # the outline of the region
    assert orange.sum() > 20
    page.locator("#gallery button:has(img)").nth(1).click()
    page.locator("#answer").get_by_text("the region in 8 photos").wait_for()
    page.get_by_role("button", name="Back").click()
    page.locator("#answer").get_by_text("“a red dog”").wait_for()
    page.get_by_label("What to look for").fill("  ")
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("Type what to look for").first.wait_for()
    assert fits(page)


def test_a_broken_upload_is_told_and_another_visitor_sees_nothing_of_it(
    page: Any, browser: Any, address: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    upload(page, tmp_path / "broken.png")
    page.get_by_text("broken image").first.wait_for()
    other = browser.new_context().new_page()
    other.set_default_timeout(WAIT_MS)
    other.goto(address)
    upload(other, save(tmp_path / "photo.png"))
    other.locator("#marked img[alt^='Photo, 0 regions']").wait_for()
    assert page.locator("#marked img[alt^='Photo']").count() == 0
    other.close()
