"""Room for what is wanted of a file, a block of neighbours at a time: there from the first byte read until all of it was taken."""

from __future__ import annotations

import bisect
import mmap
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from ghostserve.weights.destination import Bytes
from ghostserve.weights.ranges import Range
from ghostserve.weights.recycled import Recycler

BLOCK_BYTES = 64 << 20
"""From the first to the last byte; more only where one tensor has more."""


@dataclass(slots=True)
class _Block:
    begin: int
    end: int
    memory: Bytes | None = None


class Blocks:
    """A `Destination` in which bytes have the places that they have in the file."""

    def __init__(self, spans: Iterable[tuple[int, int]], recycler: Recycler, *, nbytes: int) -> None:
        """`spans`: the tensors wanted of a file of `nbytes`, ascending; none is cut."""
        self.nbytes = nbytes
        self.ranges: list[Range] = []
        """What is to be read: neighbours in one block as one."""
        self._recycler = recycler
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []
        self._taken = 0  # so many blocks are
        for begin, end in spans:
            if begin < end:
                self._add(begin, end)
        self._ends = [block.end for block in self._blocks]

    def _add(self, begin: int, end: int) -> None:
        first = begin
        block = self._blocks[-1] if self._blocks else None
        if block is None or end - block.begin > BLOCK_BYTES:
            self._blocks.append(_Block(begin, end))
        elif block.end == begin:
            first = self.ranges.pop().begin
        self._blocks[-1].end = end
        self.ranges.append(Range(first, end, first))

    def place(self, at: int, nbytes: int) -> Bytes | None:
        block = self._blocks[bisect.bisect_right(self._ends, at)]
        with self._lock:
            if block.memory is None:
                skew = block.begin % mmap.PAGESIZE  # in step with the file, so that it can be read in place
                whole = max(block.end - block.begin, BLOCK_BYTES) + mmap.PAGESIZE  # alike, to fit again
                block.memory = self._recycler.take(whole)[skew : skew + block.end - block.begin]
            memory = block.memory
        return memory[at - block.begin : at - block.begin + nbytes]

    def put(self, at: int, data: Bytes) -> None:
        place = self.place(at, data.size)
        assert place is not None
        place[:] = data

    def take(self, begin: int, end: int) -> Bytes:
        """Bytes of one tensor, which have been read; in the order of the file: with the end of a block, all of it is given away."""
        assert bisect.bisect_right(self._ends, begin) >= self._taken, (begin, end)
        taken = self.place(begin, end - begin)
        assert taken is not None
        while self._taken < len(self._blocks) and self._ends[self._taken] <= end:
            self._blocks[self._taken].memory = None
            self._taken += 1
        return taken
