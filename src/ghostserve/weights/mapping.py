"""Ranges of shared memory in this process: shared while they are filled, private once they are used.

A private range shows the memory's pages without copying them; a page that is written to becomes this process's own. A
range is given back when the last array over it is gone, so whoever drops a parameter drops its pages, too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

_FIXED = 0x10  # MAP_FIXED, linux/mman.h
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value
_SWAPPED_OR_PRESENT = np.uint64(3 << 62)  # of an entry of /proc/PID/pagemap


class Mapped:
    """`length` bytes of a descriptor from `offset`, a multiple of the page size; the descriptor may be closed afterwards."""

    def __init__(self, fd: int, *, offset: int, length: int, shared: bool) -> None:
        """Raises OSError."""
        self._offset, self._length = offset, length
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self._address = _mmap(None, length, flags, fd, offset)
        _libc.madvise(
            self._address, length, mmap.MADV_HUGEPAGE
        )  # of use where the machine allows it to shared memory
        weakref.finalize(self, _libc.munmap, self._address, length).atexit = False

    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, writable; the range stays mapped as long as this, or anything cut from it, lives."""
        return np.asarray(self)

    def make_private(self, fd: int) -> None:
        """Show the same pages, at the same addresses, but let go of the right to change them for others. Raises OSError."""
        _mmap(self._address, self._length, mmap.MAP_PRIVATE | _FIXED, fd, self._offset)
        _libc.madvise(self._address, self._length, mmap.MADV_HUGEPAGE)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self._length,),
            "typestr": "|u1",
            "data": (self._address, False),
        }


def written_pages(address: int, nbytes: int) -> npt.NDArray[np.bool_]:
    """Of each page from that which holds `address` on: whether this process has ever had something in it.

    What an allocator handed out and nobody wrote to reads as zeros, and need not be copied. Where the kernel does not say, every
    page counts as written.
    """
    first, last = address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), 8 * (last - first), 8 * first)
    except OSError:
        entries = b""
    if len(entries) != 8 * (last - first):
        return np.ones(last - first, dtype=np.bool_)
    written: npt.NDArray[np.bool_] = (np.frombuffer(entries, dtype=np.uint64) & _SWAPPED_OR_PRESENT) != 0
    return written


def _mmap(address: int | None, length: int, flags: int, fd: int, offset: int) -> int:
    mapped: int | None = _libc.mmap(address, length, _READ_WRITE, flags, fd, offset)
    if mapped is None or mapped == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"mapping {length} bytes at {offset}: {os.strerror(error)}")
    return mapped


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munmap.restype = ctypes.c_int
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


_libc = _load_libc()
