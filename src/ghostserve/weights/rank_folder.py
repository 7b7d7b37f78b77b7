"""The folder that copies of ranks' images lie in: whose it has to be, and what is in it while a copy is written.

Who can put a file there says what a server computes, checksums or not. So folder and file have to be this user's, or root's, and not
every user's to write to. A group may write there where somebody let it: Kubernetes gives a volume to the group of a pod.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ghostserve.errors import BadWeightsFileError
from ghostserve.weights.waiting_lock import try_lock

_NEW = ".new"


def demand_ours(path: Path) -> None:
    """Raise BadWeightsFileError if somebody else may have put it there, OSError if that cannot be seen."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise BadWeightsFileError(
            f"{path}: belongs to user {found.st_uid}, not to {os.geteuid()}, who would read it, or to root: remove it, or take "
            "another folder with XDG_CACHE_HOME"
        )
    if found.st_mode & stat.S_IWOTH:
        raise BadWeightsFileError(
            f"{path}: every user can write to it (mode {stat.S_IMODE(found.st_mode):04o}): see what is in there, then "
            "'chmod o-w', or take another folder with XDG_CACHE_HOME"
        )


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that has the name `path`, and is on the disk, if all goes well. Raises OSError, and leaves nothing beside it.

    It is locked as long as it is written, so that what a killed process left can be told from it.
    """
    fd, name = _new_beside(path)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def remove_leftovers(folder: Path) -> None:
    """What processes left that were killed while they wrote."""
    for path in folder.glob(f"rank-*{_NEW}"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if try_lock(fd):
                    path.unlink()
            finally:
                os.close(fd)


def _new_beside(path: Path) -> tuple[int, str]:
    while True:
        fd, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=_NEW, dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            if not try_lock(fd) or os.fstat(fd).st_nlink == 0:  # taken for a leftover before it was locked
                os.close(fd)
                continue
        return fd, name
