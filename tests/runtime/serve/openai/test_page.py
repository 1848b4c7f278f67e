"""The page at `/` in a real Chromium: what a person sees, types and is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from engines.store import Bundle
from tests.runtime.serve.openai.browser import (
    CHROMIUM,
    PROMPT,
    choose,
    done,
    generate,
    opened,
    requests,
    served,
    shown,
    unfold,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: install Debian's package of that name")


def test_an_image_its_facts_and_its_timeline(page: Page) -> None:
    choose(page, "conservative", "12", "3")
    generate(page)
    done(page)
    assert shown(page).shape == (64, 64, 3)
    facts = page.locator(".facts").inner_text()
    assert "12 steps in 6 rounds on 2 lanes" in facts and "12 calls" in facts
    assert page.locator(".names div").all_inner_texts() == ["cpu/0", "cpu/1", "between"]
    assert page.locator(".timeline .call").count() == 12
    assert page.locator(".timeline .track").count() == 3
    boxes = [page.locator(f'.timeline .call[data-row="{lane}"]').all() for lane in (0, 1)]
    assert [len(row) for row in boxes] == [6, 6]
    assert [bar.locator(".branch").count() for bar in boxes[0]] == [1, 3] * 3, "one stripe per branch"
    second = boxes[1][1]
    second.hover()
    tip = page.locator(".tip")
    expect(tip).to_be_visible()
    assert re.fullmatch(r"Round 2 · cpu/1 · steps 2–4 · 3 branches · [\d.]+ m?s", tip.inner_text()), tip.inner_text()
    assert page.locator(".call.hot").count() == 2, "the drafts of one round are shown together"
    download = page.get_by_role("link", name="Download PNG")
    assert (
        download.get_attribute("download") == "a-large-red-star-at-the-left-on-blue-background-conservative-seed0.png"
    )


def test_lanes_without_times_show_the_order_of_calls(page: Page) -> None:
    def untimed(route: Route) -> None:
        """What a server on GPUs answers: its host does not wait for rounds."""
        body = {**(route.request.post_data_json or {}), "stream": False, "partial_images": 0}
        response = route.fetch(post_data=body)
        answer = response.json()
        for span in answer["report"]["timeline"]:
            span["start"] = span["end"] = None
        route.fulfill(response=response, json=answer)

    page.route("**/v1/images/generations", untimed)
    choose(page, "aggressive", "7")
    generate(page)
    done(page)
    expect(page.locator(".timeline")).to_contain_text("does not wait for rounds, so there are no times")
    assert page.locator(".timeline .call").count() == 8
    assert [text.strip() for text in page.locator(".axis").all_text_contents()] == ["round 1", "2", "3", "4"]
    page.locator(".timeline .call").last.hover()
    assert page.locator(".tip").inner_text() == "Round 4 · cpu/1 · steps 6–7 · 2 branches"


def test_lanes_are_offered_where_the_server_lets_requests_choose(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        unfold(page)
        expect(page.get_by_label("Lanes")).to_be_visible()
        assert page.get_by_label("Lanes").locator("option").all_inner_texts() == ["1", "all 2"]

        def without(route: Route) -> None:
            answer = route.fetch().json()
            del answer["data"][0]["lanes"]
            route.fulfill(json=answer)

        page.route("**/v1/models", without)
        page.reload()
        bodies = requests(page)
        expect(page.locator("#about")).to_contain_text("Model shapes")
        unfold(page)
        expect(page.get_by_label("Guidance")).to_be_visible()
        expect(page.get_by_label("Lanes")).to_be_hidden()
        choose(page, "sequential", "2")
        generate(page)
        done(page)
        assert "lanes" not in bodies[0]


def test_previews_come_before_the_image(page: Page) -> None:
    page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver(() => {
            const image = document.querySelector("img.image");
            if (!image || window.seen.at(-1)?.[1] === image.src) return;
            window.seen.push([image.classList.contains("preview"), image.src]);
          }).observe(document.querySelector("#view"), { childList: true, subtree: true });
        }"""
    )
    choose(page, "sequential", "40")
    generate(page)
    done(page)
    seen = page.evaluate("window.seen")
    assert [preview for preview, _ in seen] == [True, True, True, False]
    assert len({source for _, source in seen}) == 4


