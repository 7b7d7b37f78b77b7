"""The one place in an engine-core process where executor, scheduler and guard find each other.

vLLM builds executor and scheduler from class names, so they cannot be handed one another.
"""

from __future__ import annotations

import threading
from typing import Any

from ghostserve.arena.control import ControlPage, Counter
from ghostserve.engine.guard import Guard

_current: Session | None = None


class Session:
    """Shared by the executor (which makes it) and the scheduler of one engine core."""

    def __init__(self, *, guard: Guard, page: ControlPage) -> None:
        self.guard = guard
        self.page = page
        self.lock = threading.RLock()  # held while a step is sent or a recovery runs
        self.scheduler: Any = None

    def attach_scheduler(self, scheduler: Any) -> None:
        """Called by the scheduler as it is built."""
        self.scheduler = scheduler
        self.guard.attach(scheduler.kv_cache_manager.block_pool)

    def groups_of_blocks(self) -> dict[int, int]:
        """KV group by block, for every block the shadow knows."""
        manifest = self.guard.manifest
        if manifest is None:
            return {}
        known = {block: entry.group for block, entry in manifest.entries.items()}
        known.update({block: group for block, (group, _) in manifest.unprotected.items()})
        return known

    def count_failed_requests(self, requests: int) -> None:
        self.page.add(Counter.REQUESTS_FAILED_TOTAL, requests)


def start(session: Session) -> None:
    """Make this the process's session."""
    global _current
    _current = session


def current() -> Session:
    """The process's session; the executor has made it before the scheduler is built."""
    assert _current is not None, "the scheduler was built without ghostserve's executor"
    return _current
