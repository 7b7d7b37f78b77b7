"""Small records that ranks leave behind per step, so that they outlive the rank (its random-number states).

    rank 0: | steps 0, R, 2R.. | steps 1, R+1.. | ... |   rank 1: | ...
    record: | step | epoch | length | crc | payload |

A record is found only under the step and epoch it was written for, and only whole: its crc32 covers them and
the payload, so one that its rank died over reads as absent.
"""

from __future__ import annotations

import struct
import zlib

from ghostserve.arena.memfd import Segment
from ghostserve.errors import BudgetExceeded, UsageError

_HEADER = struct.Struct("<QQQQ")  # step, epoch, length, crc
_IDENTITY = struct.Struct("<QQQ")
_ALIGNMENT_BYTES = 64


class StagingArea:
    """`ring` records of up to `record_bytes` for each of `ranks` ranks; a rank's are written by it alone."""

    def __init__(self, segment: Segment, *, ranks: int, ring: int, record_bytes: int) -> None:
        """UsageError if the segment is smaller than `required_bytes`; all processes pass the same numbers."""
        required = self.required_bytes(ranks=ranks, ring=ring, record_bytes=record_bytes)
        if segment.size_bytes < required:
            raise UsageError(f"a staging segment of {segment.size_bytes} bytes, {required} needed")
        self._ranks, self._ring, self._record_bytes = ranks, ring, record_bytes
        self._view = segment.array.data

    @staticmethod
    def required_bytes(*, ranks: int, ring: int, record_bytes: int) -> int:
        if ranks < 1 or ring < 1 or record_bytes < 0:
            raise UsageError(f"{ranks} ranks, ring of {ring}, records of {record_bytes} bytes")
        return ranks * ring * _stride_bytes(record_bytes)

    def write(self, rank: int, step: int, epoch: int, payload: bytes | memoryview) -> None:
        """Leave a record; that of step - ring is gone. BudgetExceeded if it is too long.

        `payload` is bytes or a contiguous byte view. What was in the ring's other places stays whole.
        """
        length = len(payload)
        if length > self._record_bytes:
            raise BudgetExceeded(f"a staging record of {length} bytes, room for {self._record_bytes}")
        at = self._offset(rank, step)
        crc = zlib.crc32(payload, zlib.crc32(_IDENTITY.pack(step, epoch, length)))
        self._view[at + _HEADER.size : at + _HEADER.size + length] = payload
        _HEADER.pack_into(self._view, at, step, epoch, length, crc)

    def read(self, rank: int, step: int, epoch: int) -> bytes | None:
        """A copy of the record of exactly this step and epoch; None if it is absent, overwritten or torn."""
        at = self._offset(rank, step)
        found_step, found_epoch, length, crc = _HEADER.unpack_from(self._view, at)
        if (found_step, found_epoch) != (step, epoch) or length > self._record_bytes:
            return None
        payload = bytes(self._view[at + _HEADER.size : at + _HEADER.size + length])
        if zlib.crc32(payload, zlib.crc32(_IDENTITY.pack(step, epoch, length))) != crc:
            return None
        return payload

    def _offset(self, rank: int, step: int) -> int:
        assert 0 <= rank < self._ranks, f"rank {rank} of {self._ranks}"
        assert step >= 0, step
        return (rank * self._ring + step % self._ring) * _stride_bytes(self._record_bytes)


def _stride_bytes(record_bytes: int) -> int:
    return -(-(_HEADER.size + record_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
