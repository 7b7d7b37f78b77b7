"""Makes the pictures of the page from a real run of a real server; nothing in them is drawn by hand.

    scripts/pictures [--into docs/pictures] [--only idle film losses reconnecting]

States: idle, streaming, recovering, recovered, mismatch (the restore is switched off), reconnecting; each light, dark and narrow.
The film, `film.py`: one answer, a kill in the middle of it, the verdict and where its time went, in real time; only the
comparison with an unfailed run is shown faster.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect

import browser
from film import Film
from ghostserve.cli.demo import demo_server
from ghostserve.cli.demo import parse as parse_demo
from ghostserve.testing.server import ServerProcess

TOKENS, SHOOT_AT, AIM_AT, KILL_AT = 800, 60, 150, 300
PARTS = ("idle", "film", "losses", "reconnecting")
READY_MAX_S, VERDICT_MAX_MS, TRIES = 300.0, 120_000, 3
FILM_SIZE: ViewportSize = {"width": 1080, "height": 700}
FILM_BYTES_MAX = 1_500_000
FILM_BEGIN_MS, FILM_READ_MS, FILM_SCROLL_MS, COMPARED_FASTER = 1000, 1600, 1200, 4.0
COLOURS = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How the page is seen."""

    name: str
    size: ViewportSize
    dark: bool = False

    def open(self, running: Browser, url: str) -> Page:
        context = running.new_context(viewport=self.size, color_scheme="dark" if self.dark else "light")
        page = context.new_page()
        page.goto(url + "/ui")
        expect(page.locator("#rank-1 .state")).to_have_text("alive", timeout=30_000)
        expect(page.locator("#prompt")).not_to_be_empty()
        expect(page.locator("#no-events")).to_be_hidden()
        return page


LOOKS = (
    Look(name="light", size={"width": 1280, "height": 940}),
    Look(name="dark", size={"width": 1280, "height": 940}, dark=True),
    Look(name="narrow", size={"width": 360, "height": 740}),
)


# In the page itself: what is asked for from here comes when a fast answer has ended. First it is shown where the key will be pressed.
KILL = """([aimAt, at]) => {
  const button = document.querySelector("#rank-1 .kill"), bar = document.getElementById("progress");
  const timer = setInterval(() => {
    if (bar.value < aimAt || bar.max === 1) return;
    button.focus({preventScroll: true});
    if (bar.value < at) return;
    clearInterval(timer);
    button.click();
  }, 10);
}"""
TOO_LATE = f"in {TRIES} answers the kill came too late; TOKENS is too small for this machine"
SAYS = "text => document.getElementById('outcome').textContent.includes(text)"


def ask(page: Page) -> None:
    """Stream an answer; rank 1 is killed when KILL_AT tokens have arrived."""
    page.evaluate("() => { document.getElementById('progress').value = 0; }")
    page.get_by_label("Tokens", exact=True).fill(str(TOKENS))
    page.evaluate(KILL, [AIM_AT, KILL_AT])
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


def says(page: Page, text: str) -> None:
    """Wait for the line at the top, and miss nothing that stands there for a moment only."""
    page.wait_for_function(SAYS, arg=text, timeout=VERDICT_MAX_MS)


def recovered(page: Page) -> bool:
    """Whether the kill came in time; a verdict on an answer that nobody disturbed makes no picture."""
    return "recovered in" in page.locator("#outcome").inner_text()


def lose(page: Page, server: ServerProcess, mark: str) -> None:
    """An answer in which a worker was killed, up to the verdict."""
    for _ in range(TRIES):
        wait_for_standby(server)
        ask(page)
        says(page, mark)
        if recovered(page):
            return
    sys.exit(TOO_LATE)


@contextmanager
def standing_still(server: ServerProcess) -> Iterator[None]:
    """The page is told nothing meanwhile: what lasts half a second can be photographed."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def shoot(page: Page, look: Look, into: Path, state: str) -> None:
    """One picture of the whole page, with as many colours as it needs."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
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


def recovering(page: Page, server: ServerProcess, look: Look, into: Path) -> None:
    """An answer that streams, and the half second after the kill."""
    for _ in range(TRIES):
        wait_for_standby(server)
        ask(page)
        page.wait_for_function("at => document.getElementById('progress').value >= at", arg=SHOOT_AT)
        shoot(page, look, into, "streaming")
        page.wait_for_function(
            "() => /recovering|recovered|✓/.test(document.getElementById('outcome').textContent)"
        )
        with standing_still(server):
            found = "recovering" in page.locator("#outcome").inner_text()
            if found:
                shoot(page, look, into, "recovering")
        page.get_by_role("button", name="Stop").press("Enter")
        expect(page.locator("#stop")).to_have_attribute("aria-disabled", "true", timeout=VERDICT_MAX_MS)
        if found:
            return
    sys.exit(TOO_LATE)


def losses(running: Browser, server: ServerProcess, into: Path, look: Look) -> None:
    """A loss that is photographed while it lasts, one whose times are its own, and one whose restore is switched off."""
    page = look.open(running, server.base_url)
    recovering(page, server, look, into)
    lose(page, server, "✓")
    shoot(page, look, into, "recovered")
    server.set_switch("skip_restore", True)
    lose(page, server, "✗")
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


def film(running: Browser, server: ServerProcess, into: Path) -> None:
    """One answer and one kill."""
    page = Look(name="film", size=FILM_SIZE).open(running, server.base_url)
    wait_for_standby(server)
    shown = Film(page)
    shown.wait(FILM_BEGIN_MS)
    ask(page)
    while "✓" not in (line := page.locator("#outcome").inner_text()):
        if "✗" in line or "broke" in line:
            sys.exit(f"no picture for the README: {line}")
        shown.speed = COMPARED_FASTER if "comparing" in line else 1.0
        shown.wait()
    if not recovered(page):
        sys.exit(TOO_LATE)
    shown.speed = 1.0
    shown.wait(FILM_READ_MS)
    page.locator("#outcome-panel").evaluate("panel => panel.scrollIntoView({behavior: 'smooth'})")
    shown.wait(FILM_SCROLL_MS)
    path = into / "kill.webp"
    shown.save(path)
    page.context.close()
    size = path.stat().st_size
    print(f"{path}: {size // 1024} KiB", flush=True)
    if size >= FILM_BYTES_MAX:
        sys.exit(f"{path} has {size} bytes; less than {FILM_BYTES_MAX} are wanted")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the page from a real run.")
    parser.add_argument("--into", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="not all of them")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        demo_server(parse_demo([]), Path(scratch)) as server,
        browser.running_browser() as running,
    ):
        server.start()
        server.wait_ready(timeout_s=READY_MAX_S)
        if "idle" in options.only:
            idle(running, server, options.into)
        if "film" in options.only:
            film(running, server, options.into)
        for look in LOOKS if "losses" in options.only else ():
            losses(running, server, options.into, look)
        if "reconnecting" in options.only:
            silence(running, server, options.into)


if __name__ == "__main__":
    main()
