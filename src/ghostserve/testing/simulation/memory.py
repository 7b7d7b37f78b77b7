"""Memory without processes: segments that are plain arrays, and the KV memory of a simulated rank."""

from __future__ import annotations

import numpy as np

from ghostserve.arena.memfd import Segment

GARBAGE = 0xEE  # what new KV memory holds


class PlainSegment(Segment):
    """A `Segment` that is an array of this process; what an arena part is built on here."""

    def __init__(self, size_bytes: int) -> None:
        self._fd = -1
        self._map = None
        self._array = np.zeros(size_bytes, dtype=np.uint8)

    def refresh(self) -> None:
        """It never grows."""

    def punch(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size_bytes, (offset, length, self.size_bytes)
        self._array[offset : offset + length] = 0
