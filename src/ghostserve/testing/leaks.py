"""What a server leaves behind: processes, shared-memory names, temporary files.

Processes are known by pid and start time, so that a reused pid is not taken for a survivor. Names are
compared with what was there before, less shared memory that a process of somebody else has mapped: another server may
have been started in between. A file that something else made in between is reported as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SHARED_MEMORY_DIR = Path("/dev/shm")
HOLDER_MODULE = "ghostserve.weights.holder"
"""It holds weights for all servers of the user: a server starts it and is not to take it along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMark:
    """One process for good: the start time tells two holders of a pid apart."""

    pid: int
    started_s: float
    title: str = field(compare=False)

    def is_running(self) -> bool:
        """Whether it still runs; a zombie that nobody has reaped does not."""
        process = self._process()
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(process.status() != psutil.STATUS_ZOMBIE)
        return False

    def kill(self) -> None:
        """SIGKILL it if it still runs; never hits another holder of its pid."""
        process = self._process()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares the start time once more

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            return process if process.create_time() == self.started_s else None
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaks:
    """What is there that was not there before the server; empty and false if nothing is."""

    processes: tuple[ProcessMark, ...]
    shared_memory: tuple[str, ...]
    temporary_files: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.processes or self.shared_memory or self.temporary_files)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamesBefore:
    """The names that were there before the server."""

    shared_memory: frozenset[str]
    temporary_files: frozenset[str]

    @classmethod
    def now(cls) -> NamesBefore:
        return cls(
            shared_memory=_names(SHARED_MEMORY_DIR), temporary_files=_names(Path(tempfile.gettempdir()))
        )

    def leaks(self, processes: Iterable[ProcessMark]) -> Leaks:
        """Compare with now; `processes` are those that belonged to the server."""
        now, family = NamesBefore.now(), list(processes)
        new = set(now.shared_memory - self.shared_memory)
        if new:
            own = {mark.pid for mark in family}
            new = {name for name in new - _mapped_by_others(own) if not _names_another_server(name, own)}
        return Leaks(
            processes=tuple(mark for mark in family if mark.is_running()),
            shared_memory=tuple(sorted(new)),
            temporary_files=tuple(sorted(now.temporary_files - self.temporary_files)),
        )


def _names(directory: Path) -> frozenset[str]:
    with contextlib.suppress(FileNotFoundError):
        return frozenset(os.listdir(directory))
    return frozenset()


def _mapped_by_others(family: Collection[int]) -> set[str]:
    """Names of shared memory that living processes outside the family have mapped, semaphores included."""
    prefix = f"{SHARED_MEMORY_DIR}/"
    names: set[str] = set()
    for pid in psutil.pids():
        if pid in family:
            continue
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                path = line.rpartition(" ")[2]
                if path.startswith(prefix):
                    names.add(path.removeprefix(prefix))
    return names


def _names_another_server(name: str, family: Collection[int]) -> bool:
    """Semaphores are called after the front process of their server (`engine/leftovers.py`); it need not have them mapped."""
    found = re.fullmatch(r"sem\.ghostserve-(\d+)-.*", name)
    return found is not None and int(found[1]) not in family and psutil.pid_exists(int(found[1]))


def _mark(process: psutil.Process) -> ProcessMark | None:
    try:
        with process.oneshot():
            words = process.cmdline() or [process.name()]
            if HOLDER_MODULE in words:
                return None
            return ProcessMark(
                pid=process.pid, started_s=process.create_time(), title=" ".join(words).strip()[:80]
            )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def family_of(root_pid: int) -> set[ProcessMark]:
    """The processes that belong to `root_pid` now: itself, its descendants, and all of its session."""
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(root_pid)
        processes = [root, *root.children(recursive=True)]
    return _marks(processes) | _session(root_pid)


def session_of(gone_pid: int) -> set[ProcessMark]:
    """What is left of the session of a process that has ended; nothing if its pid has another holder."""
    return set() if psutil.pid_exists(gone_pid) else _session(gone_pid)


def _session(leader_pid: int) -> set[ProcessMark]:
    members: list[psutil.Process] = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader_pid:
                members.append(psutil.Process(pid))
    return _marks(members)


def _marks(processes: Iterable[psutil.Process]) -> set[ProcessMark]:
    return {mark for mark in map(_mark, processes) if mark is not None}
