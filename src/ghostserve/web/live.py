"""`GET /ghostserve/live`: the status as it changes, over server-sent events, with how far each rank is.

Reads the control page only. However many watch, a document is put together at most five times per second, and once per second while
nothing is served and nothing changes. Nobody is waited for: an error ends the stream of the one who watches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

from fastapi import APIRouter, HTTPException, Request, Response, params

from ghostserve.arena.names import Progress, Stamp
from ghostserve.clock import monotonic_s
from ghostserve.web.event_stream import HEARTBEAT, EventStream, event_bytes

logger = logging.getLogger(__name__)

PERIOD_S, IDLE_PERIOD_S, HEARTBEAT_S = 0.2, 1.0, 5.0
WATCHERS_MAX = 32

Document = Callable[[], Mapping[str, Any]]


class ProgressPage(Protocol):
    """What is needed of the control page."""

    def read_stamp(self, rank: int) -> Stamp:
        """The rank's last stamp."""

    def progress(self, rank: int) -> Progress:
        """How far it is, as it says itself."""


def rank_progress(page: ProgressPage, rank: int, now_s: float) -> dict[str, Any]:
    """How long ago the rank stamped a step, and the sums that tell the time of a step."""
    stamp, progress = page.read_stamp(rank), page.progress(rank)
    return {
        "rank": rank,
        "step": stamp.step,
        "age_s": round(max(0.0, now_s - stamp.at_s), 3) if stamp.at_s else None,
        "steps": progress.steps,
        "in_steps_s": round(progress.in_steps_s, 6),
        "waited_s": round(progress.waited_s, 6),
    }


class Live:
    """The document that all who watch are sent, made anew when it is older than PERIOD_S."""

    def __init__(self, page: ProgressPage, document: Document) -> None:
        self._page = page
        self._document = document
        self._made_at_s = -PERIOD_S
        self.watchers = 0
        self.event = b""
        self.urgent: object = None  # what has to be shown at once if it changes
        self.busy = False

    def refresh(self, now_s: float) -> None:
        """Make it anew if it is time."""
        if now_s - self._made_at_s < PERIOD_S:
            return
        self._made_at_s = now_s
        document = self._document()
        progress = [rank_progress(self._page, rank["rank"], now_s) for rank in document["ranks"]]
        self.event = event_bytes({**document, "progress": progress})
        ranks = [(rank["pid"], rank["state"]) for rank in document["ranks"]]
        requests_open = document["counters"].get("requests_open", 0)
        restart = document.get("restart", {}).get("state")
        self.urgent = (
            document["state"],
            document.get("phase"),
            document.get("draining"),
            document["epoch"],
            ranks,
            requests_open,
            restart,
        )
        self.busy = bool(requests_open) or document["state"] != "serving" or restart == "running"

    async def events(self) -> AsyncGenerator[bytes]:
        """For one who watches: the document now, then whenever it is due; without end."""
        shown: object = None
        sent_at_s = -IDLE_PERIOD_S
        self.watchers += 1
        try:
            while True:
                now_s = monotonic_s()
                try:
                    self.refresh(now_s)
                except HTTPException:  # there is no document yet
                    if now_s - sent_at_s >= HEARTBEAT_S:
                        sent_at_s = now_s
                        yield HEARTBEAT
                else:
                    period_s = PERIOD_S if self.busy else IDLE_PERIOD_S
                    if self.urgent != shown or now_s - sent_at_s >= period_s:
                        shown, sent_at_s = self.urgent, now_s
                        yield self.event
                await asyncio.sleep(PERIOD_S)
        except Exception:
            logger.exception("the live status could not be put together")
        finally:
            self.watchers -= 1


def add_live(
    router: APIRouter, page: ProgressPage, document: Document, *, dependencies: Sequence[params.Depends]
) -> None:
    """The route; `document` is what `/ghostserve/status` answers, and may raise its HTTPException."""
    live = Live(page, document)

    @router.get("/ghostserve/live", dependencies=dependencies)
    async def watch(request: Request) -> Response:
        if live.watchers >= WATCHERS_MAX:
            raise HTTPException(
                503, f"{WATCHERS_MAX} pages watch already; close one, or ask /ghostserve/status"
            )
        return EventStream(live.events(), request)
