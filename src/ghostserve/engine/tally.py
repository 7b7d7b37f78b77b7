"""Counts losses and recoveries on the control page, for metrics. Fails open: what cannot be counted is recovered from all the same."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ghostserve.clock import monotonic_s
from ghostserve.engine.oom import OomKills
from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent
from ghostserve.recovery.report import RecoveryReport
from ghostserve.types import FailureKind, Phase, RecoveryOutcome

logger = logging.getLogger(__name__)


class Tally:
    """One per performer; used under the session's lock, `look` by any thread."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._page = executor.session.page
        self._oom = OomKills()
        self._counted: dict[int, int] = {}  # rank -> pid of the last process that was counted as lost

    def look(self) -> None:
        """Every second or so: so that a death later is not blamed on a lack of memory now."""
        self._oom.look(monotonic_s())

    def failed(self, failure: RanksDied | RankRaised | RankSilent) -> None:
        """Each lost process counts once, however often its loss is told. Who is evicted was counted when found slow."""
        with _failing_open():
            if isinstance(failure, RankRaised):
                self._page.ledger.count_failure(FailureKind.RAISED)
                return
            fresh = [rank for rank in sorted(failure.ranks) if self._is_fresh(rank)]
            if isinstance(failure, RankSilent):
                kind = None if failure.evicted else FailureKind.HANG
            else:
                kind = FailureKind.OOM if fresh and self._oom.lately(monotonic_s()) else FailureKind.CRASH
            for _ in fresh if kind is not None else ():
                self._page.ledger.count_failure(kind)

    def _is_fresh(self, rank: int) -> bool:
        pid = self._executor.workers[rank].proc.pid
        if self._counted.get(rank) == pid:
            return False
        self._counted[rank] = pid
        return True

    def ended(self, report: RecoveryReport, outcome: RecoveryOutcome) -> None:
        """It is over, good or bad. Who goes on after it is counted where it is told (`recovery_events.tell_end`)."""
        with _failing_open():
            ledger = self._page.ledger
            ledger.count_recovery(report.path, outcome)
            ledger.observe(None, report.total_ms / 1e3)
            for phase, took_ms in report.phases_ms.items():
                if took_ms or phase is Phase.DETECT:  # the others did not run
                    ledger.observe(phase, took_ms / 1e3)


@contextlib.contextmanager
def _failing_open() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception("a loss or a recovery was not counted")
