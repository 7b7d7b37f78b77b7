"""A worker process is judged by the kernel, not by the fork server that started it."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import time

import psutil
import pytest

from ghostserve.engine.process import WatchedProcess, start_within

TIMEOUT_S = 30.0  # what a machine without a free processor takes


def start() -> WatchedProcess:
    process = WatchedProcess(target=time.sleep, args=(60,), daemon=True)
    process.start()
    return process


def test_a_process_outlives_its_fork_server_and_can_still_be_killed() -> None:
    process = start()
    assert process.is_alive()
    fork_server = psutil.Process(process.pid).parent()
    assert fork_server is not None
    fork_server.kill()
    stock = multiprocessing.connection.wait([super(WatchedProcess, process).sentinel], TIMEOUT_S)
    assert stock, "negative control: by the fork server's pipe it looks dead"
    assert process.is_alive()
    assert not multiprocessing.connection.wait([process.sentinel], 0)
    process.kill()
    process.join(TIMEOUT_S)
    assert not process.is_alive()
    other = start()  # a new fork server
    other.terminate()
    other.join(TIMEOUT_S)
    assert not other.is_alive()


def test_a_death_is_seen_at_once() -> None:
    process = start()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert multiprocessing.connection.wait([process.sentinel], TIMEOUT_S)
    process.join(TIMEOUT_S)
    assert not process.is_alive()
    process.kill()  # nobody else is hit


def test_a_fork_server_that_is_stopped_is_not_waited_for() -> None:
    """A recovery would wait for it for ever; it is killed, and the next start brings up another one."""
    first = start()
    assert first.pid is not None
    fork_server = psutil.Process(first.pid).parent()
    assert fork_server is not None
    fork_server.suspend()
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match="fork server"):
        start_within(WatchedProcess(target=time.sleep, args=(60,), daemon=True), timeout_s=60)
    assert time.monotonic() - began_s < 10
    assert first.is_alive()
    second = WatchedProcess(target=time.sleep, args=(60,), daemon=True)
    start_within(second, timeout_s=60)
    assert second.is_alive()
    for process in (first, second):
        process.kill()
        process.join(5)


def test_what_a_start_fails_with_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: WatchedProcess) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(WatchedProcess, "start", refuse)
    with pytest.raises(BlockingIOError):
        start_within(WatchedProcess(target=time.sleep, args=(60,), daemon=True), timeout_s=60)
