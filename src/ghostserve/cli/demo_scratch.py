"""The demo's temporary directory, and the end of those that a killed demo left behind.

The name tells the process that made it: `ghostserve-demo-PID-RANDOM`. A directory whose process is gone was
left by a SIGKILL. A pid may have another holder by now; then the directory stays until that one is gone too.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "ghostserve-demo-"
_NAME = re.compile(rf"{PREFIX}([1-9]\d{{0,8}})-\w+")


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, so it exists
    return True


def _is_own_directory(path: Path) -> bool:
    """Whether it is a directory of this user itself, not a link to one: anybody may put names there."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return False


def sweep(parent: Path) -> None:
    """Remove what demos that no longer run have left in `parent`."""
    for name in os.listdir(parent):
        match = _NAME.fullmatch(name)
        if match and not _process_exists(int(match[1])) and _is_own_directory(parent / name):
            # What cannot be removed now is tried again by the next demo.
            shutil.rmtree(parent / name, ignore_errors=True)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory that is gone afterwards; those of killed demos go before."""
    sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as directory:
        yield Path(directory)
