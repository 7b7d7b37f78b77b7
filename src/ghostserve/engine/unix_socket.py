"""The file of `--uds`. It outlives its socket, and a file that is there keeps the next server from binding.

vLLM leaves it behind. Here it goes with the server, and one that a killed server left is removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

CONNECT_S = 1.0
BOUND = Path("/proc/net/unix")  # a line per socket of this network namespace, its path last


def is_stale(path: str, *, bound: Path = BOUND) -> bool:
    """Whether this is the file of a socket that is gone: nobody answers, and nobody is about to (a server that starts has
    bound it, and does not listen yet).
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(CONNECT_S)
            probe.connect(path)
    except ConnectionRefusedError:
        with contextlib.suppress(OSError):
            lines = bound.read_text(errors="surrogateescape").splitlines()
            return not any(line.endswith(f" {path}") for line in lines)
    except OSError:
        pass
    return False


@contextlib.contextmanager
def owned(path: str | None) -> Iterator[None]:
    """Inside, `path` may be bound; behind it, what was bound there inside is gone. None: there is no such file."""
    if path is None:
        yield
        return
    if is_stale(path):
        os.unlink(path)
    before = _identity(path)
    try:
        yield
    finally:
        if _identity(path) != before:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _identity(path: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None
