"""A ring of records in shared memory: one process writes, any other reads, nobody waits for anybody.

    | head |  slot 0: seq · length · crc · payload |  slot 1 ... |        record n is in slot n mod slots, from 1 on

Theory of operation. A writer fills the next slot and only then raises `head`, so a writer that dies in between leaves
one record that was never there; whoever writes next goes on behind `head`. A reader takes what lies between the last
record it saw and `head`; a slot that holds another number by then, or whose crc does not hold, was overwritten on the
way: that record is lost, and counted. The crc also tells a slot that another processor sees only in part.

Knows bytes, not their meaning. Writing takes microseconds and no system call.
"""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass

from ghostserve.arena.records import fence
from ghostserve.errors import BudgetExceeded

_HEAD_BYTES = 64  # a cache line of its own
_SLOT = struct.Struct("<QII")  # seq, length, crc
_IDENTITY = struct.Struct("<QI")


@dataclass(frozen=True, slots=True)
class RingRead:
    """What came since the last look: whole records, oldest first, and how many are gone."""

    payloads: tuple[bytes, ...]
    lost: int


class RecordRing:
    """`slots` records of up to `slot_bytes` less a header in `view`; its one writer may have several threads."""

    def __init__(self, view: memoryview, *, slots: int, slot_bytes: int) -> None:
        assert len(view) >= self.required_bytes(slots=slots, slot_bytes=slot_bytes), (len(view), slots)
        assert slot_bytes > _SLOT.size
        self._view = view
        # Stored and loaded as one word: struct.pack_into clears its bytes first, and a reader would see a head of 0 in between.
        self._head = view[:8].cast("Q")
        self._slots, self._slot_bytes = slots, slot_bytes
        self.payload_max_bytes = slot_bytes - _SLOT.size
        self._lock = threading.Lock()

    @staticmethod
    def required_bytes(*, slots: int, slot_bytes: int) -> int:
        return _HEAD_BYTES + slots * slot_bytes

    @property
    def head(self) -> int:
        """The number of the last record; 0: there is none."""
        return self._head[0]

    def write(self, payload: bytes) -> None:
        """Append a record; the oldest is overwritten. BudgetExceeded if it is longer than `payload_max_bytes`."""
        if len(payload) > self.payload_max_bytes:
            raise BudgetExceeded(f"a record of {len(payload)} bytes, room for {self.payload_max_bytes}")
        with self._lock:
            seq = self.head + 1
            at = self._at(seq)
            crc = zlib.crc32(payload, zlib.crc32(_IDENTITY.pack(seq, len(payload))))
            self._view[at : at + _SLOT.size] = _SLOT.pack(seq, len(payload), crc)
            self._view[at + _SLOT.size : at + _SLOT.size + len(payload)] = payload
            fence()
            self._head[0] = seq

    def read(self, after: int) -> tuple[int, RingRead]:
        """The records behind number `after`, and the number to ask with next time. Bounded by the ring's size."""
        head = self.head
        fence()
        oldest = max(after + 1, head - self._slots + 1)
        found = [payload for seq in range(oldest, head + 1) if (payload := self._get(seq)) is not None]
        return head, RingRead(tuple(found), max(0, head - after - len(found)))

    def _get(self, number: int) -> bytes | None:
        at = self._at(number)
        seq, length, crc = _SLOT.unpack_from(self._view, at)
        if seq != number or length > self.payload_max_bytes:
            return None
        payload = bytes(self._view[at + _SLOT.size : at + _SLOT.size + length])
        return payload if zlib.crc32(payload, zlib.crc32(_IDENTITY.pack(seq, length))) == crc else None

    def _at(self, number: int) -> int:
        return _HEAD_BYTES + number % self._slots * self._slot_bytes
