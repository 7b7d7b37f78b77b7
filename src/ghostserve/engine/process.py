"""A worker process watched through a pidfd.

A fork server's child is normally watched through a pipe of the fork server: were that killed, every worker would
look dead while it still runs, and could not be killed. A pidfd names the process itself, and no other after it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import weakref
from multiprocessing.context import ForkServerProcess
from pathlib import Path


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


def starved_s(pid: int) -> float:
    """How long the process's main thread was ready to run and had no processor, in all; 0 where Linux does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
