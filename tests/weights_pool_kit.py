"""Real holders and real clients in processes of their own, which can be killed and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ghostserve
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.weights import runtime_dir
from ghostserve.weights.pool import Pool
from ghostserve.weights.pool_start import stop_holder

BUDGET_BYTES = 16 << 20
SOURCE = str(Path(ghostserve.__file__).parents[1])


def eventually(condition: Callable[[], object], what: str = "", *, timeout_s: float = 10.0) -> None:
    """Fail unless it comes true in time."""
    deadline_s = monotonic_s() + timeout_s
    while not condition():
        assert monotonic_s() < deadline_s, what or "it did not come true"
        sleep_s(0.002)


class Place:
    """A runtime directory of a test, and the holder that was started there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def pool(self, *, idle_timeout_s: float = 60.0, budget_bytes: int | None = BUDGET_BYTES) -> Pool:
        """The holder there, started if there is none."""
        pool = Pool.connect(
            start=True,
            budget_bytes=budget_bytes,
            directory=self.directory,
            idle_timeout_s=idle_timeout_s,
            timeout_s=10.0,
        )
        assert pool is not None, self.log()
        return pool

    @property
    def pid(self) -> int:
        return int((self.directory / runtime_dir.LOCK_NAME).read_text())

    def log(self) -> str:
        path = self.directory / runtime_dir.LOG_NAME
        return path.read_text() if path.exists() else ""

    def processes(self) -> list[int]:
        """Holders of this directory that live."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if b"ghostserve.weights.holder" in words and str(self.directory).encode() in words:
                    found.append(int(entry.name))
        return found

    def descriptors(self) -> list[str]:
        """What the holder has open."""
        return sorted(name for name, _ in self._open())

    def memory_bytes(self) -> int:
        """Memory behind the entries that the holder has."""
        found = {about.st_ino: about.st_blocks * 512 for name, about in self._open() if "memfd:" in name}
        return sum(found.values())

    def _open(self) -> Iterator[tuple[str, os.stat_result]]:
        """The holder's descriptors; it may close some meanwhile."""
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(entry), entry.stat()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The holder hangs."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        pidfd = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert select.select([pidfd], [], [], 10)[0]
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """End the holder; nothing of it may be left."""
        with contextlib.suppress(FileNotFoundError):
            stop_holder(self.directory)
        eventually(lambda: not self.processes(), "a holder is left")


_ACTOR = """
import json, mmap, os, sys
from pathlib import Path
from ghostserve.weights.pool import Pool, Refused
held = mapped = mark = None
def word():
    return {"is": type(held).__name__, "reason": getattr(held, "reason", None)}
for line in sys.stdin:
    do, *rest = json.loads(line)
    if do == "connect":
        pool = Pool.connect(start=rest[1], directory=Path(rest[0]), budget_bytes=rest[2], idle_timeout_s=60.0)
        said = pool is not None
    elif do == "open":
        held = pool.open(rest[0], rest[1], kind=rest[2], label=rest[3], reload_cost_s=1.0)
        said = word()
    elif do == "fill":  # so many bytes of this value, and the watermark
        if mark is None:
            mapped, mark = mmap.mmap(held.fd, held.nbytes), held.watermark()
        mapped[: rest[0]] = bytes([rest[1]]) * rest[0]
        mark.advance(rest[0])
        said = rest[0]
    elif do == "publish":
        mark.close(); mapped.close()
        held = held.publish(b"meta")
        said = word()
    elif do == "outcome":
        held = held.outcome(timeout_s=rest[0]) or held
        said = word()
    elif do == "fork":  # a child that outlives us
        said = os.fork()
        if said == 0:
            os.closerange(0, 3)
            import signal; signal.alarm(60); signal.pause()
    print(json.dumps(said), flush=True)
"""


class Actor:
    """A client process that does as it is told."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ACTOR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": SOURCE},
        )

    def tell(self, *command: Any) -> Any:
        """Do it, and say what came of it."""
        self.begin(*command)
        return self.answer()

    def begin(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], 20)[0], "a client hangs"
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
