"""How long ranks were ready to run and had no processor: time that is not held against them.

A rank works with several threads (OpenMP), and at the end of each parallel part all wait for the last one: who gets no
processor in that time may be any of them, while the main thread sleeps or spins. What the rank is held up by in an interval is the
time in which *some* thread was starved. That is at least the largest growth of any one thread, and at most the sum over all of
them; the largest growth is what counts here, summed over intervals, for the sum of all would forgive n seconds per second, and a rank that
spins on a busy machine would never be late. (The largest *total* would not do: the thread that is starved now need not be the one that
was starved most.)

Linux adds a wait to a thread's total when the wait is over, and a rank bound to one busy core may wait for a second. So a thread that is
ready, and has neither run nor been charged with waiting since the last look, is taken to wait; what is charged later counts less that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

TICK_S = 0.011  # a thread that runs is charged for it at every tick of its processor, 100 per second at least
INFERRED_MAX_S = 0.1  # of one look: a thread may have slept for most of a longer interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadTimes:
    """What Linux has charged a thread with, in seconds."""

    ran_s: float
    waited_s: float  # ready to run, without a processor


@dataclass(slots=True)
class _Thread:
    times: ThreadTimes
    inferred_s: float = field(default=0.0)  # told already of a wait that is not charged yet


class Starvation:
    """Of one rank's processes, one after the other; one per observer. The shorter the intervals, the closer it comes."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._threads: dict[int, _Thread] = {}
        self._looked_at_s = 0.0
        self._total_s = 0.0

    def look(self, pid: int, *, threads: bool, now_s: float) -> float:
        """Seconds in all, as far as they were looked at. `threads`: of all of them, some 20 us each; else of the main one only."""
        times = thread_times_s(pid) if threads else _times_s(pid, pid)
        if pid != self._pid:
            self._pid, self._threads = pid, {}
        interval_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        before, self._threads = self._threads, {thread: _Thread(found) for thread, found in times.items()}
        self._total_s += max(
            (self._grown_s(thread, before[thread], interval_s) for thread in times if thread in before),
            default=0.0,
        )
        return self._total_s

    def _grown_s(self, thread: int, before: _Thread, interval_s: float) -> float:
        now = self._threads[thread]
        if now.times != before.times:
            return max(now.times.waited_s - before.times.waited_s - before.inferred_s, 0.0)
        now.inferred_s = before.inferred_s
        if interval_s < TICK_S or not _is_ready(self._pid, thread):
            return 0.0
        inferred_s = min(interval_s, INFERRED_MAX_S)
        now.inferred_s += inferred_s
        return inferred_s


def thread_times_s(pid: int) -> dict[int, ThreadTimes]:
    """Of each thread of a process; empty where Linux does not say."""
    times: dict[int, ThreadTimes] = {}
    try:
        for name in os.listdir(f"/proc/{pid}/task"):
            times |= _times_s(pid, int(name))
    except OSError:  # the process ended meanwhile
        pass
    return times


def _times_s(pid: int, thread: int) -> Mapping[int, ThreadTimes]:
    """Fields 1 and 2 of schedstat, in nanoseconds (Documentation/scheduler/sched-stats.rst)."""
    try:
        ran_ns, waited_ns = _read(f"/proc/{pid}/task/{thread}/schedstat").split()[:2]
        return {thread: ThreadTimes(ran_s=int(ran_ns) / 1e9, waited_s=int(waited_ns) / 1e9)}
    except (OSError, ValueError):  # the thread ended, or the kernel does not count
        return {}


def _is_ready(pid: int | None, thread: int) -> bool:
    """Whether the thread runs or would like to: state R of /proc/PID/task/TID/stat (proc(5))."""
    try:
        stat = _read(f"/proc/{pid}/task/{thread}/stat")
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 :][:1] == b"R"


def _read(path: str) -> bytes:
    """By descriptor: a rank has some fifty threads, and a file object costs four times as much as what is read from it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1024)
    finally:
        os.close(descriptor)
