"""The directory where a user's processes of one machine meet: the holder's socket, its lock and its log.

`$GHOSTSERVE_RUNTIME_DIR`, or `$XDG_RUNTIME_DIR/ghostserve`, or `/tmp/ghostserve-UID`. It belongs to us alone (mode
0700), or it is not used: in /tmp anybody may have made one with that name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import PoolError

RUNTIME_DIR_ENV = "GHOSTSERVE_RUNTIME_DIR"
_RETRY_S = 0.005
SOCKET_NAME, LOCK_NAME, LOG_NAME = "holder.sock", "holder.lock", "holder.log"


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where it is, or would be made."""
    own = environ.get(RUNTIME_DIR_ENV)
    if own:
        return Path(own).absolute()
    shared = environ.get("XDG_RUNTIME_DIR")
    # Where somebody became another user, the variable may still name the directory of who it was.
    if shared and os.path.isdir(shared) and os.stat(shared).st_uid == os.geteuid():
        return Path(shared, "ghostserve").absolute()
    return Path(f"/tmp/ghostserve-{os.geteuid()}")


@contextlib.contextmanager
def opened(directory: Path, *, make: bool) -> Iterator[int]:
    """A descriptor of the directory, which is ours and nobody else's; PoolError if it is not.

    FileNotFoundError if there is none and none is to be made.
    """
    if make:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PoolError(f"{directory} cannot be made ({error}); set {RUNTIME_DIR_ENV}") from error
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PoolError(f"{directory} is no directory of ours ({error}); set {RUNTIME_DIR_ENV}") from error
    try:
        about = os.fstat(fd)
        mode = stat.S_IMODE(about.st_mode)
        if about.st_uid != os.geteuid() or mode & 0o077:
            raise PoolError(
                f"{directory} belongs to user {about.st_uid} with mode {mode:04o}, where user {os.geteuid()} with mode "
                f"0700 is needed: chmod it, or set {RUNTIME_DIR_ENV} to another"
            )
        yield fd
    finally:
        os.close(fd)


def address_in(fd: int) -> str:
    """The socket's path by way of the directory's descriptor: never too long for a socket, and surely in there."""
    return f"/proc/self/fd/{fd}/{SOCKET_NAME}"


def connect(directory: Path, *, timeout_s: float) -> socket.socket:
    """A connection to whoever listens there; every later call on it is bounded by `timeout_s`.

    OSError if nobody does, or not in time, PoolError if the directory is not ours.
    """
    deadline_s = monotonic_s() + timeout_s
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with opened(directory, make=False) as fd:
            sock.settimeout(timeout_s)
            while True:
                try:
                    sock.connect(address_in(fd))
                    break
                except (
                    BlockingIOError
                ) as error:  # its queue is full, and the kernel does not wait for a place
                    if monotonic_s() >= deadline_s:
                        raise TimeoutError("its queue is full") from error
                    sleep_s(_RETRY_S)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(fd: int, *, backlog: int) -> socket.socket:
    """A listening socket in the directory, in the place of one that may have been left there.

    The caller has the lock. Whoever connects meets the old one or this one, and never a gap.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fresh = f".{SOCKET_NAME}.{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=fd)
        listener.bind(f"/proc/self/fd/{fd}/{fresh}")
        os.chmod(fresh, 0o600, dir_fd=fd)
        listener.listen(backlog)
        os.rename(fresh, SOCKET_NAME, src_dir_fd=fd, dst_dir_fd=fd)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(fresh, dir_fd=fd)
        raise
    return listener


def answers(fd: int) -> bool:
    """Whether somebody listens in the directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(address_in(fd))
        except BlockingIOError:  # it listens, and its queue is full
            return True
        except OSError:
            return False
        return True


def identity(fd: int) -> tuple[int, int] | None:
    """Which socket file lies in the directory; None if there is none."""
    try:
        about = os.stat(SOCKET_NAME, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return None
    return about.st_dev, about.st_ino
