"""A worker process watched through a pidfd.

A fork server's child is normally watched through a pipe of the fork server: were that killed, every worker would
look dead while it still runs, and could not be killed. A pidfd names the process itself, and no other after it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import weakref
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SLICE_S = 0.1
STOPPED_MAX_S = 1.0


def start_within(process: ForkServerProcess, *, timeout_s: float) -> None:
    """Have the fork server start a process. One that does not answer in time, or is stopped, is killed: the next start
    brings up another one.

    Raises TimeoutError then, and OSError or EOFError where the process could not be started.
    """
    failures: list[BaseException] = []

    def start() -> None:
        try:
            process.start()
        except BaseException as error:
            failures.append(error)

    # Python waits for the new pid without a bound.
    thread = threading.Thread(target=start, daemon=True, name="ghostserve-start")
    thread.start()
    waited_s = stopped_s = 0.0
    while thread.is_alive() and waited_s < timeout_s and stopped_s < STOPPED_MAX_S:
        thread.join(SLICE_S)
        waited_s += SLICE_S
        stopped_s = stopped_s + SLICE_S if _fork_server_stopped() else 0.0
    if thread.is_alive():
        _kill_fork_server()
        thread.join(STOPPED_MAX_S)
        raise TimeoutError(f"the fork server did not start a process within {waited_s:.1f} s")
    if failures:
        raise failures[0]


def _fork_server_pid() -> int | None:
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def _fork_server_stopped() -> bool:
    pid = _fork_server_pid()
    return pid is not None and is_stopped(pid)


def _kill_fork_server() -> None:
    """Our own child, not reaped before the next start, so that the pid is its."""
    pid = _fork_server_pid()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class WatchedProcess(ForkServerProcess):
    """Started by the fork server; `is_alive`, `kill`, `join` and `sentinel` ask the kernel."""

    _pidfd: int | None = None

    def start(self) -> None:
        super().start()
        assert self.pid is not None
        with contextlib.suppress(ProcessLookupError):  # gone already
            self._pidfd = os.pidfd_open(self.pid)
            weakref.finalize(self, os.close, self._pidfd)

    @property
    def sentinel(self) -> int:
        """Readable once the process is gone."""
        return super().sentinel if self._pidfd is None else self._pidfd

    def is_alive(self) -> bool:
        return not self._gone_within(0)

    def join(self, timeout: float | None = None) -> None:
        if self._gone_within(timeout):
            super().join(0)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def _gone_within(self, timeout_s: float | None) -> bool:
        if self._pidfd is None:
            return self.pid is not None
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))

    def _send(self, signum: signal.Signals) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger holds this process; False if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 :][:1] in (b"T", b"t")


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat: with the pid it names a process for good."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
