"""One file, open for reading in two ways: past the page cache where the file system can, and through it.

Past it (O_DIRECT) the disk writes straight into our memory: no copy, no memory for a second one, nothing of others
evicted. What is in the page cache already is taken from there, and so is what a direct read cannot do: the odd
bytes at the end of a file, and everything where the file system answers EINVAL.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghostserve.errors import BadWeightsFileError, MissingShardError, WeightsChangedError, WeightsReadError
from ghostserve.weights.ranges import ALIGN_BYTES

_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
REMEDIES = {
    errno.EIO: "the disk or its connection is failing: look into the kernel's log (dmesg) and take the model from elsewhere",
    errno.ELOOP: "put the file itself there",
    errno.ESTALE: "the file was replaced on its server: start again",
    errno.EACCES: "its permissions do not let this user read it",
    errno.EPERM: "its permissions do not let this user read it",
}


def read_error(path: Path, offset: int | None, error: OSError) -> WeightsReadError:
    """What to say of an error of the operating system."""
    where = "" if offset is None else f" at byte {offset}"
    remedy = REMEDIES.get(error.errno or 0, "check the disk or file system that it is on")
    return WeightsReadError(f"{path}: {error.strerror or error}{where}; {remedy}")


class Source:
    """One open file. Any number of threads read at once; the last to `leave` closes it, so that no descriptor is
    given to another file while somebody may still read from it.
    """

    def __init__(self, path: Path, *, direct: bool | None = None) -> None:
        """`direct`: None is where it works and is faster, True wherever it works, False never."""
        self.path = path
        self._lock = threading.Lock()
        self._users = 1
        self._direct: int | None = None
        self._refuses_direct = False
        self._map: mmap.mmap | None = None  # never read: only to ask which of its pages are cached
        self._address = 0
        try:
            self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise MissingShardError(f"{path}: is not there; download the model again") from None
        except OSError as error:
            raise read_error(path, None, error) from error
        try:
            found = os.fstat(self._buffered)
            if not stat.S_ISREG(found.st_mode):
                raise BadWeightsFileError(f"{path}: is no regular file; correct the path")
            self.nbytes, self.mtime_ns = found.st_size, found.st_mtime_ns
            self.inode = (found.st_dev, found.st_ino, found.st_ctime_ns)
            self._open_direct(direct, owner=found.st_uid)
        except OSError as error:
            self._close()
            raise read_error(path, None, error) from error
        except BaseException:
            self._close()
            raise

    def _open_direct(self, direct: bool | None, *, owner: int) -> None:
        if direct is not False:
            with contextlib.suppress(OSError):  # the file system has none
                self._direct = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        if self._direct is None:
            os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        elif direct is None and self.nbytes and (owner == os.geteuid() or os.access(self.path, os.W_OK)):
            with contextlib.suppress(
                OSError, ValueError
            ):  # of others' files the kernel says that all is cached
                self._map = mmap.mmap(self._buffered, 0, prot=mmap.PROT_READ)
                self._address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache, where nothing is in it."""
        return self._direct is not None and not self._refuses_direct

    def enter(self) -> None:
        """One more that reads."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """One less; the first is who made it."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._close()

    def _close(self) -> None:
        for fd in (self._buffered, self._direct):
            if fd is not None:
                os.close(fd)
        if self._map is not None:
            self._map.close()

    def check_unchanged(self, *, nbytes: int, mtime_ns: int) -> None:
        """WeightsChangedError unless the file is still of this size and time of change."""
        try:
            now = os.fstat(self._buffered)
        except OSError as error:
            raise read_error(self.path, None, error) from error
        if now.st_size != nbytes:
            raise WeightsChangedError(
                f"{self.path}: has {now.st_size} bytes now, and had {nbytes}: somebody is writing to it; "
                "wait until the download or copy has ended and start again"
            )
        if now.st_mtime_ns != mtime_ns:
            raise WeightsChangedError(
                f"{self.path}: was written to since it was looked at; "
                "wait until the download or copy has ended and start again"
            )

    def read(self, offset: int, into: memoryview, moved: Callable[[int], None]) -> int:
        """Fill `into` from `offset` on; how many bytes of it came past the page cache.

        `moved` is told of every answer of the operating system, in bytes. WeightsReadError, or WeightsChangedError if
        the file ends before `into` is full.
        """
        done = direct = 0
        if self.direct and not self._is_cached(offset, len(into)):
            done = direct = self._read_direct(offset, into, moved)
        while done < len(into):
            try:
                count = os.preadv(self._buffered, [into[done:]], offset + done)
            except OSError as error:
                raise read_error(self.path, offset + done, error) from error
            if count == 0:
                self.check_unchanged(nbytes=self.nbytes, mtime_ns=self.mtime_ns)
                raise WeightsReadError(
                    f"{self.path}: no more bytes at byte {offset + done} of {self.nbytes}; check the file system"
                )
            done += count
            moved(count)
        return direct

    def read_bytes(self, offset: int, nbytes: int) -> bytes:
        """A few bytes."""
        data = bytearray(nbytes)
        self.read(offset, memoryview(data), lambda _: None)
        return bytes(data)

    def _read_direct(self, offset: int, into: memoryview, moved: Callable[[int], None]) -> int:
        """As many of the bytes as can be read so, from the first on."""
        assert self._direct is not None
        end = len(into) - len(into) % ALIGN_BYTES
        done = 0
        while done < end:
            try:
                count = os.preadv(self._direct, [into[done:end]], offset + done)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise read_error(self.path, offset + done, error) from error
                self._refuses_direct = True
                return done
            moved(count)
            count -= count % ALIGN_BYTES  # after a short read the block that it ended in is read again
            if count == 0:
                return done
            done += count
        return done

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether all of it is in the page cache. False where that is not to be known."""
        if self._map is None:
            return False
        begin = offset - offset % mmap.PAGESIZE
        return bool(_cached_pages(self._address + begin, offset + nbytes - begin).all())


def _cached_pages(address: int, nbytes: int) -> npt.NDArray[np.bool_]:
    """Of a mapping at a page's beginning: which of its pages are cached; none if the kernel does not say."""
    pages = np.zeros(-(-nbytes // mmap.PAGESIZE), dtype=np.uint8)
    if _libc().mincore(address, nbytes, pages.ctypes.data) != 0:
        pages[:] = 0
    return (pages & 1).astype(np.bool_)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return libc
