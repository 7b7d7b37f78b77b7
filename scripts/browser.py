"""A headless Chromium for the browser tests and the pictures; it asks nobody but the page's server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

import chromium

FLAGS = (
    "--no-sandbox",  # as root, and in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Started with a profile of its own that is removed afterwards; raises chromium.Missing."""
    program = chromium.obtain()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
