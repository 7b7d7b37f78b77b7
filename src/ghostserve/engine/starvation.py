"""How long ranks were ready to run and had no processor: time that is not held against them.

A rank works with several threads (OpenMP), and at the end of each parallel part all wait for the last one: who gets no
processor in that time may be any of them, while the main thread sleeps or spins. What the rank is held up by in an interval is the
time in which *some* thread was starved. That is at least the largest growth of any one thread, and at most the sum over all of
them; the largest growth is what counts here, summed over intervals, for the sum of all would forgive n seconds per second, and a rank that
spins on a busy machine would never be late. (The largest *total* would not do: the thread that is starved now need not be the one that
was starved most.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping


class Starvation:
    """Of one rank's processes, one after the other; one per observer. The shorter the intervals, the closer it comes."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._before: Mapping[int, float] = {}
        self._total_s = 0.0

    def look(self, pid: int, *, threads: bool) -> float:
        """Seconds in all, as far as they were looked at. `threads`: of all of them, some 10 us each; else of the main one only."""
        times = thread_times_s(pid) if threads else _time_s(pid, pid)
        if pid != self._pid:
            self._pid, self._before = pid, {}
        grown = (time_s - self._before[thread] for thread, time_s in times.items() if thread in self._before)
        self._total_s += max(grown, default=0.0)
        self._before = times
        return self._total_s


def thread_times_s(pid: int) -> dict[int, float]:
    """Of each thread of a process: how long it was ready to run and had no processor; empty where Linux does not say."""
    times: dict[int, float] = {}
    try:
        for name in os.listdir(f"/proc/{pid}/task"):
            times |= _time_s(pid, int(name))
    except OSError:  # the process ended meanwhile
        pass
    return times


def _time_s(pid: int, thread: int) -> dict[int, float]:
    """Field 2 of schedstat, in nanoseconds (Documentation/scheduler/sched-stats.rst).

    By descriptor: a rank has some fifty threads, and a file object costs four times as much as what is read from it.
    """
    try:
        descriptor = os.open(f"/proc/{pid}/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return {thread: int(os.read(descriptor, 128).split()[1]) / 1e9}
        finally:
            os.close(descriptor)
    except (OSError, IndexError, ValueError):  # the thread ended, or the kernel does not count
        return {}
