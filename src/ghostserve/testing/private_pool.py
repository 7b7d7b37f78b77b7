"""A pool of weights for one's own servers alone, which ends with them: a demo or a test leaves nothing in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ghostserve.errors import PoolError
from ghostserve.weights.pool_start import stop_holder
from ghostserve.weights.runtime_dir import RUNTIME_DIR_ENV


def private_pool_env(parent: Path) -> dict[str, str]:
    """For the environment of servers whose weights are to be kept in `parent`, which is ours."""
    return {RUNTIME_DIR_ENV: str(parent / "pool")}


@contextlib.contextmanager
def private_pool(parent: Path) -> Iterator[None]:
    """End the pool of `private_pool_env` afterwards, if anybody started it."""
    try:
        yield
    finally:
        with contextlib.suppress(PoolError):  # it does not end: then it will when it finds its socket gone
            stop_holder(parent / "pool")
