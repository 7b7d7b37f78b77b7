"""What the browser tests share: the browser, a stand-in server in a process of its own, and what must hold for any page.

Without a Chromium they are "not run", with the reason; in CI, or with GHOSTSERVE_DEMAND_PROGRAMS=1, that is a failure.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, BrowserContext, Page, expect

import browser
import chromium
from external import not_run
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.server import free_port

AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"
WIDE = {"width": 1280, "height": 860}
NARROW = {"width": 360, "height": 740}


@contextmanager
def chromium_or_not_run() -> Iterator[Browser]:
    """A running browser; skips, or fails where programs are demanded, if there is none."""
    try:
        chromium.obtain()
    except chromium.Missing as error:
        not_run(str(error))
    with browser.running_browser() as running:
        yield running


class FakeServer:
    """`ghostserve.testing.fake_server` as a process, so that it can be ended and started again by the same address."""

    def __init__(self, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [
            sys.executable,
            "-m",
            "ghostserve.testing.fake_server",
            "--port",
            str(self.port),
            *self._flags,
        ]
        self._process = subprocess.Popen(argv)
        deadline_s = monotonic_s() + 30
        while True:
            try:
                httpx.get(self.url + "/health", trust_env=False)
                return
            except httpx.HTTPError:
                assert monotonic_s() < deadline_s, "the stand-in server did not start"
                sleep_s(0.05)

    def stop(self) -> float:
        """SIGTERM; how many seconds it took to end."""
        assert self._process is not None
        began_s = monotonic_s()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=20)
        return monotonic_s() - began_s

    def post(self, path: str, body: Any) -> None:
        httpx.post(self.url + path, json=body, trust_env=False).raise_for_status()


@contextmanager
def fake_server(*flags: str) -> Iterator[FakeServer]:
    server = FakeServer(*flags)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Visit:
    """A page that is open, with what it said and whom it asked."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page: Page = context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.goto(url + "/ui")

    def _hear(self, kind: str, text: str) -> None:
        # That a server is gone, wants a key or has no event log is what some tests are about; the browser notes each.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.errors.append(text)

    def outcome(self, text: str, *, seconds: float = 30) -> str:
        """Wait until the outcome says `text`; all that it says then."""
        line = self.page.locator("#outcome")
        expect(line).to_contain_text(text, timeout=seconds * 1000)
        return line.inner_text()

    def ask(self, tokens: int) -> None:
        """Stream an answer of so many tokens."""
        self.page.get_by_label("Tokens", exact=True).fill(str(tokens))
        self.page.get_by_role("button", name="Stream it").click()

    def wait_tokens(self, tokens: int) -> None:
        """Until so many have arrived."""
        deadline_s = monotonic_s() + 60
        while float(self.page.locator("#progress").evaluate("bar => bar.value")) < tokens:
            assert monotonic_s() < deadline_s, f"{tokens} tokens did not arrive"
            self.page.wait_for_timeout(20)

    def violations(self) -> list[str]:
        """What axe-core finds wrong on the page as it is now: rule and element."""
        session = self.page.context.new_cdp_session(self.page)
        session.send("Runtime.evaluate", {"expression": AXE.read_text(encoding="utf-8")})
        answer = session.send(
            "Runtime.evaluate",
            {
                "expression": "axe.run().then(found => JSON.stringify(found.violations.flatMap("
                "one => one.nodes.map(node => `${one.id}: ${node.html} ${node.failureSummary}`))))",
                "awaitPromise": True,
                "returnByValue": True,
            },
        )
        assert "value" in answer["result"], answer
        found: list[str] = httpx.Response(200, text=answer["result"]["value"]).json()
        return found
