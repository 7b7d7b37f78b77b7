"""The processes of a chaos run: the clients, and what the server's own hold and leave behind."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import GhostserveError
from ghostserve.testing.chaos_report import Resources
from ghostserve.testing.leaks import SHARED_MEMORY_DIR, family_of
from ghostserve.testing.server import ServerProcess

GONE_TIMEOUT_S = 5.0  # what waits for a pipe of the server to close ends after it


class ClientProcess:
    """The clients, and what they say."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ghostserve.testing.chaos_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.decoding: set[int] = set()  # streams in mid-answer
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: the process has ended
        self.tell(config)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, command: dict[str, Any]) -> None:
        """Have them do something. If they have ended, `next_event` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def next_event(self, *, timeout_s: float = 0.0) -> dict[str, Any] | None:
        """What they said next; None if that is nothing within the time. Raises GhostserveError if they have ended."""
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s else self._events.get_nowait()
        except queue.Empty:
            return None
        if event is None:
            raise GhostserveError("the process of the clients has ended; what it wrote last says why")
        return event

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "first":
                self.decoding.add(event["stream"])
                continue
            if event["event"] == "end":
                self.decoding.discard(event["stream"])
            self._events.put(event)
        self._events.put(None)


class OwnNames:
    """The names in /dev/shm that are a server's, told by who has them mapped: others may use the directory, too."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, server: ServerProcess) -> set[str]:
        """Remember what its processes have mapped now, and return that."""
        mapped = {name for mark in family_of(server.pid) for name in _mapped_names(mark.pid)}
        self._seen |= mapped
        return mapped

    def orphans(self, mapped: Collection[str] = ()) -> list[str]:
        """What was the server's, is still there, and is mapped by none of its processes any more."""
        return sorted(name for name in self._seen - set(mapped) if (SHARED_MEMORY_DIR / name).exists())


def _mapped_names(pid: int) -> set[str]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    prefix = f"{SHARED_MEMORY_DIR}/"
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if prefix in line}
    return {path.removeprefix(prefix) for path in paths if not path.endswith(" (deleted)")}


def resources(server: ServerProcess, status: Mapping[str, Any], names: OwnNames) -> Resources:
    """What it holds now. Workers and keeper come and go, so only what lives from start to end is looked into."""
    mapped = names.note(server)
    passing = {rank["pid"] for rank in status["ranks"]} | {status["keeper"]["pid"]}
    standbys = {standby["pid"] for standby in status.get("standbys") or ()}
    descriptors, memory = {}, {}
    family = family_of(server.pid)
    for mark in family:
        if mark.pid in passing | standbys:
            continue
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(mark.pid)
            name = f"{mark.title} ({mark.pid})"
            descriptors[name], memory[name] = process.num_fds(), process.memory_info().rss
    return Resources(
        processes=len({mark.pid for mark in family} - standbys),  # which come and go
        orphaned_names=len(names.orphans(mapped)),
        descriptors=descriptors,
        memory_bytes=memory,
    )


def left_behind(server: ServerProcess, own_directory: Path, names: OwnNames) -> list[str]:
    """After the server has stopped by itself: processes, names of shared memory, and temporary files."""
    deadline_s = monotonic_s() + GONE_TIMEOUT_S
    while (leaks := server.leaks()).processes and monotonic_s() < deadline_s:
        sleep_s(0.1)
    files = [path.name for path in own_directory.iterdir() if path != server.log_file]
    return [
        *(f"process {mark.pid} ({mark.title})" for mark in leaks.processes),
        *(f"shared memory {name}" for name in names.orphans()),
        *(f"temporary file {name}" for name in files),
    ]
