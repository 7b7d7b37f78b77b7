"""How much of weights this machine's memory holds, for the status. Asked by a thread of its own: no reader waits for the holder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from ghostserve.errors import PoolError
from ghostserve.weights.pool import Pool
from ghostserve.weights.pool_types import ImageKind, PoolStats
from ghostserve.weights.runtime_dir import runtime_dir

logger = logging.getLogger(__name__)

PERIOD_S = 3.0


def _ask() -> PoolStats | None:
    try:
        return Pool(runtime_dir()).stats()
    except PoolError:  # there is none, or it hangs; whoever needs it says so
        return None


class WeightsTiers:
    """The latest answer of the holder, at most some seconds old."""

    def __init__(self, ask: Callable[[], PoolStats | None] = _ask, *, period_s: float = PERIOD_S) -> None:
        self._ask = ask
        self._period_s = period_s
        self._memory: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ghostserve-tiers")
        self._thread.start()

    def describe(self) -> dict[str, Any]:
        """`memory` is None while nobody holds any."""
        return {"memory": self._memory}

    def close(self) -> None:
        """Ask no more."""
        self._ended.set()

    def _run(self) -> None:
        while True:
            try:
                stats = self._ask()
                self._memory = None if stats is None else _as_dict(stats)
            except Exception:  # the status must go on without this part
                self._memory = None
                logger.exception("the weights in memory cannot be counted; not tried again")
                return
            if self._ended.wait(self._period_s):
                return


def _as_dict(stats: PoolStats) -> dict[str, Any]:
    counts = stats.counts.values()
    return {
        "budget_bytes": stats.budget_bytes,
        "used_bytes": stats.used_bytes,
        "referenced_bytes": stats.referenced_bytes,
        "pinned_bytes": stats.pinned_bytes,
        "file_bytes": stats.bytes.get(ImageKind.FILE, 0),
        "rank_bytes": stats.bytes.get(ImageKind.RANK, 0),
        "hits_total": sum(count.hits for count in counts),
        "misses_total": sum(count.misses for count in counts),
        "evictions_total": sum(count.evictions for count in counts),
    }
