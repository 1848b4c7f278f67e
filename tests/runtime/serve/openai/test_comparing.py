"""Both images of a comparison, and the history, in a real Chromium."""

# covers: runtime/serve/openai/page.html

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from tests.runtime.serve.openai.browser import CHROMIUM, PROMPT, choose, done, generate, opened, requests, shown, unfold

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: install Debian's package of that name")


def test_compare_makes_both_and_shows_the_difference(page: Page) -> None:
    bodies = requests(page)
    choose(page, "aggressive", "16", "4")
    page.get_by_label("Caption", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Compare").click()
    done(page)
    assert [(body["mode"], body.get("k"), body["seed"]) for body in bodies] == [
        ("sequential", None, 0),
        ("aggressive", 4, 0),
    ]
    difference = np.abs(shown(page, 0) - shown(page, 1))
    largest = int(difference.max())
    assert largest > 0
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text(f"Largest difference {largest} of 255.")
    assert re.search(r"\d\.\d\d times as fast", verdict.inner_text())
    assert "aggressive: 5 rounds instead of 16" in verdict.inner_text()
    drawn = page.evaluate(
        """() => { const canvas = document.querySelector("canvas"), { width, height } = canvas;
          return [width, height, [...canvas.getContext("2d").getImageData(0, 0, width, height).data]]; }"""
    )
    pixels = np.array(drawn[2]).reshape(drawn[1], drawn[0], 4)
    assert np.array_equal(pixels[..., :3], difference * (255 // largest)) and (pixels[..., 3] == 255).all()
    assert page.locator(".timeline").count() == 2
    assert [row.locator(".call").count() for row in page.locator(".timeline").all()] == [32, 10]


def test_images_that_are_equal_are_called_equal(page: Page) -> None:
    choose(page, "adaptive", "6")  # at tolerance 0 it takes no draft
    page.get_by_label("Caption", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Compare").click()
    done(page)
    expect(page.locator(".verdict")).to_contain_text(
        re.compile("No difference: the same image|Largest difference 1 of")
    )


def test_the_image_of_the_readme(
    browser: Browser, address: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`pytest tests/runtime/serve/openai -k readme --page-image bench/results/page.png` makes it again."""
    path = request.config.getoption("--page-image") or tmp_path / "page.png"
    with opened(browser, address) as page:
        choose(page, "conservative", "50", "4")
        generate(page, "a large white cross at the left and a small orange triangle at the right on purple background")
        done(page)
        page.get_by_role("button", name="Compare").click()
        done(page)
        expect(page.locator(".verdict")).to_contain_text("Largest difference")
        print(page.locator(".verdict").inner_text())  # with -s, whether the machine was quiet
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = false")
        page.set_viewport_size({"width": 1280, "height": int(page.evaluate("document.body.scrollHeight"))})
        height = page.evaluate("document.querySelector('#result').getBoundingClientRect().bottom + 14")
        page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1280, "height": height})
    with Image.open(path) as screenshot:
        screenshot.convert("RGB").save(path, optimize=True)
    assert path.stat().st_size < 300_000


def test_history_restores_image_and_settings(page: Page) -> None:
    choose(page, "conservative", "8", "3")
    generate(page)
    done(page)
    first = shown(page)
    choose(page, "sequential", "4")
    generate(page, "a small green ring at the top right on white background")
    done(page)
    assert page.locator("#history button").count() == 2
    assert not np.array_equal(shown(page), first)
    page.locator("#history button").last.click()
    assert np.array_equal(shown(page), first)
    fields = {"#prompt": PROMPT, "#steps": "8", "#k": "3", "#seed": "0"}
    assert {selector: page.locator(selector).input_value() for selector in fields} == fields
    assert page.locator("[name=mode]:checked").get_attribute("value") == "conservative"
    page.get_by_role("button", name="Generate").click()
    done(page)
    assert np.array_equal(shown(page), first), "the same settings make the same image again"


def test_compare_shows_what_the_default_gains(browser: Browser, address: str) -> None:
    """Where mode auto has a tolerance it is compared itself, as requests that set nothing get it."""
    with opened(browser, address) as page:

        def tolerant(route: Route) -> None:
            answer = route.fetch().json()
            answer["data"][0]["defaults"]["tolerance"] = 0.01
            route.fulfill(json=answer)

        page.route("**/v1/models", tolerant)
        page.reload()
        expect(page.locator("#about")).to_contain_text("Model shapes")
        bodies = requests(page)
        page.get_by_label("Steps", exact=True).fill("6")
        page.get_by_role("button", name="Compare").click()
        done(page)
        assert [(body["mode"], body.get("tolerance")) for body in bodies] == [("sequential", None), ("auto", None)]
        expect(page.locator(".verdict")).to_contain_text("auto, which chose")
        unfold(page)
        page.get_by_label("Tolerance").fill("0")
        page.get_by_role("button", name="Compare").click()
        done(page)
        expect(page.locator(".verdict")).to_contain_text("aggressive: ")
        assert bodies[-1]["mode"] == "aggressive"
