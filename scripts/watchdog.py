"""Runs a command with a time limit, and leaves no process of it behind.

    python3 scripts/watchdog.py [--minutes N] [--logs GLOB]... -- COMMAND [ARGUMENT ...]

The exit status is the command's, or 124 past the limit. Past the limit it shows the processes, asks them to stop with
SIGINT (pytest then prints its slowest tests, Python its stacks), then SIGTERM, then SIGKILL, each by pid, and prints the
ends of the log files. Whatever the command leaves running when it ends by itself is named and killed, too.

Theory of operation: as a "child subreaper" this process inherits the orphans of everything below it, so that the
process tree under it is complete, whatever has died in between. Standard library only, any Python 3.8 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import glob
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
LINGER_S = 5.0
"""How long processes may outlive the command before they count as left behind."""
LOG_LINES = 60
LOG_FILES = 8


def say(text: str) -> None:
    """One line of ours among the command's."""
    print(f"watchdog: {text}", flush=True)


def descendants(root: int) -> dict[int, str]:
    """Every live process below `root`: pid and state with command line. Zombies are not alive."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            command = (
                Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
        except OSError:
            continue
        parents[int(entry)] = int(parent)
        if state != "Z":
            names[int(entry)] = f"{state} {command.strip()[:150]}"
    below, grew = {root}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        below |= more
        grew = bool(more)
    return {pid: names[pid] for pid in sorted(below - {root}) if pid in names}


def reap(statuses: dict[int, int]) -> None:
    """Collect every child that has ended; orphans that we inherited included."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        statuses[pid] = (
            os.waitstatus_to_exitcode(status) if hasattr(os, "waitstatus_to_exitcode") else status >> 8
        )


def wait_until_alone(limit_s: float, statuses: dict[int, int]) -> bool:
    """Wait until no process is left below this one; whether that came true."""
    end = time.monotonic() + limit_s
    while True:
        alone = not descendants(os.getpid())
        reap(statuses)
        if alone:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)


def stop_all(
    statuses: dict[int, int], *, grace_s: float, signals: tuple[signal.Signals, ...] = SIGNALS
) -> None:
    """End everything below this process, politely first; each signal has `grace_s` to work."""
    for number in signals:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if wait_until_alone(grace_s, statuses):
            return


def show_logs(patterns: list[str]) -> None:
    """The ends of the newest log files, oldest first."""
    files = {
        name for pattern in patterns for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)
    }
    for name in sorted(files, key=os.path.getmtime)[-LOG_FILES:]:
        say(f"the end of {name}")
        lines = Path(name).read_text(errors="replace").splitlines()[-LOG_LINES:]
        print("\n".join(f"  | {line}" for line in lines), flush=True)


def run(command: list[str], *, limit_s: float, grace_s: float, logs: list[str]) -> int:
    """Run `command`; its exit status (a death by signal N is 128 + N), or 124."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))
    statuses: dict[int, int] = {}
    end = time.monotonic() + limit_s
    child = None
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        while child.pid not in statuses and time.monotonic() < end:
            time.sleep(0.1)
            reap(statuses)
        if child.pid not in statuses:
            say(f"{' '.join(command)} is not done after {limit_s / 60:.1f} minutes; running now:")
            for pid, what in descendants(os.getpid()).items():
                say(f"  {pid} {what}")
            stop_all(statuses, grace_s=grace_s)
            show_logs(logs)
            return 124
        if not wait_until_alone(LINGER_S, statuses):
            for pid, what in descendants(os.getpid()).items():
                say(f"left behind and killed: {pid} {what}")
            stop_all(statuses, grace_s=grace_s, signals=SIGNALS[1:])
        status = statuses[child.pid]
        if status != 0:
            show_logs(logs)
        return status if status >= 0 else 128 - status
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing interrupts the cleaning up
        stop_all(statuses, grace_s=grace_s)
        if child is not None:
            child.returncode = statuses.get(child.pid, 1)  # reaped here, behind the back of subprocess


def main(argv: list[str]) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="watchdog", description="Run a command with a time limit.")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument(
        "--grace-s", type=float, default=20.0, help="seconds for each of SIGINT, SIGTERM, SIGKILL to work"
    )
    parser.add_argument(
        "--logs", action="append", default=[], metavar="GLOB", help="log files to show on failure"
    )
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    return run(options.command, limit_s=options.minutes * 60, grace_s=options.grace_s, logs=options.logs)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