WRONG = [
    ("Caption", "   ", "Please type a caption first."),
    ("Steps", "1000", "use fewer steps"),
    ("Steps", "1.5", "Steps must be a whole number, 1 or more."),
    ("Guidance", "101", "guidance_scale: Input should be less than or equal to 100"),
    ("Guidance", "", "Guidance must be a number, 0 or more."),
    ("Drafts k", "65", "k: Input should be less than or equal to 64"),
    ("Seed", "-2", "The seed must be a whole number, 0 or more."),
    ("Size", "100x100", "width=100 is not among the sizes of this engine"),
    ("Negative caption", "a" * 32_001, "negative_prompt: String should have at most 32000 characters"),
]


def test_an_error_is_told_beside_the_field_to_blame(page: Page) -> None:
    choose(page, "aggressive", "5", "4")
    page.get_by_label("Caption", exact=True).fill(PROMPT)
    unfold(page)
    for label, text, words in WRONG:
        field = page.get_by_label(label, exact=True)
        before = field.input_value()
        field.fill(text)
        page.get_by_role("button", name="Generate").click()
        expect(field).to_have_attribute("aria-invalid", "true")
        told = (field.get_attribute("aria-describedby") or "").split()[-1]
        expect(page.locator(f"#{told}")).to_contain_text(words)
        expect(field).to_be_focused()
        expect(page.locator("#status")).to_have_text("Nothing was made: see the marked field.")
        field.fill(before)
        expect(field).not_to_have_attribute("aria-invalid", "true")
    generate(page)
    done(page)


def test_a_full_queue_and_a_deadline_are_told(browser: Browser, shapes: Bundle, tmp_path: Path) -> None:
    with (
        served(tmp_path / "log", "--queue", "0", "--timeout", "2", "--devices", "cpu@1") as (_, url),
        opened(browser, url) as one,
        opened(browser, url) as other,
    ):
        choose(one, "sequential", "900")
        choose(other, "sequential", "2")
        generate(one)
        other.wait_for_timeout(300)
        generate(other)
        expect(other.locator("#alert")).to_contain_text("try again in")
        expect(other.locator("#alert")).to_contain_text("429")
        expect(one.locator("#alert")).to_contain_text("ask for fewer steps, or try later")
        expect(one.get_by_role("button", name="Generate")).to_be_visible()
        generate(other)
        done(other)


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_cancelling(page: Page, how: str) -> None:
    choose(page, "sequential", "900")
    generate(page)
    button = page.get_by_role("button", name="Cancel")
    expect(button).to_be_visible()
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.wait_for_timeout(450)  # before that it could be a double click
        button.click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    choose(page, "sequential", "3")
    generate(page)
    done(page)


def test_the_curl_command_makes_the_same_image(page: Page, tmp_path: Path) -> None:
    choose(page, "aggressive", "6", "3")
    unfold(page)
    page.get_by_label("Lanes").select_option("1")
    prompt = "a 'large' red star; $HOME \\ \"at\" the left"
    generate(page, prompt)
    done(page)
    page.get_by_text("The same with curl").click()
    page.get_by_label("Seed", exact=True).fill("0")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy command").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert '"lanes":1' in command and command == page.locator("#curl").text_content()
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)
    with Image.open(tmp_path / "image.png") as made:
        assert np.array_equal(np.asarray(made, int), shown(page))
    page.get_by_label("Steps", exact=True).fill("")
    assert page.locator("#curl").inner_text().startswith("Steps must be")


def test_two_tabs_do_not_disturb_each_other(browser: Browser, address: str) -> None:
    with opened(browser, address) as one, opened(browser, address) as other:
        for page, prompt in ((one, PROMPT), (other, "a small green ring at the top right on white background")):
            choose(page, "sequential", "60")
            generate(page, prompt)
        images = []
        for page in (one, other):
            done(page)
            images.append(shown(page))
        assert not np.array_equal(images[0], images[1])
        page.locator("#lock").click()
        page.get_by_label("Seed", exact=True).fill("0")
        generate(page, PROMPT)
        done(page)
        assert np.array_equal(shown(page), images[0])


