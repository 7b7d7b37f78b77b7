"""A worker process is judged by the kernel, not by the fork server that started it."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import time

import psutil

from ghostserve.engine.process import WatchedProcess


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
    stock = multiprocessing.connection.wait([super(WatchedProcess, process).sentinel], 5)
    assert stock, "negative control: by the fork server's pipe it looks dead"
    assert process.is_alive()
    assert not multiprocessing.connection.wait([process.sentinel], 0)
    process.kill()
    process.join(5)
    assert not process.is_alive()
    other = start()  # a new fork server
    other.terminate()
    other.join(5)
    assert not other.is_alive()


def test_a_death_is_seen_at_once() -> None:
    process = start()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert multiprocessing.connection.wait([process.sentinel], 5)
    process.join(5)
    assert not process.is_alive()
    process.kill()  # nobody else is hit
