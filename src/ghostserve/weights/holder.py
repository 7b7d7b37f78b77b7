"""The holder: one process per user that keeps weights in host memory for all others.

    python -m ghostserve.weights.holder [--daemon] [--budget BYTES] [--idle-timeout SECONDS]

Loaders start it on demand (`pool_start`) and need it for nothing: without it they read from the disk. It ends when for
`--idle-timeout` nobody has used or pinned anything, on SIGTERM, and when its socket is gone. It must start quickly and
stay small, so the standard library is all it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import logging.handlers
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import GhostserveError, PoolError
from ghostserve.weights import runtime_dir
from ghostserve.weights.holder_server import HolderServer
from ghostserve.weights.host_memory import read_host_memory
from ghostserve.weights.pool_book import PoolBook
from ghostserve.weights.waiting_lock import try_lock

logger = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 600.0
PROCESS_NAME = "ghostserve:pool"  # 15 characters, as many as the kernel keeps
_LOCK_TIMEOUT_S = 2.0  # a holder that is ending has let go by then
_LOCK_RETRY_S = 0.01
_BACKLOG = 256
_LOG_BYTES_MAX = 256 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run until idle or stopped; 0 also if there is a holder already."""
    parser = argparse.ArgumentParser(prog="ghostserve-holder", allow_abbrev=False)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument(
        "--budget", type=int, default=None, metavar="BYTES", help="default: a quarter of all memory"
    )
    parser.add_argument("--idle-timeout", type=float, default=IDLE_TIMEOUT_S, metavar="SECONDS")
    parser.add_argument(
        "--daemon", action="store_true", help="leave the caller, its session and its directory"
    )
    args = parser.parse_args(argv)
    directory = args.directory or runtime_dir.runtime_dir()
    if args.daemon and os.fork():
        os._exit(0)
    os.umask(0o077)
    os.chdir("/")
    try:
        with runtime_dir.opened(directory, make=True) as fd:
            _log_to(directory / runtime_dir.LOG_NAME)
            with _lock(fd) as ours:
                if not ours:
                    logger.info("there is a holder already")
                    return 0
                return _serve(fd, budget_bytes=args.budget, idle_timeout_s=args.idle_timeout)
    except (GhostserveError, OSError) as error:
        logger.error("%s", error)
        return error.exit_code if isinstance(error, GhostserveError) else 1


@contextlib.contextmanager
def _lock(directory_fd: int) -> Iterator[bool]:
    """Be the holder meanwhile; False if somebody else is, and listens.

    The kernel lets the lock go when its process ends. Its file stays, with the process in it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(runtime_dir.LOCK_NAME, flags, 0o600, dir_fd=directory_fd)
    try:
        yield _become_holder(fd, directory_fd)
    finally:
        os.close(fd)


def _become_holder(lock_fd: int, directory_fd: int) -> bool:
    deadline_s = monotonic_s() + _LOCK_TIMEOUT_S
    while not try_lock(lock_fd):
        if runtime_dir.answers(directory_fd):
            return False
        if monotonic_s() >= deadline_s:
            raise PoolError(
                f"another process has {runtime_dir.LOCK_NAME} and does not listen; `ghostserve models stop` ends it"
            )
        sleep_s(_LOCK_RETRY_S)
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
    return True


def _serve(directory_fd: int, *, budget_bytes: int | None, idle_timeout_s: float) -> int:
    """Listen and serve; the lock is ours."""
    with contextlib.suppress(OSError, ValueError):  # each connection and each entry takes a descriptor
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(PROCESS_NAME)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    budget_bytes = read_host_memory().auto_budget_bytes if budget_bytes is None else budget_bytes
    listener = runtime_dir.listen(directory_fd, backlog=_BACKLOG)
    ours = runtime_dir.identity(directory_fd)
    server = HolderServer(
        listener,
        PoolBook(budget_bytes=budget_bytes, began_s=monotonic_s()),
        idle_timeout_s=idle_timeout_s,
        host_memory=read_host_memory,
        findable=lambda: runtime_dir.identity(directory_fd) == ours,
    )
    logger.info("process %d holds up to %d bytes", os.getpid(), budget_bytes)
    why = "asked to"
    try:
        why = server.run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if runtime_dir.identity(directory_fd) == ours:
            os.unlink(runtime_dir.SOCKET_NAME, dir_fd=directory_fd)
        listener.close()  # those who wait in its queue see that it is gone, and start another
        server.close()
        logger.info("ends: %s", why)
    return 0


def _log_to(path: Path) -> None:
    """Into a file that never grows beyond twice _LOG_BYTES_MAX, and to nowhere if the disk is full."""
    logging.raiseExceptions = False
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES_MAX, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s holder %(process)d: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    sys.excepthook = lambda kind, error, trace: logger.critical(
        "ended by a mistake", exc_info=(kind, error, trace)
    )


if __name__ == "__main__":
    raise SystemExit(main())
