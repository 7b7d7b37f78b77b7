"""Time without a processor, of whatever thread of a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ghostserve.engine import starvation
from ghostserve.engine.starvation import Starvation, ThreadTimes, thread_times_s
from ghostserve.recovery.detector import LOOK_MAX_S

pytestmark = pytest.mark.long

MAIN, OTHER, THIRD = 7, 8, 9


def looks(
    monkeypatch: pytest.MonkeyPatch, *readings: dict[int, float], threads: bool = True
) -> tuple[Starvation, list[float]]:
    """What is told after each reading of /proc, in which some time has been waited for."""
    found = Starvation()
    totals = []
    for at_s, reading in enumerate(readings):
        times = {thread: ThreadTimes(ran_s=at_s, waited_s=waited_s) for thread, waited_s in reading.items()}
        monkeypatch.setattr(starvation, "thread_times_s", lambda pid, times=times: times)
        monkeypatch.setattr(starvation, "_times_s", lambda pid, of, times=times: {of: times[of]})
        totals.append(found.look(MAIN, threads=threads, now_s=at_s))
    return found, totals


def test_a_thread_that_is_starved_holds_its_rank_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread waits for it, and is not starved itself: by it alone the rank would be called hung."""
    readings = [{MAIN: 1.0, OTHER: 0.5 * look} for look in range(5)]
    assert looks(monkeypatch, *readings)[1][-1] == pytest.approx(2.0)
    assert looks(monkeypatch, *readings, threads=False)[1][-1] == 0.0, "negative control: the main thread"


def test_two_at_once_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that spins would never be late on a busy machine: each second forgives two."""
    readings = [{MAIN: 0.5 * look, OTHER: 0.4 * look, THIRD: 0.3 * look} for look in range(5)]
    assert looks(monkeypatch, *readings)[1][-1] == pytest.approx(2.0)


def test_one_after_the_other_count_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest total would say 10 throughout: that thread starved long ago."""
    readings = [{MAIN: 10.0, OTHER: 0.0, THIRD: 0.0}, {MAIN: 10.0, OTHER: 1.0, THIRD: 0.0}]
    readings.append({MAIN: 10.0, OTHER: 1.0, THIRD: 2.0})
    assert looks(monkeypatch, *readings)[1] == [0.0, 1.0, 3.0]


def test_it_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread ends, another one comes with a past, the rank gets a new process."""
    found, totals = looks(monkeypatch, {MAIN: 1.0, OTHER: 9.0}, {MAIN: 1.5}, {MAIN: 1.5, THIRD: 30.0}, {})
    assert totals == [0.0, 0.5, 0.5, 0.5]
    monkeypatch.setattr(
        starvation, "thread_times_s", lambda pid: {pid: ThreadTimes(ran_s=1.0, waited_s=99.0)}
    )
    assert found.look(MAIN + 100, threads=True, now_s=4.0) == 0.5


LOOK_S = 0.02


def waits(monkeypatch: pytest.MonkeyPatch, *, ready: bool, charged_s: float) -> list[float]:
    """What ten looks add in which nothing is charged, and the one after the wait has been charged."""
    found, added = Starvation(), []
    monkeypatch.setattr(starvation, "_is_ready", lambda pid, thread: ready)
    before_s = 0.0
    for look in range(12):
        times = ThreadTimes(ran_s=1.0, waited_s=charged_s if look == 11 else 0.0)
        monkeypatch.setattr(starvation, "_times_s", lambda pid, of, times=times: {of: times})
        total_s = found.look(MAIN, threads=False, now_s=look * LOOK_S)
        added.append(total_s - before_s)
        before_s = total_s
    return added[1:]


def test_a_wait_counts_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux charges it when it is over: until then a rank that waits for a second for its core would look hung."""
    *lasting, last = waits(monkeypatch, ready=True, charged_s=10.5 * LOOK_S)
    assert lasting == pytest.approx([LOOK_S] * 10)
    assert last == pytest.approx(0.5 * LOOK_S), "what was told before is not told again"


def test_who_sleeps_is_not_starved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits(monkeypatch, ready=False, charged_s=0.0) == [0.0] * 11


@pytest.fixture
def starved() -> Iterator[int]:
    """A process that would like to run and hardly ever may: idle priority, on a core that another one takes whole."""
    core = max(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, {{{core}}})\n"
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
    loop = "print('ready', flush=True)\nwhile True: pass"
    processes = [
        subprocess.Popen([sys.executable, "-c", spin + extra + loop], stdout=subprocess.PIPE)
        for extra in (idle, "")
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield processes[0].pid
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_starved_process_is_seen_to_be_starved_at_every_look(starved: int) -> None:
    """As the detector counts: no look forgives more than the time since the last one, and no look adds more than LOOK_MAX_S."""
    found = Starvation()
    forgiven_s, counted_s, began_s = 0.0, 0.0, time.monotonic()
    before_s, at_s = found.look(starved, threads=False, now_s=began_s), began_s
    ran_before_s = thread_times_s(starved)[starved].ran_s
    while at_s - began_s < 1.5:
        threading.Event().wait(LOOK_S)
        now_s = time.monotonic()
        total_s = found.look(starved, threads=False, now_s=now_s)
        counted_s += min(now_s - at_s, LOOK_MAX_S)
        forgiven_s += min(total_s - before_s, now_s - at_s, LOOK_MAX_S)
        before_s, at_s = total_s, now_s
    ran_s = thread_times_s(starved)[starved].ran_s - ran_before_s
    assert forgiven_s > 0.8 * (counted_s - ran_s)
    assert forgiven_s < 1.05 * (at_s - began_s), "never more than all"


def test_every_thread_of_a_process_is_read() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert {os.getpid(), thread.native_id} <= thread_times_s(os.getpid()).keys()
    finally:
        done.set()
        thread.join()
    assert not thread_times_s(2**22 + 1), "no such process"
