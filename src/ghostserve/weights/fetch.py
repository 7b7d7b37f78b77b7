"""One file of a model from its remote into a `.partial` file that a later call goes on with, however this one ended.

A partial file is always a beginning of the file: chunks arrive side by side and are written in order. So its length is all
that has to be known, and it needs no record beside it that could be wrong after a SIGKILL.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ghostserve.errors import DiskFullError, RemoteError, WeightsReadError
from ghostserve.weights.remote import NoRanges, Remote
from ghostserve.weights.remote_names import RemoteFile

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_BYTES = 2**22
SPARE_BYTES = 64 * 2**20
"""Left free on the disk: records, and what others write meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Checksums of the bytes that lie on the disk, in hexadecimal."""

    sha256: str
    md5: str | None


class _File:
    """The partial file: appended to, and summed as it grows."""

    def __init__(self, path: Path, *, nbytes: int, with_md5: bool) -> None:
        self._path = path
        self._nbytes = nbytes
        self._with_md5 = with_md5
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.length = 0
        self._begin()
        if os.fstat(self._descriptor).st_size > nbytes:
            self.restart()
        self._sum_what_is_there()

    def restart(self) -> None:
        """Forget what is there."""
        os.ftruncate(self._descriptor, 0)
        self.length = 0
        self._begin()

    def append(self, data: bytes | memoryview) -> None:
        """Raises DiskFullError; what could be written stays."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, self.length)
                self._add(view[:written])
                view = view[written:]
        except OSError as error:
            raise self._why(error) from error

    def close(self, *, complete: bool) -> Sums:
        """On the disk before it gets its name, where it is complete."""
        try:
            if complete:
                os.fsync(self._descriptor)
        except OSError as error:
            raise self._why(error) from error
        finally:
            os.close(self._descriptor)
        md5 = self._md5.hexdigest() if self._md5 is not None else None
        return Sums(sha256=self._sha256.hexdigest(), md5=md5)

    def _begin(self) -> None:
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False) if self._with_md5 else None

    def _add(self, data: memoryview) -> None:
        self._sha256.update(data)
        if self._md5 is not None:
            self._md5.update(data)
        self.length += len(data)

    def _sum_what_is_there(self) -> None:
        try:
            while data := os.pread(self._descriptor, _READ_BYTES, self.length):
                self._add(memoryview(data))
                os.utime(self._descriptor)  # whoever waits for us sees that we get on
        except OSError as error:
            raise WeightsReadError(
                f"{self._path}: {error.strerror} at byte {self.length}: remove this file and pull again"
            ) from error

    def _why(self, error: OSError) -> Exception:
        return disk_full(error, self._path, there=self.length, nbytes=self._nbytes) or error


def demand_room(folder: Path, nbytes: int, *, model: str, options: str) -> None:
    """DiskFullError before so many more bytes are fetched into `folder`, rather than after an hour."""
    free = shutil.disk_usage(folder).free
    if nbytes and nbytes + SPARE_BYTES > free:
        raise DiskFullError(
            f"{folder}: {nbytes} more bytes are needed for {model} and {free} are free: make room, or take another folder with "
            f"{options}"
        )


def disk_full(error: OSError, path: Path, *, there: int, nbytes: int) -> DiskFullError | None:
    """What to say where the disk, or what we may have of it, is full; None for another error."""
    if error.errno not in NO_ROOM:
        return None
    return DiskFullError(
        f"{path}: {error.strerror} after {there} of {nbytes} bytes; make room for {nbytes - there} more in {path.parent} (or take "
        "another folder with --download-dir) and pull again: what is there is kept"
    )


def length_of(path: Path) -> int:
    """0 for what is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def fetch(remote: Remote, file: RemoteFile, partial: Path, *, on_bytes: Callable[[int], None]) -> Sums:
    """Complete `partial`; returns its checksums. `on_bytes` gets what arrived, less what had to be thrown away.

    Raises RemoteError, WeightsChangedError, DiskFullError; the partial file is kept.
    """
    into = _File(partial, nbytes=file.nbytes, with_md5=len(_word(file.etag)) == 32)
    complete = False
    try:
        try:
            _take(into, remote.chunks(file, into.length), file.nbytes, on_bytes)
        except NoRanges:
            on_bytes(-into.length)
            into.restart()
            _take(into, remote.whole(file), file.nbytes, on_bytes)
        if into.length != file.nbytes:
            came = "more" if into.length > file.nbytes else str(into.length)
            raise RemoteError(f"{remote.url}/{file.name}: {came} bytes came of {file.nbytes}: pull again")
        complete = True
    finally:
        sums = into.close(complete=complete)
    return sums


def _take(
    into: _File, pieces: Iterable[bytes | memoryview], nbytes: int, on_bytes: Callable[[int], None]
) -> None:
    for piece in pieces:
        before = into.length
        into.append(piece[: nbytes + 1 - before])  # one byte too many is enough to tell
        on_bytes(into.length - before)
        if into.length > nbytes:
            break


def sums_of_bytes(data: bytes) -> Sums:
    """Both checksums of what is in memory."""
    md5 = hashlib.md5(data, usedforsecurity=False)
    return Sums(sha256=hashlib.sha256(data).hexdigest(), md5=md5.hexdigest())


def agrees(etag: str | None, sums: Sums) -> bool | None:
    """Whether an etag is the checksum of these bytes; None where it has not the form of one."""
    word = _word(etag)
    if len(word) == 64:
        return word == sums.sha256
    return word == sums.md5 if len(word) == 32 and sums.md5 is not None else None


def _word(etag: str | None) -> str:
    """An etag that has the form of a checksum, without its quotes; or nothing."""
    word = (etag or "").strip('"').lower()
    return word if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", word) else ""
