"""The report of a recovery that is not over yet."""

from __future__ import annotations

from typing import Any

from ghostserve.engine.rebuild import RebuildResult
from ghostserve.recovery.report import PhaseClock, RecoveryReport
from ghostserve.types import RecoveryPath


class OpenReport:
    """Collects what a recovery did until it ends."""

    def __init__(self, *, clock: PhaseClock, reason: str) -> None:
        self.clock = clock
        self.reason = reason
        self.lost_ranks: tuple[int, ...] = ()
        self.lost_pids: tuple[int, ...] = ()
        self.result = RebuildResult()

    def lose(self, ranks: frozenset[int], workers: Any) -> None:
        """These ranks' processes are lost, now or on the way."""
        self.lost_ranks += tuple(sorted(ranks))
        self.lost_pids += tuple(workers[rank].proc.pid for rank in sorted(ranks))

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
