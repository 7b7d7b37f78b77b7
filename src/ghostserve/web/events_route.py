"""What has happened, as JSON or as a stream. Reads the event log of this process only, so it answers during an outage.

    GET /ghostserve/events?after=SEQ&limit=N
        {"events": [{"seq", "at", "kind", "rank", "request", "text", "data"}], "next": SEQ, "dropped": N}

`after` is where the last answer's `next` was; without it the newest `limit` events come. `dropped` of those in between
are gone. With `Accept: text/event-stream` or `?follow=1` the same objects come as server-sent events (`id` is the seq,
`event` the kind), from `after` or `Last-Event-ID` on. A place in the log of
an earlier server is before all of this one's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response, params

from ghostserve.clock import monotonic_s
from ghostserve.events.log import EventLog, Excerpt
from ghostserve.events.record import Record
from ghostserve.web.event_stream import HEARTBEAT, EventStream

LIMIT, LIMIT_MAX = 100, 1000
SEQ_MAX = (1 << 53) - 1  # what a JSON number holds exactly everywhere
POLL_S = 0.1
HEARTBEAT_S = 15.0  # below the 30 to 60 s after which proxies take a silent connection for dead
FOLLOWERS_MAX = 64
_RETRY_MS = 1000
_NO_STORE = {"Cache-Control": "no-store"}


class _Followers:
    """How many streams are open; all of one server's are in one thread."""

    def __init__(self) -> None:
        self.open = 0


def add_events(router: APIRouter, log: EventLog, *, dependencies: Sequence[params.Depends]) -> None:
    """Mount the route, with the access rules of the status."""
    followers = _Followers()

    @router.get("/ghostserve/events", dependencies=dependencies, response_model=None)
    async def events(
        request: Request,
        response: Response,
        after: Annotated[int | None, Query(ge=0, le=SEQ_MAX)] = None,
        limit: Annotated[int, Query(ge=1, le=LIMIT_MAX)] = LIMIT,
        follow: bool = False,
    ) -> dict[str, Any] | EventStream:
        if follow or "text/event-stream" in request.headers.get("accept", ""):
            if followers.open >= FOLLOWERS_MAX:
                raise HTTPException(
                    503, f"{FOLLOWERS_MAX} streams of events are open; close one, or ask without follow"
                )
            place = _last_event_id(request)
            first = _excerpt(log, after if place is None else place, limit)
            return EventStream(_stream(log, first, followers), request)
        response.headers.update(_NO_STORE)
        excerpt = _excerpt(log, after, limit)
        return {
            "events": [record.as_dict() for record in excerpt.records],
            "next": excerpt.next,
            "dropped": excerpt.dropped,
        }


def _excerpt(log: EventLog, after: int | None, limit: int) -> Excerpt:
    return log.latest(limit) if after is None else log.after(after, limit=limit)


def _last_event_id(request: Request) -> int | None:
    """Where a client that was cut off goes on; one that says something else starts as if it were new."""
    text = request.headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(SEQ_MAX)) else None


async def _stream(log: EventLog, first: Excerpt, followers: _Followers) -> AsyncGenerator[bytes]:
    """Without end; `EventStream` ends it with the client or the server."""
    followers.open += 1
    try:
        yield f"retry: {_RETRY_MS}\n\n".encode()
        excerpt, silent_since_s = first, monotonic_s()
        while True:
            if excerpt.records:
                silent_since_s = monotonic_s()
                yield b"".join(map(_as_sse, excerpt.records))
            elif monotonic_s() - silent_since_s >= HEARTBEAT_S:
                silent_since_s = monotonic_s()
                yield HEARTBEAT
            else:
                await asyncio.sleep(POLL_S)
            excerpt = log.after(excerpt.next, limit=LIMIT_MAX)
    finally:
        followers.open -= 1


def _as_sse(record: Record) -> bytes:
    data = json.dumps(record.as_dict(), separators=(",", ":"))
    return f"id: {record.seq}\nevent: {record.event.kind}\ndata: {data}\n\n".encode()
