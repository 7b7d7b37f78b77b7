"""Starting and stopping the holder from outside."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import ghostserve
from ghostserve.errors import PoolError
from ghostserve.weights import runtime_dir

_LAUNCH_TIMEOUT_S = 10.0  # a Python that forks at once: 0.1 s, and more where all processors are taken
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")  # no keys and no tokens of whoever was first


def launch(directory: Path, *, budget_bytes: int | None, idle_timeout_s: float | None = None) -> None:
    """Start a holder that belongs to nobody; it may not listen yet. PoolError if it could not be started.

    It leaves our session and inherits no descriptor. Should there be one already, it goes away again.
    """
    command = [sys.executable, "-P", "-s", "-S", "-m", "ghostserve.weights.holder", "--daemon"]
    command += ["--directory", str(directory)]
    if budget_bytes is not None:
        command += ["--budget", str(budget_bytes)]
    if idle_timeout_s is not None:
        command += ["--idle-timeout", str(idle_timeout_s)]
    environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environ["PYTHONPATH"] = str(Path(ghostserve.__file__).parents[1])
    try:
        launcher = subprocess.Popen(
            command,
            cwd="/",
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise PoolError(f"the holder of the weights' pool cannot be started: {error}") from error
    if not _ends(launcher.pid, timeout_s=_LAUNCH_TIMEOUT_S):
        launcher.kill()
        launcher.wait()
        raise PoolError(f"the holder of the weights' pool did not start within {_LAUNCH_TIMEOUT_S:g} s")
    status = launcher.wait()
    if status != 0:
        raise PoolError(
            f"the holder of the weights' pool did not start (status {status}): see {directory / runtime_dir.LOG_NAME}"
        )


def stop_holder(directory: Path | None = None, *, timeout_s: float = 5.0) -> bool:
    """End the holder, one that hangs or speaks another version included; False if there is none.

    SIGTERM, and SIGKILL after `timeout_s`: it holds nothing that others need. PoolError if it cannot be ended.
    """
    directory = directory or runtime_dir.runtime_dir()
    try:
        with runtime_dir.opened(directory, make=False) as fd:
            lock = os.open(runtime_dir.LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
    except FileNotFoundError:
        return False
    with os.fdopen(lock) as file:
        if not _locked(lock):
            return False
        text = file.read().strip()
        try:
            pidfd = os.pidfd_open(int(text))
        except (OSError, ValueError) as error:
            if not _locked(lock):
                return False
            raise PoolError(f"the holder's process {text!r} is not to be found: {error}") from error
        try:
            # The lock was held with that number in it, and still is: the process is the holder, not a later one.
            if not _locked(lock):
                return False
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
                if select.select([pidfd], [], [], timeout_s)[0]:
                    return True
            raise PoolError(f"the holder, process {text}, does not end")
        finally:
            os.close(pidfd)


def _ends(pid: int, *, timeout_s: float) -> bool:
    """Wait for a child; seen at once, where `Popen.wait` with a bound looks every 50 ms: a load waits meanwhile."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


def _locked(fd: int) -> bool:
    """Whether somebody is the holder."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
