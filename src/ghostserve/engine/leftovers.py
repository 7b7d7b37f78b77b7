"""What vLLM leaves behind when its processes are killed: shared-memory segments and socket files.

Every server has a run directory, named by the pid and start time of its front process. vLLM's sockets
live in it; named segments are noted in it with their owner. It is removed at the server's end,
and swept at the next start by whoever finds its owner dead: a pid says little to somebody in another container that shares
the directory, so the front holds a lock in it, which the kernel lets go of when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

RUN_DIRECTORY_ENV = "GHOSTSERVE_RUN_DIRECTORY"
_PREFIX = "ghostserve-"
_SEGMENTS = "segments.jsonl"
_LOCK = "lock"
_SHM = Path("/dev/shm")
_QUEUE = re.compile(r"psm_\w+")
_QUEUES = re.compile(rf" {_SHM}/(psm_\S+)")


def run_root() -> Path:
    """Where run directories are made: the user's runtime directory, or the temporary one."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) if runtime and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())


def make_run_directory() -> Path:
    """A directory of this process's own, mode 0700, locked until it ends; sweeps those of dead servers first."""
    sweep()
    directory = run_root() / f"{_PREFIX}{os.getpid()}-{_start_time(os.getpid())}"
    coming = directory.with_name(f".{directory.name}")  # nobody sweeps it before it is locked
    coming.mkdir(mode=0o700)
    _lock(coming)
    coming.rename(directory)
    # Python's own sockets go there too, and its semaphores have its name; children inherit both.
    multiprocessing.current_process()._config.update(  # type: ignore[attr-defined]
        tempdir=str(directory), semprefix=f"/{directory.name}"
    )
    return directory


def remove_run_directory(directory: Path) -> None:
    """Remove a server's directory and every segment noted in it."""
    for name in _noted(directory):
        (_SHM / name).unlink(missing_ok=True)
    for semaphore in _SHM.glob(f"sem.{directory.name}-*"):
        semaphore.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def sweep() -> None:
    """Remove what servers left whose front process is gone: in directories of ours, never through a link."""
    for directory in run_root().glob(f"{_PREFIX}*-*"):
        with contextlib.suppress(OSError):
            if _is_ours(directory) and not _is_locked(directory) and _owner_gone(directory):
                remove_run_directory(directory)


def _is_ours(directory: Path) -> bool:
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _lock(directory: Path) -> None:
    """The descriptor stays open as long as this process lives."""
    with contextlib.suppress(OSError):  # a file system without locks: pids have to do
        fcntl.flock(os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)


def _is_locked(directory: Path) -> bool:
    """Whether the server that made it still runs, in whatever pid namespace. Raises OSError where nobody can tell."""
    try:
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _owner_gone(directory: Path) -> bool:
    """Raises OSError where that cannot be found out: without free descriptors nobody has ended."""
    pid, _, started = directory.name.removeprefix(_PREFIX).partition("-")
    return pid.isdigit() and _start_time(int(pid)) != started


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which a process started; with the pid it names a process for good.

    Raises OSError where /proc cannot be read.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "gone" if fields[0] in "ZX" else fields[19]


def _noted(directory: Path) -> Iterator[str]:
    """Names in /dev/shm; whatever else the file holds is passed over."""
    with contextlib.suppress(OSError):
        for line in (directory / _SEGMENTS).read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                name = json.loads(line)["name"]
                if isinstance(name, str) and _QUEUE.fullmatch(name):
                    yield name


def end_processes(state: Mapping[str, Any] | None) -> None:
    """Kill the workers and standbys that the last state document names and that still run.

    They end by themselves once the engine core has; but one that is stopped, or spins, does nothing any more.
    """
    for entry in (*(state or {}).get("ranks", ()), *(state or {}).get("standbys", ())):
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(entry["pid"])
            try:
                if _start_time(entry["pid"]) == str(entry["start_time"]):  # still the one that was meant
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


class Leftovers:
    """Notes named segments with their owner, and removes those of a killed one."""

    def __init__(self) -> None:
        directory = os.environ.get(RUN_DIRECTORY_ENV)
        self._directory = Path(directory) if directory else None
        self._segments: dict[int, set[str]] = {}  # who maps what

    def note(self, name: str) -> None:
        """A segment of this process, for all the others."""
        self._segments[os.getpid()] = {name.lstrip("/")}
        self._write_down(os.getpid(), name.lstrip("/"))

    def note_all(self, pids: list[int]) -> None:
        """Note every queue segment that these workers map; remove those that none maps any more."""
        known = {name for names in self._segments.values() for name in names}
        own = self._segments.get(os.getpid(), set())
        self._segments = {os.getpid(): own, **{pid: _mapped(pid) for pid in pids}}
        for pid, names in self._segments.items():
            for name in names - known:
                self._write_down(pid, name)
        for name in known.difference(*self._segments.values()):
            _unlink(name)

    def server_gone(self) -> bool:
        """Whether the front process has surely ended, in whatever way."""
        try:
            return self._directory is not None and _owner_gone(self._directory)
        except OSError:
            return False

    def remove_all(self) -> None:
        """In the front's place."""
        if self._directory is not None:
            remove_run_directory(self._directory)

    def remove_of(self, pid: int) -> None:
        """The worker was killed: unlink the segments that no other worker maps."""
        names = self._segments.pop(pid, set())
        for name in names.difference(*self._segments.values()):
            _unlink(name)

    def _write_down(self, pid: int, name: str) -> None:
        """For the next start's sweep, should nobody be left to remove it."""
        if self._directory is not None:
            with contextlib.suppress(OSError), (self._directory / _SEGMENTS).open("a") as notes:
                notes.write(json.dumps({"name": name, "pid": pid, "start_time": _start_time(pid)}) + "\n")


def _mapped(pid: int) -> set[str]:
    """Names in /dev/shm that a process maps; empty if it is gone."""
    try:
        return set(_QUEUES.findall(Path(f"/proc/{pid}/maps").read_text()))
    except OSError:
        return set()


def _unlink(name: str) -> None:
    with contextlib.suppress(OSError):
        (_SHM / name).unlink()
        resource_tracker.unregister(f"/{name}", "shared_memory")
