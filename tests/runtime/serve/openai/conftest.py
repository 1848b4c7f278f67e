"""A server and a browser for the tests of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from engines.store import Bundle
from tests.runtime.serve.openai.browser import CHROMIUM, opened, served


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


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as ready:
        yield ready
