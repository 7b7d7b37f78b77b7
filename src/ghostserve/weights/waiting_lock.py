"""A lock between processes that a dead holder lets go of, waited for with a word and a bound."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import WeightsError

POLL_S = 0.2
NO_PROGRESS_S = 120.0
"""How long we wait for another process that does not get on."""


@contextmanager
def locked(
    path: Path,
    *,
    what: str,
    on_wait: Callable[[str], None],
    sign_of_life: Callable[[], object],
    no_progress_s: float = NO_PROGRESS_S,
) -> Iterator[None]:
    """Hold `path` alone (flock). As long as what `sign_of_life` returns changes, the other process is waited for.

    Raises WeightsError once it has not changed for `no_progress_s`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not try_lock(descriptor):
            on_wait(f"another process is fetching {what}: waiting for it")
            seen, deadline_s = sign_of_life(), monotonic_s() + no_progress_s
            while not try_lock(descriptor):
                there, now_s = sign_of_life(), monotonic_s()
                if there != seen:
                    seen, deadline_s = there, now_s + no_progress_s
                elif now_s > deadline_s:
                    raise WeightsError(
                        f"{what}: another process holds {path} and has not got on for {no_progress_s:.0f} s: end it "
                        f"('fuser {path}' names it) and pull again"
                    )
                sleep_s(POLL_S)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file for as long as that is open; False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