def test_a_server_that_stops_and_one_that_asks_for_a_key(browser: Browser, shapes: Bundle, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with served(tmp_path / "log", "--api-keys", str(keys)) as (server, url):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        key = page.get_by_label("API key")
        expect(key).to_have_attribute("aria-invalid", "true")
        key.fill("secret")
        key.press("Tab")
        expect(page.locator("#about")).to_contain_text("Model shapes")
        choose(page, "sequential", "3")
        generate(page)
        done(page)
        assert "secret" not in page.locator("#curl").inner_text()
        choose(page, "sequential", "300")
        generate(page)
        expect(page.locator("img.preview")).to_be_visible()
        server.kill()
        expect(page.locator("#alert")).to_contain_text("Is it still running?")
        expect(page.get_by_role("button", name="Generate")).to_be_visible()
        generate(page)
        expect(page.locator("#alert")).to_contain_text("The server could not be reached. Is it still running?")
        context.close()


@pytest.mark.parametrize("button", ["Compare", "Generate"])
def test_the_first_click_makes_an_image(page: Page, button: str) -> None:
    """A newcomer types nothing: the caption is the model's first example."""
    bodies = requests(page)
    page.get_by_label("Steps", exact=True).fill("4")
    page.get_by_role("button", name=button).click()
    done(page)
    assert bodies and all(body["prompt"] == PROMPT for body in bodies)
    assert shown(page).shape == (64, 64, 3)


def test_what_was_typed_is_not_replaced_by_the_example(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:

        def typed_meanwhile(route: Route) -> None:
            page.get_by_label("Caption", exact=True).fill("mine")
            route.continue_()

        page.route("**/v1/models", typed_meanwhile)
        page.reload()
        expect(page.locator("#about")).to_contain_text("Model shapes")
        assert page.get_by_label("Caption", exact=True).input_value() == "mine"


def test_compare_is_the_first_button(page: Page) -> None:
    assert page.locator("#actions button:visible").all_inner_texts() == ["Compare", "Generate"]


@pytest.mark.parametrize("width", [360, 1280])
def test_examples_are_shown_whole(browser: Browser, address: str, width: int) -> None:
    with opened(browser, address, viewport={"width": width, "height": 900}) as page:
        chips = page.locator("#chips button")
        assert chips.count() > 2
        cut = "node => node.scrollWidth > node.clientWidth || node.scrollHeight > node.clientHeight"
        assert not any(chip.evaluate(cut) for chip in chips.all())
        longest = max(chips.all(), key=lambda chip: len(chip.inner_text()))
        words = longest.inner_text()
        longest.click()
        assert page.get_by_label("Caption", exact=True).input_value() == words


def test_settings_for_experts_are_folded_away(page: Page) -> None:
    choose(page, "adaptive")
    labels = ("Drafts k", "Tolerance", "Guidance", "Lanes", "Negative caption")
    for label in labels:
        expect(page.get_by_label(label)).to_be_hidden()
    for label in ("Caption", "Steps", "Size", "Seed"):
        expect(page.get_by_label(label, exact=True)).to_be_visible()
    page.get_by_text("More settings").click()
    for label in labels:
        expect(page.get_by_label(label)).to_be_visible()


def test_an_error_in_a_folded_field_unfolds_it(page: Page) -> None:
    unfold(page)
    page.get_by_label("Guidance").fill("101")
    page.get_by_text("More settings").click()
    expect(page.get_by_label("Guidance")).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Guidance")).to_be_focused()


def test_the_icon_is_an_image(page: Page) -> None:
    source = page.locator("link[rel=icon]").get_attribute("href")
    size = page.evaluate(
        "source => { const image = new Image(); image.src = source; return image.decode().then(() => image.width); }",
        source,
    )
    assert size > 0


def test_warnings_are_shown_with_the_image(page: Page) -> None:
    choose(page, "sequential", "2")
    generate(page, "a red star " * 40)
    done(page)
    expect(page.locator(".alert.warn")).to_contain_text("cut")


def test_seed_minus_one_is_a_new_seed(page: Page) -> None:
    """Both images of a comparison have the same."""
    bodies = requests(page)
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("Seed", exact=True).fill("-1")
    page.get_by_role("button", name="Compare").click()
    done(page)
    assert len(bodies) == 2 and bodies[0]["seed"] == bodies[1]["seed"] > 0
