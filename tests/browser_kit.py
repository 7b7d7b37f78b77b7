"""What the browser tests share: the browser, stand-in servers, and what must hold for any page.

A wait looks at every frame that the browser paints: Playwright's own `expect` looks once per second after its first tries.

Without a Chromium they are "not run", with the reason; in CI, or with GHOSTSERVE_DEMAND_PROGRAMS=1, that is a failure.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize

import browser
import chromium
from external import not_run
from fake_http import serving
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.server import free_port

AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"
WIDE: ViewportSize = {"width": 1280, "height": 860}
NARROW: ViewportSize = {"width": 360, "height": 740}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
HELD_MAX_S = 30.0
SHOWS = """([selector, text, absent]) => {
  const found = document.querySelector(selector);
  return found !== null && found.textContent.includes(text) !== absent;
}"""
FLAWS = """axe.run().then(found => JSON.stringify(found.violations.flatMap(
  one => one.nodes.map(node => `${one.id}: ${node.html} ${node.failureSummary}`))))"""


@contextmanager
def chromium_or_not_run() -> Iterator[Browser]:
    """A running browser; skips, or fails where programs are demanded, if there is none."""
    try:
        chromium.obtain()
    except chromium.Missing as error:
        not_run(str(error))
    with browser.running_browser() as running:
        yield running


class PacedEngine(FakeEngine):
    """A stand-in that waits for the test, so that nothing is a matter of speed."""

    def __init__(self, **options: Any) -> None:
        self.may_replace = threading.Event()  # cleared: a recovery stays where it is
        self.may_replace.set()
        self._pause_at = math.inf
        super().__init__(**options)

    def pause_after(self, tokens: float) -> None:
        """So many tokens from now on; it goes on when a worker dies, or at `pause_after(math.inf)`."""
        self._pause_at = self.tokens + tokens

    def step(self) -> None:
        deadline_s = monotonic_s() + HELD_MAX_S
        while self.tokens >= self._pause_at and monotonic_s() < deadline_s:
            if any(worker.poll() is not None for worker in self.workers):
                self._pause_at = math.inf
            sleep_s(0.002)
        super().step()

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.may_replace.wait(HELD_MAX_S)
        return super()._spawn()


class PacedServer:
    """A stand-in in a thread of the test."""

    def __init__(self, engine: PacedEngine, url: str) -> None:
        self.engine = engine
        self.url = url


@contextmanager
def paced_server(*, token_s: float = 0.001, outage_s: float = 0.1, **rules: Any) -> Iterator[PacedServer]:
    """`rules` are those of `fake_server.build_app`."""
    engine = PacedEngine(token_s=token_s, outage_s=outage_s, standbys=1)
    try:
        with serving(engine, **rules) as (url, _):
            yield PacedServer(engine, url)
    finally:
        engine.close()


class MortalServer:
    """`ghostserve.testing.fake_server` as a process, so that it can be ended and started again by the same address."""

    def __init__(self, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._argv = [
            sys.executable,
            "-m",
            "ghostserve.testing.fake_server",
            "--port",
            str(self.port),
            *flags,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin; `wait` says when it answers."""
        self._process = subprocess.Popen(self._argv)

    def wait(self) -> None:
        deadline_s = monotonic_s() + 30
        while True:
            try:
                httpx.get(self.url + "/health", trust_env=False)
                return
            except httpx.HTTPError:
                assert monotonic_s() < deadline_s, "the stand-in server did not start"
                sleep_s(0.02)

    def stop(self) -> float:
        """SIGTERM; how many seconds it took to end."""
        assert self._process is not None
        began_s = monotonic_s()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=20)
        return monotonic_s() - began_s


@contextmanager
def mortal_server(*flags: str) -> Iterator[MortalServer]:
    server = MortalServer(*flags)
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

    def shows(self, selector: str, text: str, *, absent: bool = False, seconds: float = 15) -> None:
        """Wait until the element's text has `text` in it, or no longer has."""
        self.page.wait_for_function(SHOWS, arg=[selector, text, absent], timeout=seconds * 1000)

    def outcome(self, text: str, *, seconds: float = 30) -> str:
        """Wait until the outcome says `text`; all that it says then."""
        self.shows("#outcome", text, seconds=seconds)
        return self.page.locator("#outcome").inner_text()

    def ask(self, tokens: int) -> None:
        """Stream an answer of so many tokens."""
        self.page.get_by_label("Tokens", exact=True).fill(str(tokens))
        self.page.get_by_role("button", name="Stream it").click()

    def wait_pieces(self, pieces: int) -> None:
        """Until exactly so many are shown: there is no more, and all of them have been painted."""
        self.page.wait_for_function(
            "pieces => document.getElementById('answer').childNodes.length === pieces", arg=pieces
        )

    def wait_tokens(self, tokens: int) -> None:
        """Until so many have arrived."""
        self.page.wait_for_function(
            "tokens => document.getElementById('progress').value >= tokens", arg=tokens, timeout=60_000
        )

    def violations(self) -> list[str]:
        """What axe-core finds wrong on the page as it is now: rule and element."""
        session = self.page.context.new_cdp_session(self.page)
        if not self.page.evaluate("() => 'axe' in window"):
            session.send("Runtime.evaluate", {"expression": AXE.read_text(encoding="utf-8")})
        answer = session.send(
            "Runtime.evaluate", {"expression": FLAWS, "awaitPromise": True, "returnByValue": True}
        )
        session.detach()
        assert "value" in answer["result"], answer
        found: list[str] = json.loads(answer["result"]["value"])
        return found

    def barriers(self) -> dict[str, list[str]]:
        """What keeps anybody out, as the page is now: by how it is looked at, light and dark, wide and narrow."""
        found: dict[str, list[str]] = {}
        for shape, size in (("wide", WIDE), ("narrow", NARROW)):
            self.page.set_viewport_size(size)
            for scheme in SCHEMES:
                self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                found[f"{shape} {scheme}"] = self.violations()
            width = self.page.evaluate("() => document.documentElement.scrollWidth")
            if width > size["width"]:
                found[f"{shape} {scheme}"].append(f"{width} pixels wide")
        self.page.set_viewport_size(WIDE)
        return {look: flaws for look, flaws in found.items() if flaws}
