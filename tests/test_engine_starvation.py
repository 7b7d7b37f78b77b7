"""Time without a processor, of whatever thread of a rank."""

from __future__ import annotations

import os
import threading

import pytest

from ghostserve.engine import starvation
from ghostserve.engine.starvation import Starvation, thread_times_s

MAIN, OTHER, THIRD = 7, 8, 9


def looks(
    monkeypatch: pytest.MonkeyPatch, *readings: dict[int, float], threads: bool = True
) -> tuple[Starvation, list[float]]:
    """What is told after each reading of /proc."""
    found = Starvation()
    totals = []
    for reading in readings:
        monkeypatch.setattr(starvation, "thread_times_s", lambda pid, reading=reading: reading)
        monkeypatch.setattr(starvation, "_time_s", lambda pid, of, reading=reading: {of: reading[of]})
        totals.append(found.look(MAIN, threads=threads))
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
    monkeypatch.setattr(starvation, "thread_times_s", lambda pid: {pid: 99.0})
    assert found.look(MAIN + 100, threads=True) == 0.5


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
