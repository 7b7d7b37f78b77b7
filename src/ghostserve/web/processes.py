"""Signalling exactly the process that was meant. Knows no rank and no page.

A pid may be reused between being written down and being used. `/proc/PID/stat` field 22 (start time, in
clock ticks since boot) tells two holders of one pid apart; a pidfd opened before that look then names the
process for good.
"""

from __future__ import annotations

import os
import signal
from enum import Enum
from pathlib import Path


class KillOutcome(Enum):
    """What became of a signal."""

    SENT = "sent"  # it was delivered to the very process that was meant
    GONE = "gone"  # no process, only a zombie, or another one holds this pid; nothing was sent


def read_start_time_ticks(pid: int) -> int | None:
    """The start time of a live process; None if there is none or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in parentheses and may hold anything; the fields after it are plain.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def kill_exactly(pid: int, start_time_ticks: int, signum: signal.Signals = signal.SIGKILL) -> KillOutcome:
    """Send a signal to this process unless its pid has another holder by now. Does not wait, does not reap."""
    if pid <= 1:
        return KillOutcome.GONE
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return KillOutcome.GONE
    try:
        if read_start_time_ticks(pid) != start_time_ticks:
            return KillOutcome.GONE
        signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        return KillOutcome.GONE
    finally:
        os.close(pidfd)
    return KillOutcome.SENT
