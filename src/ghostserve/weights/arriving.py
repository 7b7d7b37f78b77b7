"""Bytes of a weights file as they arrive: who asks for some waits until they are there, and no longer.

A thread reads what is wanted, in order; the caller works on what is there already. The reader bounds every wait of its own, so
whoever waits for it is bounded, too.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ghostserve.errors import WeightsReadError
from ghostserve.weights.bounded import STALL_S
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.model_files import WeightsFile
from ghostserve.weights.ranges import Range
from ghostserve.weights.reader import LEAVE_S, ReadStats, read_ranges

Bytes = npt.NDArray[np.uint8]


class Arriving:
    """One file that a thread reads into `memory`, whose byte 0 is that of the file."""

    def __init__(
        self,
        file: WeightsFile,
        spans: Iterable[tuple[int, int]],
        memory: Bytes,
        *,
        direct: bool | None,
        verify: Checksums | None,
        on_ready: Callable[[int], None] = lambda ready: None,
    ) -> None:
        """`spans`: what of the file is wanted, ascending. `on_ready` is told, in the thread, up to where all of that is there."""
        self.stats: ReadStats | None = None
        self._file = file
        self._memory = memory
        self._ranges = _merged(spans)
        self._before = [0, *itertools.accumulate(one.end - one.begin for one in self._ranges)]
        self._on_ready = on_ready
        self._news = threading.Condition()
        self._ready_bytes = 0
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._read, args=(direct, verify), name="ghostserve-weights", daemon=True
        )
        self._thread.start()

    def get(self, begin: int, end: int) -> Bytes:
        """Bytes `begin` to `end` of the file, wanted from the start. Raises WeightsError by its kind."""
        if begin < end:
            self._wait(self._place_of(end))
        return self._memory[begin:end]

    @property
    def arrived(self) -> bool:
        """Whether all that was wanted is there."""
        return self._ready_bytes == self._before[-1]

    def wait(self) -> None:
        """Until all that was wanted is there and the file was found unchanged. Raises WeightsError by its kind."""
        self._thread.join(2 * STALL_S + LEAVE_S)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise WeightsReadError(f"{self._file.path}: the read does not end; check the disk")

    def close(self) -> None:
        """Nothing more is wanted. The memory lives as long as what was cut from it."""
        with self._news:
            self._over = True
        self._thread.join(LEAVE_S)

    def _place_of(self, end: int) -> int:
        """How many of the bytes wanted come before byte `end` of the file."""
        index = bisect.bisect_left([one.end for one in self._ranges], end)
        return self._before[index] + end - self._ranges[index].begin

    def _wait(self, wanted_bytes: int) -> None:
        with self._news:
            there = self._news.wait_for(
                lambda: self._ready_bytes >= wanted_bytes or self._error is not None,
                timeout=2 * STALL_S + LEAVE_S + self._file.nbytes / 1e6,
            )
            if self._ready_bytes < wanted_bytes and self._error is not None:
                raise self._error
        if not there:
            raise WeightsReadError(f"{self._file.path}: less than 1 MB/s is read from it; check the disk")

    def _read(self, direct: bool | None, verify: Checksums | None) -> None:
        try:
            self.stats = read_ranges(
                self._file.path,
                self._ranges,
                self._memory.data,
                direct=direct,
                on_ready=self._tell,
                verify=verify,
                expect=self._file,
            )
        except BaseException as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def _tell(self, ready_bytes: int) -> None:
        with self._news:
            if self._over:
                raise WeightsReadError(f"{self._file.path}: nobody wants the rest of it")
            self._ready_bytes = ready_bytes
            self._news.notify_all()
        self._on_ready(ready_bytes)


def private_memory(file: WeightsFile) -> Bytes:
    """Room for the whole file; only what is written to takes memory. Private: a shared page costs twice as much to get."""
    memory = mmap.mmap(-1, max(1, file.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.uint8)


def _merged(spans: Iterable[tuple[int, int]]) -> Sequence[Range]:
    """Neighbours as one, at their places in the file."""
    ranges: list[Range] = []
    for begin, end in spans:
        if begin == end:
            continue
        first = ranges.pop().begin if ranges and ranges[-1].end == begin else begin
        ranges.append(Range(first, end, first))
    return ranges
