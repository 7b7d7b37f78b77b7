"""A record in shared memory that one process writes and others read, without a lock between them.

Theory of operation: two copies, written in turn, each with a sequence number and a crc32 over everything.

    | seq | length | crc | payload ... |  | seq | length | crc | payload ... |

A reader takes the whole copy with the highest number whose crc holds. A writer that dies in the middle tears
only the older copy, so the record before it stays readable; a reader never waits for anybody. Since the crc
covers all bytes, it also tells a copy that another processor sees only in part.
"""

from __future__ import annotations

import struct
import threading
import zlib

from ghostserve.errors import BudgetExceeded

_HEADER = struct.Struct("<QQQ")  # seq, length, crc
_SEQUENCE = struct.Struct("<QQ")
_READ_ATTEMPTS = 64  # a reader meets a torn copy only while a writer laps it

_fence_lock = threading.Lock()


def fence() -> None:
    """What this thread wrote before becomes visible to other processors before what it writes after.

    x86 keeps that order by itself; Arm does not. A lock released and taken again orders the two sides.
    """
    with _fence_lock:
        pass
    with _fence_lock:
        pass


class SharedRecord:
    """One record in `view`, a writable byte view of `required_bytes(payload_max)` bytes.

    One process at a time writes; a later one (a replacement) continues the numbers it finds.
    """

    def __init__(self, view: memoryview, *, payload_max_bytes: int) -> None:
        half = len(view) // 2
        assert half >= _HEADER.size + payload_max_bytes, (len(view), payload_max_bytes)
        self._copies = (view[:half], view[half : 2 * half])
        self._payload_max_bytes = payload_max_bytes
        self._written = 0  # 0: nothing written by this process yet
        self._lock = threading.Lock()

    @staticmethod
    def required_bytes(payload_max_bytes: int) -> int:
        return 2 * (_HEADER.size + payload_max_bytes)

    def write(self, payload: bytes) -> None:
        """Replace the record. BudgetExceeded if `payload` is longer than the record's room."""
        if len(payload) > self._payload_max_bytes:
            raise BudgetExceeded(f"a record of {len(payload)} bytes, room for {self._payload_max_bytes}")
        with self._lock:
            if self._written == 0:
                self._written = max(self._valid(copy)[0] for copy in self._copies)
                self._latest = 0 if self._valid(self._copies[0])[0] == self._written else 1
            self._written += 1
            self._latest ^= 1
            copy = self._copies[self._latest]
            crc = zlib.crc32(payload, zlib.crc32(_SEQUENCE.pack(self._written, len(payload))))
            header = _HEADER.pack(self._written, len(payload), crc)
            copy[: _HEADER.size + len(payload)] = header + payload

    def read(self) -> bytes | None:
        """The record; None if none was ever written, or a writer lapped this reader again and again.

        With one reader's calls the record never goes back to an older one.
        """
        for _ in range(_READ_ATTEMPTS):
            numbers = [_SEQUENCE.unpack_from(copy)[0] for copy in self._copies]
            newer = 0 if numbers[0] > numbers[1] else 1
            sequence, payload = self._valid(self._copies[newer])
            if sequence:
                return payload
            if not any(numbers):
                return None
            # Being written or torn for good: the other one holds, unless the writer has come round to it.
            older = self._copies[newer ^ 1]
            sequence, payload = self._valid(older)
            if sequence and _SEQUENCE.unpack_from(older)[0] == sequence == numbers[newer ^ 1]:
                return payload
        return None

    def _valid(self, copy: memoryview) -> tuple[int, bytes]:
        """(seq, payload) of a copy, (0, b"") if it was never written or is torn."""
        sequence, length, crc = _HEADER.unpack_from(copy)
        if not sequence or length > self._payload_max_bytes:
            return 0, b""
        payload = bytes(copy[_HEADER.size : _HEADER.size + length])
        if zlib.crc32(payload, zlib.crc32(_SEQUENCE.pack(sequence, length))) != crc:
            return 0, b""
        return sequence, payload
