"""The page cache: emptied of some files, and asked which of their pages it holds.

The kernel may keep pages although `posix_fadvise` was told that nobody needs them (dirty ones, ones that are mapped or being read):
so `mincore` has the last word, and nothing is measured as cold that is not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import CheckFailed

PAGE_BYTES = mmap.PAGESIZE
DROP_S = 10.0
FILLS = 5  # the kernel may reclaim a few pages at any time


def drop(paths: Sequence[Path], *, timeout_s: float = DROP_S) -> None:
    """Have the page cache forget these files. CheckFailed if it still holds a page of one after `timeout_s`."""
    deadline_s = monotonic_s() + timeout_s
    while True:
        for path in paths:
            _forget(path)
        kept = {path.name: pages for path in paths if (pages := resident_pages(path))}
        if not kept:
            return
        if monotonic_s() > deadline_s:
            held = ", ".join(f"{pages} of {name}" for name, pages in kept.items())
            raise CheckFailed(
                f"the page cache still holds pages after posix_fadvise ({held}): a cold load cannot be measured. "
                "Is another process reading or mapping the files, or is the folder in memory (tmpfs)?"
            )
        sleep_s(0.05)


def fill(paths: Sequence[Path]) -> None:
    """Have the page cache hold these files whole. CheckFailed if it does not, for want of memory."""
    missing: dict[str, int] = {}
    for _ in range(FILLS):
        for path in paths:
            _read(path)
        missing = {
            path.name: pages
            for path in paths
            if (pages := -(-path.stat().st_size // PAGE_BYTES) - resident_pages(path))
        }
        if not missing:
            return
    lost = ", ".join(f"{pages} of {name}" for name, pages in missing.items())
    raise CheckFailed(
        f"the page cache lets go of pages as soon as they were read ({lost}): a warm load cannot be measured. "
        "Free some memory, or have less measured"
    )


def resident_pages(path: Path) -> int:
    """How many pages of a file are in the page cache, by mincore. The file has to be ours: of others' the kernel says nothing."""
    nbytes = path.stat().st_size
    if not nbytes:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        answer = np.zeros(-(-nbytes // PAGE_BYTES), np.uint8)
        try:
            if _libc().mincore(view.ctypes.data, nbytes, answer.ctypes.data):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            del view
    return int(np.count_nonzero(answer & 1))


def _read(path: Path) -> None:
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _forget(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # a dirty page stays
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.mincore.restype = ctypes.c_int
    return library
