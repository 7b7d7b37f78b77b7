"""The report of a recovery that is not over yet."""

from __future__ import annotations

from typing import Any

from ghostserve.arena.event_rings import EventRings
from ghostserve.engine.rebuild import RebuildResult
from ghostserve.engine.ring import RanksDied, RankSilent
from ghostserve.events.kinds import PhaseBegun, PhaseEnded, RankLost
from ghostserve.recovery.report import PhaseClock, RecoveryReport
from ghostserve.types import Phase, RecoveryPath


class OpenReport:
    """Collects what a recovery did until it ends, and tells its losses and phases as they come."""

    def __init__(self, *, clock: PhaseClock, reason: str, events: EventRings) -> None:
        self.clock = clock
        self._events = events
        self._begun: set[Phase] = set()
        self.reason = reason
        self.lost_ranks: tuple[int, ...] = ()
        self.lost_pids: tuple[int, ...] = ()
        self.result = RebuildResult()

    def lose(self, failure: RanksDied | RankSilent, workers: Any) -> None:
        """Processes of ranks are lost: since the start of the recovery, or now, on the way."""
        at_s = None if self.lost_ranks else self.clock.started_at_s
        cause = "crash" if isinstance(failure, RanksDied) else "slow" if failure.evicted else "hang"
        for rank in sorted(failure.ranks):
            pid = workers[rank].proc.pid
            self.lost_ranks += (rank,)
            self.lost_pids += (pid,)
            lost = RankLost(rank=rank, cause=cause, pid=pid, reason=failure.reason)
            self._events.tell(lost, at_monotonic_s=at_s)

    def begin(self, phase: Phase) -> None:
        """`phase` begins now."""
        self._begun.add(phase)
        self._events.tell(PhaseBegun(phase=phase.value))

    def mark(self, phase: Phase, now_s: float) -> None:
        """`phase` ends now; what nobody saw begin has begun with the last mark."""
        begun_s, spent_s = self.clock.last_s, self.clock.mark(phase, now_s)
        if phase not in self._begun:
            self._events.tell(PhaseBegun(phase=phase.value), at_monotonic_s=begun_s)
        self._begun.discard(phase)
        self._events.tell(
            PhaseEnded(phase=phase.value, ms=round(spent_s * 1e3, 3)), at_monotonic_s=self.clock.last_s
        )

    def add(self, result: RebuildResult) -> None:
        """What one pass restored; a pass that was cut short and repeated counts twice, as its work did."""
        self.result = self.result.plus(result)

    def close(self, *, epoch: int, ok: bool) -> RecoveryReport:
        result = self.result
        return RecoveryReport(
            epoch=epoch,
            lost_ranks=self.lost_ranks,
            lost_pids=self.lost_pids,
            path=RecoveryPath.RECOMPUTE if result.requests_recomputed else RecoveryPath.REBUILD,
            ok=ok,
            reason=self.reason,
            noticed_at_s=self.clock.started_at_s,
            phases_ms=self.clock.phases_ms,
            total_ms=self.clock.total_ms,
            kv_blocks_from_parity=result.blocks_from_parity,
            kv_blocks_from_mirrors=result.blocks_from_mirrors,
            kv_bytes_rebuilt=result.bytes_rebuilt,
            kv_blocks_forgotten=result.blocks_forgotten,
            tokens_recomputed=result.tokens_recomputed,
            requests_recomputed=result.requests_recomputed,
            requests_recomputed_by_choice=result.requests_by_choice,
        )
