"""The event log of the front process: what the rings told, numbered, as much as is kept. Asks nobody.

Whoever reads also collects, so a reader never sees less than what was told before it asked. Readers keep a place of
their own (`after`), so that one that is slow holds nobody up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile
from typing import Protocol

from ghostserve.events.kinds import OF_REQUESTS, Event, RequestResumed
from ghostserve.events.record import Record

KEPT_MAX, KEPT_OF_REQUESTS_MAX = 4096, 8192  # about 1 KiB each


class News(Protocol):
    """What came since the last look, by time."""

    @property
    def events(self) -> Sequence[tuple[float, Event]]: ...

    @property
    def lost(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Records behind a place. `next`: where to go on from; `dropped`: how many between the two are gone."""

    records: Sequence[Record]
    next: int
    dropped: int


class EventLog:
    """Any thread may ask. Holds its lock over memory only."""

    def __init__(
        self,
        look: Callable[[], News],
        *,
        kept_max: int = KEPT_MAX,
        kept_of_requests_max: int = KEPT_OF_REQUESTS_MAX,
        base: int = 0,
    ) -> None:
        """The first event gets the number behind `base`. With the time as base numbers grow over restarts as well, and a
        reader's place in the log of a server before this one is simply behind all of it.
        """
        self._look = look
        self._lock = threading.Lock()
        self._base = self._last = base
        self._lost_total = 0
        self._others: deque[Record] = deque(maxlen=kept_max)
        self._of_requests: deque[Record] = deque(maxlen=kept_of_requests_max)
        self._resumed: deque[Record] = deque(
            maxlen=kept_of_requests_max
        )  # apart: every answer may ask for them

    @property
    def lost_total(self) -> int:
        """Events that were overwritten before anybody looked."""
        return self._lost_total

    def collect(self) -> int:
        """Take in what is new; the number of the last event."""
        with self._lock:
            news = self._look()
            self._lost_total += news.lost
            self._last += news.lost  # their numbers stay unused: a reader sees that something is missing
            for at_s, event in news.events:
                self._last += 1
                kept = self._of_requests if event.kind in OF_REQUESTS else self._others
                record = Record(self._last, at_s, event)
                kept.append(record)
                if isinstance(event, RequestResumed):
                    self._resumed.append(record)
            return self._last

    def after(self, place: int, *, limit: int) -> Excerpt:
        """The first `limit` events behind `place`. One that this log does not have is another server's: from the start."""
        last = self.collect()
        if not self._base <= place <= last:
            place = self._base
        if place == last:
            return Excerpt((), last, 0)
        with self._lock:
            found = list(
                merge(*(_behind(kept, place) for kept in self._kept()), key=lambda record: record.seq)
            )
        records = found[:limit]
        end = records[-1].seq if len(found) > limit else max(last, found[-1].seq if found else 0)
        return Excerpt(tuple(records), end, end - place - len(records))

    def latest(self, limit: int) -> Excerpt:
        """The last `limit` events."""
        self.collect()
        with self._lock:
            newest = sorted(
                (
                    record
                    for kept in self._kept()
                    for _, record in zip(range(limit), reversed(kept), strict=False)
                ),
                key=lambda record: record.seq,
            )[-limit:]
            end = self._last
        first = newest[0].seq - 1 if newest else end
        return Excerpt(tuple(newest), end, end - first - len(newest))

    def resumed_after(self, place: int) -> list[Record]:
        """The RequestResumed events behind `place`: cheap, however many requests there were."""
        self.collect()
        with self._lock:
            return _behind(self._resumed, place)

    def all(self) -> Sequence[Record]:
        """Everything that is kept."""
        return self.after(0, limit=KEPT_MAX + KEPT_OF_REQUESTS_MAX).records

    def _kept(self) -> Iterable[deque[Record]]:
        return (self._others, self._of_requests)


def _behind(kept: deque[Record], place: int) -> list[Record]:
    """The newest of them; a look from behind is short where little is new."""
    return list(takewhile(lambda record: record.seq > place, reversed(kept)))[::-1]
