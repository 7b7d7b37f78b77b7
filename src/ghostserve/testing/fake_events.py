"""A stand-in for the event log: `GET /ghostserve/events` over a list in memory, as the page asks for it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from ghostserve.clock import wall_s


class FakeEvents:
    """What has happened, oldest first; sequence numbers count from 1."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def add(self, kind: str, text: str, *, rank: int | None = None) -> None:
        """Something has happened now."""
        at = datetime.fromtimestamp(wall_s(), UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        event = {
            "seq": len(self._events) + 1,
            "at": at,
            "kind": kind,
            "rank": rank,
            "request": None,
            "text": text,
        }
        self._events.append({**event, "data": {}})

    def add_route(self, router: APIRouter) -> None:
        """Answer for the log of a real server."""

        @router.get("/ghostserve/events")
        def events(after: int | None = None, limit: int = 100) -> dict[str, Any]:
            after = max(0, len(self._events) - limit) if after is None else after
            found = self._events[after : after + limit]
            return {"events": found, "next": after + len(found), "dropped": 0}
