"""A kill hits the process that was meant or nobody."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from ghostserve.web.processes import KillOutcome, kill_exactly, read_start_time_ticks


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_the_meant_process_is_killed(victim: subprocess.Popen[bytes]) -> None:
    started = read_start_time_ticks(victim.pid)
    assert started is not None
    assert kill_exactly(victim.pid, started) is KillOutcome.SENT
    assert victim.wait(timeout=10) == -signal.SIGKILL


def test_another_holder_of_the_pid_is_spared(victim: subprocess.Popen[bytes]) -> None:
    started = read_start_time_ticks(victim.pid)
    assert started is not None
    assert kill_exactly(victim.pid, started - 1) is KillOutcome.GONE
    assert victim.poll() is None


def test_a_zombie_is_gone(victim: subprocess.Popen[bytes]) -> None:
    started = read_start_time_ticks(victim.pid)
    assert started is not None
    victim.kill()
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
    assert read_start_time_ticks(victim.pid) is None
    assert kill_exactly(victim.pid, started) is KillOutcome.GONE


def test_a_pid_without_process_is_gone(victim: subprocess.Popen[bytes]) -> None:
    victim.kill()
    victim.wait()
    assert kill_exactly(victim.pid, 1) is KillOutcome.GONE


@pytest.mark.parametrize("pid", [-1, 0, 1])
def test_groups_and_init_are_never_hit(pid: int) -> None:
    assert kill_exactly(pid, read_start_time_ticks(1) or 0) is KillOutcome.GONE
