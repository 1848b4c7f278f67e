"""The page in a real Chromium, for its tests."""

from __future__ import annotations

import base64
import io
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
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect

CHROMIUM = shutil.which("chromium")

PROMPT = "a large red star at the left on blue background"

expect.set_options(timeout=30_000)


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


def choose(page: Page, mode: str, steps: str | None = None, k: str | None = None) -> None:
    page.get_by_label(mode, exact=True).check()
    if steps:
        page.get_by_label("Steps", exact=True).fill(steps)
    if k:
        unfold(page)
        page.get_by_label("Drafts k").fill(k)


def unfold(page: Page) -> None:
    """Opens the settings that are folded away."""
    page.evaluate("document.querySelector('#more').open = true")


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
