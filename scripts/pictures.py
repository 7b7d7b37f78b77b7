"""Makes the pictures of the page from a real run of a real server; nothing in them is drawn by hand.

    scripts/pictures [--into docs/pictures]

States: idle, streaming, recovering, recovered, mismatch (the restore is switched off), reconnecting; each light, dark and narrow.
The film: one answer, a kill in the middle of it, the verdict, in real time; an animated WebP of less than FILM_BYTES_MAX.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect

import browser
from ghostserve.cli.demo import demo_server
from ghostserve.cli.demo import parse as parse_demo
from ghostserve.testing.server import ServerProcess

TOKENS, SHOOT_AT, KILL_AT = 600, 100, 280
READY_MAX_S, VERDICT_MAX_MS = 300.0, 120_000
FILM_SIZE: ViewportSize = {"width": 1080, "height": 700}
FILM_BYTES_MAX = 1_500_000
FRAME_MS_MIN, LAST_FRAME_MS = 180.0, 4000
COLOURS = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How the page is seen."""

    name: str
    size: ViewportSize
    dark: bool = False
    whole: bool = False  # all of the page, not only what fits

    def open(self, running: Browser, url: str) -> Page:
        context = running.new_context(viewport=self.size, color_scheme="dark" if self.dark else "light")
        page = context.new_page()
        page.goto(url + "/ui")
        expect(page.locator("#rank-1 .state")).to_have_text("alive", timeout=30_000)
        return page


LOOKS = (
    Look(name="light", size={"width": 1280, "height": 940}),
    Look(name="dark", size={"width": 1280, "height": 940}, dark=True),
    Look(name="narrow", size={"width": 360, "height": 740}, whole=True),
)


# In the page itself: what is asked for from here comes when a fast answer has ended.
KILL = """at => {
  const button = document.querySelector("#rank-1 .kill"), bar = document.getElementById("progress");
  const timer = setInterval(() => {
    if (bar.value < at || bar.max === 1) return;
    clearInterval(timer);
    button.focus();
    button.click();
  }, 10);
}"""


def ask(page: Page) -> None:
    """Stream an answer; rank 1 is killed when KILL_AT tokens have arrived."""
    page.evaluate("() => { document.getElementById('progress').value = 0; }")
    page.get_by_label("Tokens", exact=True).fill(str(TOKENS))
    page.evaluate(KILL, KILL_AT)
    page.get_by_role("button", name="Stream it").press("Enter")


def wait_for_standby(server: ServerProcess) -> None:
    """So that each kill finds the server as the first did."""
    server.wait_status(
        lambda status: (
            status["state"] == "serving" and any(one["state"] == "ready" for one in status["standbys"])
        ),
        timeout_s=60,
        what="a standby that is ready",
    )


def shoot(page: Page, look: Look, into: Path, state: str) -> None:
    """One picture, with as many colours as it needs."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=look.whole)))
    path = into / f"{state}-{look.name}.png"
    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB", flush=True)


def idle(running: Browser, server: ServerProcess, into: Path) -> None:
    """Before anything has failed."""
    for look in LOOKS:
        wait_for_standby(server)
        page = look.open(running, server.base_url)
        shoot(page, look, into, "idle")
        page.context.close()


def verdict(page: Page, text: str) -> None:
    """Wait for it; a kill that came too late makes no picture."""
    expect(page.locator("#outcome")).to_contain_text(text, timeout=VERDICT_MAX_MS)
    expect(page.locator("#outcome")).to_contain_text("recovered in")


def losses(running: Browser, server: ServerProcess, into: Path, look: Look) -> None:
    """A loss, and one whose restore is switched off."""
    wait_for_standby(server)
    page = look.open(running, server.base_url)
    ask(page)
    while float(page.locator("#progress").evaluate("bar => bar.value")) < SHOOT_AT:
        page.wait_for_timeout(20)
    shoot(page, look, into, "streaming")
    expect(page.locator("#outcome")).to_contain_text("recovering", timeout=VERDICT_MAX_MS)
    shoot(page, look, into, "recovering")
    verdict(page, "✓")
    shoot(page, look, into, "recovered")
    wait_for_standby(server)
    server.set_switch("skip_restore", True)
    ask(page)
    verdict(page, "✗")
    server.set_switch("skip_restore", False)
    shoot(page, look, into, "mismatch")
    page.context.close()


def silence(running: Browser, server: ServerProcess, into: Path) -> None:
    """The server is stopped while all look at it."""
    pages = [look.open(running, server.base_url) for look in LOOKS]
    server.stop()
    for look, page in zip(LOOKS, pages, strict=True):
        expect(page.locator("#state")).to_have_text("reconnecting…", timeout=30_000)
        shoot(page, look, into, "reconnecting")
        page.context.close()


class Film:
    """The frames that the browser shows, with their times."""

    def __init__(self, page: Page) -> None:
        self._frames: list[tuple[float, Image.Image]] = []
        self._session = page.context.new_cdp_session(page)
        self._session.on("Page.screencastFrame", self._take)
        self._session.send("Page.startScreencast", {"format": "png", "everyNthFrame": 1})

    def _take(self, frame: dict[str, Any]) -> None:
        picture = Image.open(io.BytesIO(base64.b64decode(frame["data"]))).convert("RGB")
        at_ms = 1000 * float(frame["metadata"]["timestamp"])
        if not self._frames or at_ms - self._frames[-1][0] >= FRAME_MS_MIN:
            self._frames.append((at_ms, picture))
        self._session.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

    def save(self, path: Path, last: Image.Image) -> None:
        """An endless loop that rests on `last`."""
        self._session.send("Page.stopScreencast")
        times = [at_ms for at_ms, _ in self._frames]
        durations = [round(b - a) for a, b in itertools.pairwise(times)]
        first, *rest = [*(picture for _, picture in self._frames), last]
        first.save(
            path, save_all=True, append_images=rest, duration=[*durations, 300, LAST_FRAME_MS], loop=0,
            quality=60, method=4, minimize_size=True,
        )  # fmt: skip


def film(running: Browser, server: ServerProcess, into: Path) -> None:
    """One answer and one kill."""
    wait_for_standby(server)
    page = Look(name="film", size=FILM_SIZE).open(running, server.base_url)
    shown = Film(page)
    ask(page)
    verdict(page, "✓")
    page.wait_for_timeout(300)
    last = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = into / "kill.webp"
    shown.save(path, last)
    size = path.stat().st_size
    print(f"{path}: {size // 1024} KiB", flush=True)
    if size >= FILM_BYTES_MAX:
        sys.exit(f"{path} has {size} bytes; less than {FILM_BYTES_MAX} are wanted")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the page from a real run.")
    parser.add_argument("--into", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        demo_server(parse_demo([]), Path(scratch)) as server,
        browser.running_browser() as running,
    ):
        server.start()
        server.wait_ready(timeout_s=READY_MAX_S)
        idle(running, server, options.into)
        film(running, server, options.into)
        for look in LOOKS:
            losses(running, server, options.into, look)
        silence(running, server, options.into)


if __name__ == "__main__":
    main()
