"""An animated picture of what a browser shows, as fast as it was."""

from __future__ import annotations

import base64
import io
from bisect import bisect
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page

FRAME_MS, LAST_FRAME_MS = 200, 4000


class Film:
    """The frames that the browser shows, with their times; begins at once.

    The browser makes the next one when it is told that the last one has arrived: `wait` does so once per FRAME_MS, or making
    frames would take the processor that the workers compute on.
    """

    def __init__(self, page: Page) -> None:
        self.speed = 1.0  # from now on
        self._page = page
        self._frames: list[tuple[float, bytes]] = []  # when it is shown in the film, PNG
        self._last_ms: float | None = None
        self._unanswered: list[int] = []
        self._session = page.context.new_cdp_session(page)
        self._session.on("Page.screencastFrame", self._take)
        self._session.send("Page.startScreencast", {"format": "png", "everyNthFrame": 1})

    def _take(self, frame: dict[str, Any]) -> None:
        now_ms = 1000 * float(frame["metadata"]["timestamp"])
        film_ms = self._frames[-1][0] if self._frames else 0.0
        passed_ms = 0.0 if self._last_ms is None else max(0.0, now_ms - self._last_ms)
        self._last_ms = now_ms
        self._frames.append((film_ms + passed_ms / self.speed, base64.b64decode(frame["data"])))
        self._unanswered.append(frame["sessionId"])

    def wait(self, ms: float = FRAME_MS) -> None:
        """Film for so long."""
        for _ in range(round(ms / FRAME_MS)):
            self._page.wait_for_timeout(FRAME_MS)
            while self._unanswered:
                self._session.send("Page.screencastFrameAck", {"sessionId": self._unanswered.pop()})

    def _scenes(self) -> list[tuple[bytes, int]]:
        """What stands there at every FRAME_MS, and for how long."""
        times = [at_ms for at_ms, _ in self._frames]
        scenes: list[tuple[bytes, int]] = []
        for tick in range(round(times[-1] / FRAME_MS) + 2):
            _, picture = self._frames[bisect(times, tick * FRAME_MS) - 1]
            if scenes and scenes[-1][0] is picture:
                scenes[-1] = (picture, scenes[-1][1] + FRAME_MS)
            else:
                scenes.append((picture, FRAME_MS))
        return scenes

    def save(self, path: Path) -> None:
        """As an endless loop that rests on the last frame."""
        self._session.send("Page.stopScreencast")
        scenes = self._scenes()
        first, *others = [Image.open(io.BytesIO(picture)).convert("RGB") for picture, _ in scenes]
        durations = [*(duration for _, duration in scenes[:-1]), LAST_FRAME_MS]
        first.save(
            path, save_all=True, append_images=others, duration=durations, loop=0, lossless=True, method=4
        )
        print(f"{path}: {len(scenes)} frames, {sum(durations) / 1000:.1f} s", flush=True)
