"""Which of a file's pages the kernel has in memory, and asking it to forget them."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def cached_bytes(path: Path) -> int:
    """By mincore, which says the truth about files of one's own only."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapping:
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        vector = pages.ctypes.data_as(ctypes.c_void_p)
        if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return int((pages & 1).sum()) * mmap.PAGESIZE


def forget(path: Path) -> None:
    """Drop what is cached of a file that nobody writes to."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk_bytes(pid: int) -> int:
    """What the process has had the disk read since it began."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/io has no read_bytes")
