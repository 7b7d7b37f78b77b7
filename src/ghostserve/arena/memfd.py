"""A piece of anonymous shared memory: a memfd and its mapping in this process.

It has no name in any file system and no size limit of one; it is gone when the last process that holds a
descriptor or a mapping of it is gone. Pages are given by the kernel when first written and counted then.

Arrays handed out stay valid after `resize`, `refresh` and `close`: they keep the mapping they were cut from,
which shows the same memory. They do not see what lies beyond the size of that time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os

import numpy as np
import numpy.typing as npt

from ghostserve.errors import UsageError

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14


class Segment:
    """One memfd, mapped as a whole. Not thread-safe where it changes size; reading and writing are."""

    def __init__(self, fd: int) -> None:
        """Take ownership of `fd`; use `create` or `attach`."""
        self._fd = fd
        self._map: mmap.mmap | None = None
        self._array: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self.refresh()

    @classmethod
    def create(cls, name: str, size_bytes: int) -> Segment:
        """A new segment of zeros. `name` only shows in /proc/PID/maps and need not be unique."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Segment:
        """Map the memfd `fd`, which belongs to the segment from now on (pass a `dup` to keep one).

        If this raises (OSError: no descriptor, or one that cannot be mapped), `fd` is still the caller's.
        """
        return cls(fd)

    @property
    def fd(self) -> int:
        """The descriptor, close-on-exec; the segment closes it."""
        return self._fd

    @property
    def size_bytes(self) -> int:
        """Size of the mapping; smaller than the memory if somebody else grew it since."""
        return self._array.size

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The whole mapping, shape [size_bytes], writable."""
        return self._array

    def resize(self, size_bytes: int) -> None:
        """Grow the memory by zeros and map it anew. UsageError if it would shrink.

        Shrinking would kill every other process that touches the part cut off (SIGBUS).
        """
        current = os.fstat(self._fd).st_size
        if size_bytes < current:
            raise UsageError(f"a segment of {current} bytes cannot shrink to {size_bytes}")
        os.ftruncate(self._fd, size_bytes)
        self.refresh()

    def refresh(self) -> None:
        """Map what the memory has become after somebody else grew it; nothing if it has not."""
        size = os.fstat(self._fd).st_size
        if size == self._array.size:
            return
        mapping = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        # The shadow is the users' text in another form: a core dump must not carry it to a disk.
        mapping.madvise(mmap.MADV_DONTDUMP)
        self._release_mapping()
        self._map, self._array = mapping, np.frombuffer(mapping, dtype=np.uint8)

    def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros and give its memory back, for every process that maps it.

        Any byte range: the kernel zeroes the parts of pages at its ends and removes the pages between.
        """
        assert 0 <= offset <= offset + length <= self.size_bytes, (offset, length, self.size_bytes)
        if length and _libc.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"punching {length} bytes at {offset}: {os.strerror(error)}")

    def populate(self, offset: int, length: int) -> None:
        """Give a range memory now and map it here, so that first writes are as quick as later ones.

        A first write costs a page fault per 4 KiB (3 us measured in a virtual machine; a tenth of one once
        mapped). `offset` is a multiple of the page size. Contents stay. Does nothing before Linux 5.14.
        """
        assert 0 <= offset <= offset + length <= self.size_bytes, (offset, length, self.size_bytes)
        if length and self._map is not None:
            try:
                self._map.madvise(_MADV_POPULATE_WRITE, offset, length)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise

    def allocated_bytes(self) -> int:
        """Memory behind the segment, in whole pages; what was never written or was punched is not in it."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor. May be called again. Arrays handed out keep their mapping until they go."""
        self._release_mapping()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _release_mapping(self) -> None:
        mapping, self._map = self._map, None
        self._array = np.empty(0, dtype=np.uint8)
        if mapping is not None:
            # Where arrays are still out there the mapping goes with the last of them.
            with contextlib.suppress(BufferError):
                mapping.close()


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.fallocate.restype = ctypes.c_int
    return libc


_libc = _load_libc()
