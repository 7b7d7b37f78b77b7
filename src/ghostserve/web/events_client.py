"""Following a server's events: a stream that is taken up again by itself where it broke off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx

from ghostserve.clock import sleep_s
from ghostserve.errors import GhostserveError
from ghostserve.events.record import Record, record_of
from ghostserve.web.admin import AdminClient
from ghostserve.web.events_route import HEARTBEAT_S, LIMIT_MAX

BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 10.0
READ_TIMEOUT_S = 3 * HEARTBEAT_S  # a connection without heartbeats is dead


def kept_events(admin: AdminClient) -> Iterator[tuple[Record, int]]:
    """All that the server still knows: (record, how many before it are gone since the last one). Ends also where events
    come faster than they are asked for.
    """
    place = 0
    while True:
        answer = admin.events(after=place, limit=LIMIT_MAX)
        dropped = int(answer["dropped"])
        for doc in answer["events"]:
            if (record := record_of(doc)) is not None:
                yield record, dropped
                dropped = 0
        if len(answer["events"]) < LIMIT_MAX:
            return
        place = answer["next"]


def follow(admin: AdminClient, *, after: int, on_break: Callable[[str], None]) -> Iterator[Record]:
    """Everything behind `after`, for ever. `on_break(why)` is told when the connection is lost, once each time.

    Raises GhostserveError for what waiting does not mend: a wrong key, no such route.
    """
    place, pause_s, told = after, BACKOFF_MIN_S, False
    while True:
        try:
            for record in _stream(admin, place):
                place, pause_s, told = record.seq, BACKOFF_MIN_S, False
                yield record
            why = "the server ended the stream"
        except httpx.HTTPError as error:
            why = f"no connection ({type(error).__name__})"
        if not told:
            on_break(why)
            told = True
        sleep_s(pause_s)
        pause_s = min(2 * pause_s, BACKOFF_MAX_S)


def _stream(admin: AdminClient, place: int) -> Iterator[Record]:
    """One connection. Raises httpx.HTTPError when it breaks."""
    with admin.stream(
        f"/ghostserve/events?follow=1&after={place}&limit={LIMIT_MAX}", read_timeout_s=READ_TIMEOUT_S
    ) as lines:
        for line in lines:
            if line.startswith("data:"):
                try:
                    record = record_of(json.loads(line[5:]))
                except ValueError:
                    raise GhostserveError(f"{admin.url} sent what is no event: {line[:120]!r}") from None
                if record is not None:
                    yield record
