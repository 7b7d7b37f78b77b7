"""The memory of one pool entry: an anonymous memfd that is filled once, sealed, and never changes again.

The kernel keeps what seals promise: it cannot shrink from the beginning on (whoever maps it would be killed by SIGBUS),
and once published nobody, its filler included, can write to it or take a seal off.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from ghostserve.errors import PoolError
from ghostserve.weights.pool_layout import (
    ABANDONED_AT,
    MAGIC,
    META_AT,
    META_BYTES_MAX,
    READY_AT,
    TRAILER,
    data_end,
    meta_begin,
    total_bytes,
)

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NAME = "ghostserve-weights"  # shows in /proc/PID/maps


def create(nbytes: int) -> int:
    """A descriptor of new memory for an image of `nbytes`, all zeros. OSError if there is none to be had."""
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, total_bytes(nbytes))
        os.pwrite(fd, TRAILER.pack(MAGIC, nbytes, 0, 0, 0), data_end(nbytes))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except BaseException:
        os.close(fd)
        raise
    return fd


def reading(fd: int) -> int:
    """Another descriptor of the same memory, for reading only."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def seal(fd: int, nbytes: int, meta: bytes) -> None:
    """Add the meta and close the memory to all writing. PoolError while somebody, we included, maps it shared.

    Whoever filled it through a shared mapping maps the same place anew before: MAP_PRIVATE | MAP_FIXED keeps the address.
    """
    if len(meta) > META_BYTES_MAX:
        raise PoolError(f"{len(meta)} bytes of meta, at most {META_BYTES_MAX}")
    try:
        _write_all(fd, meta, meta_begin(nbytes))
        os.pwrite(fd, TRAILER.pack(MAGIC, nbytes, nbytes, 0, len(meta)), data_end(nbytes))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        busy = "; it is still mapped for writing" if error.errno == errno.EBUSY else ""
        raise PoolError(f"the memory of a filled entry cannot be sealed: {error}{busy}") from error


def flaw(fd: int, nbytes: int, meta_bytes: int) -> str | None:
    """What speaks against handing this memory out as published; None if it is sealed, whole and of the right size."""
    seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
    if seals & SEALS != SEALS:
        return f"it is not sealed (seals {seals:#x}, wanted {SEALS:#x})"
    if size != total_bytes(nbytes, meta_bytes=meta_bytes):
        return f"it has {size} bytes, {total_bytes(nbytes, meta_bytes=meta_bytes)} expected"
    if os.pread(fd, TRAILER.size, data_end(nbytes)) != TRAILER.pack(MAGIC, nbytes, nbytes, 0, meta_bytes):
        return "its trailer does not say that it is whole"
    return None


def mark_abandoned(fd: int, nbytes: int) -> None:
    """Tell whoever watches how it is filled that nothing more comes. Sealed memory is whole and needs no mark."""
    with contextlib.suppress(PermissionError):
        os.pwrite(fd, (1).to_bytes(8, "little"), data_end(nbytes) + ABANDONED_AT)


def check_trailer(fd: int, nbytes: int) -> None:
    """PoolError unless this is the memory of an image of `nbytes`."""
    found = os.pread(fd, READY_AT, data_end(nbytes))
    if found != TRAILER.pack(MAGIC, nbytes, 0, 0, 0)[:READY_AT]:
        raise PoolError(f"no pool entry of {nbytes} bytes: its trailer begins with {found!r}")


def read_meta(fd: int, nbytes: int) -> bytes:
    """What the filler added when it published."""
    length = int.from_bytes(os.pread(fd, 8, data_end(nbytes) + META_AT), "little")
    if length > META_BYTES_MAX:
        raise PoolError(f"{length} bytes of meta, at most {META_BYTES_MAX}")
    meta = b""
    while len(meta) < length:
        part = os.pread(fd, length - len(meta), meta_begin(nbytes) + len(meta))
        if not part:
            raise PoolError(f"{length} bytes of meta, {len(meta)} are there")
        meta += part
    return meta


def allocated_bytes(fd: int) -> int:
    """Memory that it has so far."""
    return os.fstat(fd).st_blocks * 512


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
