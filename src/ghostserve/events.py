"""What happened, in order: a bounded log that people and tests can ask.

Configures no logging and reads no clock. An event is about one request (field `request_id`), about several
(`request_ids`) or about the server (neither).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType

FieldValue = str | int | float | bool | tuple[str, ...] | tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. `number` counts from 0 and has no gaps, so a reader sees what it missed."""

    number: int
    at_s: float
    kind: str
    fields: Mapping[str, FieldValue]

    def names(self, request_id: str) -> bool:
        """Whether the event is about this request."""
        many = self.fields.get("request_ids")
        return self.fields.get("request_id") == request_id or (isinstance(many, tuple) and request_id in many)

    @property
    def is_of_server(self) -> bool:
        """Whether the event is about no request in particular."""
        return "request_id" not in self.fields and "request_ids" not in self.fields

    def line(self) -> str:
        """The event in one line, for people."""
        return " ".join((f"{self.at_s:.3f}", self.kind, *(f"{k}={v}" for k, v in self.fields.items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class EventStatistics:
    """How much was logged since the start; kinds count dropped events too."""

    added: int
    kept: int
    dropped: int
    by_kind: Mapping[str, int]


class EventLog:
    """The last `events_max` events. Every method may be called from any thread."""

    def __init__(self, events_max: int = 4096) -> None:
        assert events_max >= 1
        self._lock = Lock()
        self._events: deque[Event] = deque(maxlen=events_max)
        self._by_kind: Counter[str] = Counter()
        self._added = 0

    def add(self, now_s: float, kind: str, /, **fields: FieldValue) -> Event:
        """Append an event, dropping the oldest if full. Order is that of the calls, whatever `now_s` says."""
        with self._lock:
            event = Event(number=self._added, at_s=now_s, kind=kind, fields=MappingProxyType(fields))
            self._events.append(event)
            self._by_kind[kind] += 1
            self._added += 1
            return event

    def story(self, request_id: str | None = None) -> tuple[Event, ...]:
        """What happened to a request: its events and, between its first and last, those of the server.

        None: everything that is kept.
        """
        with self._lock:
            events = tuple(self._events)
        if request_id is None:
            return events
        own = [i for i, event in enumerate(events) if event.names(request_id)]
        if not own:
            return ()
        return tuple(e for e in events[own[0] : own[-1] + 1] if e.names(request_id) or e.is_of_server)

    def statistics(self) -> EventStatistics:
        """A snapshot."""
        with self._lock:
            kept = len(self._events)
            return EventStatistics(
                added=self._added,
                kept=kept,
                dropped=self._added - kept,
                by_kind=MappingProxyType(dict(self._by_kind)),
            )

    def check(self) -> None:
        """Counts agree and numbers have no gap."""
        with self._lock:
            assert sum(self._by_kind.values()) == self._added
            first = self._added - len(self._events)
            assert [e.number for e in self._events] == list(range(first, self._added))
