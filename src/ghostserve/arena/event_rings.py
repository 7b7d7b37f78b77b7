"""The rings of events on the control page: who writes which, and how an event gets in and out.

    engine core ──▶ engine     what happens to ranks, standbys, protection
                └─▶ requests   as many as there are requests: they must not push out the others
    front ───────▶ front       keeper, start and end, injected faults

`tell` never raises and never waits for anybody but another thread that tells: an event that cannot be told is counted.
The front process looks often enough (`events/log.py`) that the rings need not be long.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ghostserve.arena.record_ring import RecordRing
from ghostserve.clock import monotonic_s, wall_s
from ghostserve.events.kinds import OF_REQUESTS, Event
from ghostserve.events.record import pack, unpack

logger = logging.getLogger(__name__)


CLOCK_SET_S = 0.002


class Ring(Enum):
    """(slots, bytes per slot)"""

    ENGINE = (512, 1024)
    REQUESTS = (1024, 512)
    FRONT = (128, 1024)


RINGS_BYTES = sum(
    RecordRing.required_bytes(slots=slots, slot_bytes=size) for slots, size in (ring.value for ring in Ring)
)


class Teller(Enum):
    """A process that writes events, with its rings: for events of requests, and for the others."""

    ENGINE = (Ring.REQUESTS, Ring.ENGINE)
    FRONT = (Ring.FRONT, Ring.FRONT)


@dataclass(frozen=True, slots=True)
class News:
    """What came since the last look: (seconds since the epoch, event), by time; and how many were lost."""

    events: Sequence[tuple[float, Event]]
    lost: int


class EventRings:
    """A process's view. `teller`: who it is; None: it only reads, and what it tells goes nowhere."""

    def __init__(self, view: memoryview, *, teller: Teller | None) -> None:
        self._rings: dict[Ring, RecordRing] = {}
        at = 0
        for ring in Ring:
            slots, size = ring.value
            end = at + RecordRing.required_bytes(slots=slots, slot_bytes=size)
            self._rings[ring] = RecordRing(view[at:end], slots=slots, slot_bytes=size)
            at = end
        self._teller = teller
        self._seen = dict.fromkeys(Ring, 0)
        self._offset_s = 0.0  # from monotonic time to that of the wall
        self.untold = 0  # events of this process that could not be told

    def tell(self, event: Event, *, at_monotonic_s: float | None = None) -> None:
        """It has happened: now, or at that time of the monotonic clock. Never raises."""
        if self._teller is None:
            return
        try:
            of_requests, others = self._teller.value
            ring = self._rings[of_requests if event.kind in OF_REQUESTS else others]
            packed = pack(event, self._wall_s(at_monotonic_s), bytes_max=ring.payload_max_bytes)
            if packed is None:
                raise ValueError(f"longer than {ring.payload_max_bytes} bytes")
            ring.write(packed)
        except Exception as error:  # serving goes on without it
            self.untold += 1
            if self.untold == 1:
                logger.warning(
                    "an event (%s) could not be told: %s; further ones are only counted", event.kind, error
                )

    def _wall_s(self, at_monotonic_s: float | None) -> float:
        """By the same offset until the wall's clock is set, so that the order stays that of the monotonic clock."""
        now_s = monotonic_s()
        offset_s = wall_s() - now_s
        if abs(offset_s - self._offset_s) > CLOCK_SET_S:
            self._offset_s = offset_s
        return self._offset_s + (now_s if at_monotonic_s is None else at_monotonic_s)

    def look(self) -> News:
        """What came since the last look, of all processes. One thread at a time."""
        events: list[tuple[float, Event]] = []
        lost = 0
        # REQUESTS last: whoever sees the end of a recovery has seen all that was told of requests before it.
        for ring in (Ring.FRONT, Ring.ENGINE, Ring.REQUESTS):
            self._seen[ring], read = self._rings[ring].read(self._seen[ring])
            lost += read.lost
            for payload in read.payloads:
                try:
                    found = unpack(payload)
                except ValueError:  # not ours
                    found = None
                if found is None:
                    lost += 1
                else:
                    events.append(found)
        return News(sorted(events, key=lambda item: item[0]), lost)
