"""The numbers of the pool of weights for `/metrics`, as of a moment ago.

A thread asks the holder every few seconds, and nobody else does: a scrape waits for no other process, and a holder that
hangs costs a thread that has nothing else to do. Counts go on over holders that come and go.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ghostserve.errors import PoolError
from ghostserve.weights.pool import Pool
from ghostserve.weights.pool_types import Counts, ImageKind, PoolStats, Refusal
from ghostserve.weights.runtime_dir import runtime_dir

logger = logging.getLogger(__name__)

PERIOD_S = 2.0


def _no_counts() -> dict[ImageKind, Counts]:
    return {kind: Counts() for kind in ImageKind}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReading:
    """What is known of the pool. Without a holder there is none, and the counts are those of earlier ones."""

    stats: PoolStats | None = None
    counts: Mapping[ImageKind, Counts] = field(default_factory=_no_counts)
    refusals: Mapping[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))


def after(before: PoolReading, now: PoolStats | None, last: PoolStats | None) -> PoolReading:
    """The reading once `now` was heard, `last` being what was heard before: of the same holder, or of an earlier one."""
    if now is None:
        return dataclasses.replace(before, stats=None)
    known = last if last is not None and last.began_s == now.began_s else None
    counts = {}
    for kind in ImageKind:
        old = Counts() if known is None else known.counts[kind]
        sums = {
            name: getattr(before.counts[kind], name) + getattr(now.counts[kind], name) - getattr(old, name)
            for name in (field.name for field in dataclasses.fields(Counts))
        }
        counts[kind] = Counts(**sums)
    refusals = {
        why: before.refusals[why] + now.refusals[why] - (0 if known is None else known.refusals[why])
        for why in Refusal
    }
    return PoolReading(stats=now, counts=counts, refusals=refusals)


def _ask() -> PoolStats | None:
    try:
        return Pool(runtime_dir()).stats()
    except PoolError as error:
        logger.debug("no numbers of the weights' pool: %s", error)
        return None


class PoolWatch:
    """Asks until it is closed; the reading is there at any time."""

    def __init__(self, ask: Callable[[], PoolStats | None] = _ask, *, period_s: float = PERIOD_S) -> None:
        self._ask, self._period_s = ask, period_s
        self._reading = PoolReading()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weights-pool", daemon=True)
        self._thread.start()

    @property
    def reading(self) -> PoolReading:
        return self._reading

    def close(self) -> None:
        """Does not wait for an answer that may be awaited."""
        self._closing.set()

    def _run(self) -> None:
        last: PoolStats | None = None
        while not self._closing.is_set():
            try:
                now = self._ask()
            except Exception:
                logger.exception("the weights' pool is not watched any more")
                return
            self._reading = after(self._reading, now, last)
            last = now or last
            self._closing.wait(self._period_s)
