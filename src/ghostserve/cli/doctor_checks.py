"""What a check says, and the runner that keeps checks apart: each has its own thread, an error and a bound.

A check is a function from what is asked about to findings. One that raises, or does not end in time, is a finding itself.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from ghostserve.clock import monotonic_s
from ghostserve.config import GhostConfig

ALL_CHECKS_S = 8.0


class Status(Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"  # a server would start, and do less well than it could
    FAIL = "fail"  # a server would not start, or not survive


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; with a remedy unless all is well."""

    name: str
    status: Status
    found: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        return {"name": self.name, "status": self.status.value, "found": self.found, "remedy": self.remedy}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The server that is asked about: `serve`'s flags as far as they matter here."""

    model: str | None = None
    ranks: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None  # a Unix socket instead of host and port
    kv_cache_bytes: int | None = None  # per rank; None: what vLLM takes
    config: GhostConfig = field(default_factory=GhostConfig)

    @property
    def model_directory(self) -> Path | None:
        """Where the model is a folder."""
        path = None if self.model is None else Path(self.model).expanduser()
        return path if path is not None and path.is_dir() else None


Check = Callable[[Subject], Sequence[Finding]]


def ok(name: str, found: str) -> Finding:
    return Finding(name=name, status=Status.OK, found=found)


def warn(name: str, found: str, remedy: str) -> Finding:
    return Finding(name=name, status=Status.WARN, found=found, remedy=remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    return Finding(name=name, status=Status.FAIL, found=found, remedy=remedy)


def run_checks(
    checks: Sequence[tuple[str, Check]], subject: Subject, *, within_s: float = ALL_CHECKS_S
) -> list[Finding]:
    """All findings, in the order of the checks. Returns after `within_s` whatever the checks do."""
    answers: queue.SimpleQueue[tuple[int, list[Finding]]] = queue.SimpleQueue()

    def run(index: int, name: str, check: Check) -> None:
        try:
            answers.put((index, list(check(subject))))
        except Exception as error:
            found = f"the check itself failed: {type(error).__name__}: {error}"
            answers.put((index, [fail(name, found, "look at that first; serve may fail alike")]))

    for index, (name, check) in enumerate(checks):
        threading.Thread(target=run, args=(index, name, check), daemon=True).start()
    deadline_s, found = monotonic_s() + within_s, dict[int, list[Finding]]()
    while len(found) < len(checks):
        try:
            index, findings = answers.get(timeout=max(0.0, deadline_s - monotonic_s()))
        except queue.Empty:
            break
        found[index] = findings
    ordered = [
        found[index] if index in found else [_late(name, within_s)] for index, (name, _) in enumerate(checks)
    ]
    return [finding for findings in ordered for finding in findings]


def _late(name: str, within_s: float) -> Finding:
    return fail(
        name,
        f"no answer within {within_s:g} s",
        "a file system, a driver or the machine hangs: look at what does",
    )
