"""The page at `/` in a real Chromium: what a person sees, types and is told."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

from engines.store import Bundle

CHROMIUM = shutil.which("chromium")
PROMPT = "a large red star at the left on blue background"
# the contrast ratio of each pair of colours that stand on each other, as a multiple of what WCAG AA asks for
CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = colour => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const linear = [...context.getImageData(0, 0, 1, 1).data].map(c => c / 255)
      .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2];
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  };
  const root = getComputedStyle(document.documentElement), found = {};
  const colour = name => root.getPropertyValue("--" + name).trim();
  const pair = (one, other, least) => { found[`${one} on ${other}`] = ratio(colour(one), colour(other)) / least; };
  const texts = ["ink", "soft", "accent", "bad"], grounds = ["card", "bg", "tint"];
  texts.forEach(text => grounds.forEach(ground => pair(text, ground, 4.5)));
  pair("on-accent", "accent", 4.5);
  pair("ink", "bad-bg", 4.5);
  for (const part of ["edge", "text", "denoise", "decode", "callback", "warn"]) pair(part, "card", 3);
  document.querySelectorAll(".call .branch").forEach((bar, number) => {
    found[`bar ${number}`] = ratio(getComputedStyle(bar).fill, colour("bg")) / 3;
  });
  return found;
}"""
# whether the element with the focus shows it; a radio button does it on its label
OUTLINE = """(() => {
  const node = document.activeElement;
  return getComputedStyle(node.matches("[type=radio]") ? node.parentNode : node).outlineStyle;
})()"""

expect.set_options(timeout=30_000)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: install Debian's package of that name")


@contextmanager
def served(log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The real server on a free port, and its address."""
    command = [sys.executable, "-m", "runtime.serve", "--devices", "cpu*2", "--port", "0", *options]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield server, found[0]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def address(shapes: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for the module."""
    with served(tmp_path_factory.mktemp("server") / "log") as (_, url):
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield launched
        launched.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, which must neither complain in the console nor ask another host for anything."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(30_000)
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    expect(page.locator("#about")).to_contain_text("Model shapes")
    yield page
    context.close()
    # a refusal (4xx) and a server that is gone are logged by the browser itself
    assert [c for c in complaints if "Failed to load resource" not in c] == []
    assert asked and all(request.startswith((url, "data:")) for request in asked), asked


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as ready:
        yield ready


def choose(page: Page, mode: str, steps: str | None = None, k: str | None = None) -> None:
    page.get_by_label(mode, exact=True).check()
    if steps:
        page.get_by_label("Steps", exact=True).fill(steps)
    if k:
        page.get_by_label("Drafts k").fill(k)


def generate(page: Page, prompt: str = PROMPT) -> None:
    page.get_by_label("Caption", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()


def done(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)


def shown(page: Page, number: int = 0) -> NDArray[np.int64]:
    """The pixels of a finished image."""
    source = page.locator("img.image:not(.preview)").nth(number).get_attribute("src") or ""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))), int)


def requests(page: Page) -> list[dict[str, Any]]:
    """Fills up with the bodies of the requests for images."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            bodies.append(request.post_data_json or {})

    page.on("request", note)
    return bodies


def test_a_image_its_facts_and_its_timeline(page: Page) -> None:
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


def test_the_timeline_can_be_read_by_keyboard(page: Page) -> None:
    choose(page, "sequential", "3")
    generate(page)
    done(page)
    assert page.locator('.timeline [tabindex="0"]').count() == 1
    page.locator('.timeline [tabindex="0"]').focus()
    seen = []
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        seen.append(page.locator(".tip").inner_text())
    assert [text.split(" · ")[0] for text in seen[:3]] == ["Round 2", "Round 2", "Round 3"]
    assert "cpu/1" in seen[1] and "step 3" in seen[2] and seen[3] == seen[2] and "Refine" in seen[4]


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
        assert page.get_by_label("Lanes").locator("option").all_inner_texts() == ["1", "all 2"]

        def without(route: Route) -> None:
            answer = route.fetch().json()
            del answer["data"][0]["lanes"]
            route.fulfill(json=answer)

        page.route("**/v1/models", without)
        page.reload()
        bodies = requests(page)
        expect(page.locator("#about")).to_contain_text("Model shapes")
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
    ("Seed", "-1", "The seed must be a whole number, 0 or more."),
    ("Size", "100x100", "width=100 is not among the sizes of this engine"),
    ("Negative caption", "a" * 32_001, "negative_prompt: String should have at most 32000 characters"),
]


def test_an_error_is_told_beside_the_field_to_blame(page: Page) -> None:
    choose(page, "aggressive", "5", "4")
    page.get_by_label("Caption", exact=True).fill(PROMPT)
    page.get_by_text("More settings").click()
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


def test_from_prompt_to_image_by_keyboard_alone(page: Page) -> None:
    reached = []
    while "prompt" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        assert len(reached) < 5
    page.keyboard.type(PROMPT)
    while "steps" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        style = page.evaluate(OUTLINE)
        assert style == "solid", f"focus cannot be seen on {reached[-1]}"
        if reached[-1] == "mode":
            page.keyboard.press("ArrowRight")
        assert len(reached) < 20
    page.keyboard.press("Control+A")
    page.keyboard.type("5")
    page.keyboard.press("Control+Enter")
    done(page)
    assert shown(page).shape == (64, 64, 3)
    assert page.locator("[name=mode]:checked").get_attribute("value") == "sequential"


def test_ctrl_enter_in_the_caption(page: Page) -> None:
    choose(page, "sequential", "2")
    page.get_by_label("Caption", exact=True).fill(PROMPT)
    page.keyboard.press("Shift+Enter")
    assert "Generate" in page.locator("#go").inner_text()
    page.keyboard.press("Control+Enter")
    done(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_of_a_phone(browser: Browser, address: str, scheme: str) -> None:
    def overflow(page: Page) -> int:
        return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    with opened(browser, address, **phone) as page:
        assert overflow(page) == 0
        choose(page, "conservative", "30", "4")
        page.get_by_text("More settings").click()
        page.get_by_text("The same with curl").click()
        generate(page, "W" * 200)
        done(page)
        assert overflow(page) == 0
        page.get_by_role("button", name="Compare").click()
        expect(page.locator(".verdict")).to_contain_text("ifference")
        page.locator(".timeline .call").last.hover()
        assert overflow(page) == 0
        tip, width = page.locator(".tip:visible").bounding_box(), 360
        assert tip and tip["x"] >= 0 and tip["x"] + tip["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, address: str, scheme: str) -> None:
    """WCAG AA: 4.5 for text on what it stands on, 3 for borders of controls and for bars."""
    with opened(browser, address, color_scheme=scheme) as page:
        choose(page, "sequential", "6")
        generate(page)
        done(page)
        ratios = page.evaluate(CONTRASTS)
    assert len(ratios) > 25
    assert {name: value for name, value in ratios.items() if value < 1} == {}


def test_the_image_of_the_readme(
    browser: Browser, address: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`pytest tests/test_page.py -k readme --page-image bench/results/page.png` makes it again."""
    path = request.config.getoption("--page-image") or tmp_path / "page.png"
    with opened(browser, address) as page:
        choose(page, "conservative", "50", "4")
        generate(page, "a large white cross at the left and a small orange triangle at the right on purple background")
        done(page)
        page.get_by_role("button", name="Compare").click()
        done(page)
        expect(page.locator(".verdict")).to_contain_text("Largest difference")
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


def test_the_curl_command_makes_the_same_image(page: Page, tmp_path: Path) -> None:
    choose(page, "aggressive", "6", "3")
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
