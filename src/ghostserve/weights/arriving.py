"""A weights file as it arrives: who asks for some of it waits until that is there, and no longer.

A thread reads what is wanted, in order; the caller works on what is there already. The reader bounds every wait of its own, so
whoever waits for it is bounded, too.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Sequence

from ghostserve.errors import WeightsReadError
from ghostserve.weights.bounded import STALL_S, WAIT_S
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.destination import Destination
from ghostserve.weights.model_files import WeightsFile
from ghostserve.weights.ranges import Range
from ghostserve.weights.reader import LEAVE_S, ReadStats, read_ranges


class Arriving:
    """One file, or what is wanted of it, on its way `into` some place, where a thread reads it to."""

    def __init__(
        self,
        file: WeightsFile,
        ranges: Sequence[Range],
        into: Destination,
        *,
        direct: bool | None,
        verify: Checksums | None,
        on_ready: Callable[[int], None] = lambda ready: None,
        ahead_bytes: int | None = None,
    ) -> None:
        """`ranges`: what of the file is wanted. `on_ready` is told, in the thread, how much of that, in order, is there.

        `ahead_bytes`: so far behind what was asked for it reads, and no further until more is asked for; None: all at once.
        """
        self.stats: ReadStats | None = None
        self._file = file
        self._into = into
        self._ranges = ranges
        self._ends = [one.end for one in ranges]
        self._before = [0, *itertools.accumulate(one.end - one.begin for one in ranges)]
        self._on_ready = on_ready
        self._ahead_bytes = file.nbytes if ahead_bytes is None else ahead_bytes
        self._news = threading.Condition()
        self._ready_bytes = 0
        self._asked_end = 0
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._read, args=(direct, verify), name="ghostserve-weights", daemon=True
        )
        self._thread.start()

    def until(self, end: int) -> None:
        """Wait for all that is wanted before byte `end` of the file. Raises WeightsError by its kind."""
        wanted_bytes = self._place_of(end)
        with self._news:
            self._asked_end = max(end, self._asked_end)
            self._news.notify_all()
            patience_s, waited_s = 2 * STALL_S + LEAVE_S + self._file.nbytes / 1e6, 0.0
            while self._ready_bytes < wanted_bytes and self._error is None and waited_s < patience_s:
                if not self._news.wait(WAIT_S):
                    waited_s += WAIT_S
            if self._ready_bytes >= wanted_bytes:
                return
            if self._error is not None:
                raise self._error
        raise WeightsReadError(f"{self._file.path}: less than 1 MB/s is read from it; check the disk")

    @property
    def arrived(self) -> bool:
        """Whether all that was wanted is there."""
        return self._ready_bytes == self._before[-1]

    def wait(self) -> None:
        """Until all that was wanted is there and the file was found unchanged. Raises WeightsError by its kind."""
        if self._ranges:
            self.until(self._ranges[-1].end)
        self._thread.join(2 * STALL_S + LEAVE_S)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise WeightsReadError(f"{self._file.path}: the read does not end; check the disk")

    def close(self) -> None:
        """Nothing more is wanted."""
        with self._news:
            self._over = True
            self._news.notify_all()
        self._thread.join(LEAVE_S)

    def _place_of(self, end: int) -> int:
        """How many of the bytes wanted come before byte `end` of the file."""
        index = bisect.bisect_left(self._ends, end)
        return self._before[index] + end - self._ranges[index].begin

    def _read(self, direct: bool | None, verify: Checksums | None) -> None:
        try:
            self.stats = read_ranges(
                self._file.path,
                self._ranges,
                self._into,
                direct=direct,
                on_ready=self._tell,
                may_begin=self._may_begin,
                verify=verify,
                expect=self._file,
            )
        except BaseException as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def _tell(self, ready_bytes: int) -> None:
        with self._news:
            self._demand_wanted()
            self._ready_bytes = ready_bytes
            self._news.notify_all()
        self._on_ready(ready_bytes)

    def _may_begin(self, offset: int, timeout_s: float) -> bool:
        with self._news:
            may = self._news.wait_for(
                lambda: self._over or offset < self._asked_end + self._ahead_bytes, timeout=timeout_s
            )
            self._demand_wanted()
            return may

    def _demand_wanted(self) -> None:
        if self._over:
            raise WeightsReadError(f"{self._file.path}: nobody wants the rest of it")
