"""The page by keyboard alone, on a phone, and in both colour schemes."""

# covers: runtime/serve/openai/page.html

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.runtime.serve.openai.browser import CHROMIUM, PROMPT, choose, done, generate, opened, shown, unfold

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: install Debian's package of that name")

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


def test_from_prompt_to_image_by_keyboard_alone(page: Page) -> None:
    reached = []
    while "prompt" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        assert len(reached) < 5
    page.keyboard.press("Control+A")
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_of_a_phone(browser: Browser, address: str, scheme: str) -> None:
    def overflow(page: Page) -> int:
        return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    with opened(browser, address, **phone) as page:
        assert overflow(page) == 0
        choose(page, "conservative", "30", "4")
        unfold(page)
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
