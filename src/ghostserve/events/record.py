"""An event with its time and place in the order, and its JSON: what the route, the file and the tools exchange. Pure.

{"seq": 1795352400000012, "at": "2026-11-22T13:00:00.123456Z", "kind": "rank_lost", "rank": 1, "request": null,
 "text": "rank 1 (process 1520) is lost (crash): ...", "data": {"cause": "crash", "pid": 1520, "reason": "..."}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ghostserve.events.kinds import Event, event_of
from ghostserve.events.sentences import text_of


def at_text(at_s: float) -> str:
    """Seconds since the epoch as RFC 3339, in UTC, to the microsecond."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def at_seconds(text: str) -> float:
    """The other way round; without an offset it is UTC. Raises ValueError."""
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True)
class Record:
    """`seq` grows by one with each event; a gap stands for events that were lost, or for a restart of the server."""

    seq: int
    at_s: float
    event: Event

    def as_dict(self) -> dict[str, Any]:
        values = self.event.values()
        rank, request = values.pop("rank"), values.pop("request")
        return {
            "seq": self.seq,
            "at": at_text(self.at_s),
            "kind": self.event.kind,
            "rank": rank,
            "request": request,
            "text": text_of(self.event),
            "data": values,
        }

    def to_json(self) -> str:
        """`as_dict` on one line."""
        return json.dumps(self.as_dict(), separators=(",", ":"))


def record_of(doc: Mapping[str, Any]) -> Record | None:
    """From `as_dict`; None for a kind that is not known. Raises ValueError for what is no record."""
    try:
        values = {**doc["data"], "rank": doc["rank"], "request": doc["request"]}
        seq, at_s = int(doc["seq"]), at_seconds(doc["at"])
        event = event_of(doc["kind"], values)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no event record: {type(error).__name__} {error}") from None
    return None if event is None else Record(seq, at_s, event)


# -- in shared memory ------------------------------------------------------------------------------------------

_CLIPS = (400, 120, 40)
# Made once, as this runs between two steps. With escapes, as reasons may hold what is no valid Unicode.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


def pack(event: Event, at_s: float, *, bytes_max: int) -> bytes | None:
    """For a slot of shared memory: long texts are clipped until it fits; None if it cannot."""
    values = {name: value for name, value in event.values().items() if value is not None}
    packed = _encode([event.kind, at_s, values]).encode()
    for chars in _CLIPS:
        if len(packed) <= bytes_max:
            return packed
        clipped = {name: _clip(value, chars) for name, value in values.items()}
        packed = _encode([event.kind, at_s, clipped]).encode()
    return packed if len(packed) <= bytes_max else None


def _clip(value: Any, chars: int) -> Any:
    return f"{value[: chars - 1]}…" if isinstance(value, str) and len(value) > chars else value


def unpack(packed: bytes) -> tuple[float, Event] | None:
    """What `pack` made; None for a kind that is not known. Raises ValueError."""
    kind, at_s, values = json.loads(packed)
    event = event_of(kind, values)
    return None if event is None else (float(at_s), event)
