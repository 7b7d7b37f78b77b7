"""What the performer tells of a recovery beside its losses and phases (`open_report.py`), as events."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

from ghostserve.arena.control import ControlPage, Counter
from ghostserve.arena.event_rings import EventRings
from ghostserve.engine import request_events
from ghostserve.events.kinds import EpochRaised, PhaseFailed, RecoveryEnded, StepFailed
from ghostserve.recovery import machine
from ghostserve.recovery.report import RecoveryReport
from ghostserve.types import RecoveryOutcome

logger = logging.getLogger(__name__)


_SAID = {
    RecoveryOutcome.RECOVERED: "recovered",
    RecoveryOutcome.STEP_FAILED: "recovered, less the requests of a step",
    RecoveryOutcome.GIVEN_UP: "not recovered",
}


def raise_epoch(page: ControlPage, epoch: int, reason: str) -> None:
    """What is of an older one is refused from here on."""
    page.epoch = epoch
    page.events.tell(EpochRaised(epoch=epoch, reason=reason))
    logger.warning("epoch %d: %s", epoch, reason)


def tell_failed_phases(events: EventRings, happened: Iterable[machine.Event]) -> None:
    """Of what a group of phases brought: which could not be finished."""
    for event in happened:
        if isinstance(event, machine.PhaseFailed):
            events.tell(PhaseFailed(phase=event.phase.value, reason=event.reason))


def tell_failed_step(executor: Any, reason: str) -> None:
    """The oldest step in flight is given up."""
    logger.error("the step is given up, its requests get an error: %s", reason)
    executor.session.page.events.tell(StepFailed(reason=reason, requests=len(_oldest(executor))))


def _oldest(executor: Any) -> Collection[str]:
    """Requests of the oldest step in flight."""
    return executor.open_steps[0].sent.num_scheduled_tokens if executor.open_steps else ()


def tell_end(executor: Any, report: RecoveryReport, outcome: RecoveryOutcome) -> None:
    """First each request that goes on, which is counted here, too; then the report: who sees that has seen all of them."""
    logger.warning("%s: %s", _SAID[outcome], report.to_json())
    events, scheduler = executor.session.page.events, executor.session.scheduler
    resumed = 0
    if scheduler is not None and outcome is not RecoveryOutcome.GIVEN_UP:
        failing = _oldest(executor) if outcome is RecoveryOutcome.STEP_FAILED else ()
        resumed = request_events.resumed(
            events, scheduler, but=failing, epoch=report.epoch, recovery_ms=report.total_ms
        )
    executor.session.page.add(Counter.REQUESTS_RESUMED_TOTAL, resumed)
    events.tell(
        RecoveryEnded(
            epoch=report.epoch,
            ranks=sorted(set(report.lost_ranks)),
            path=report.path.value,
            ok=report.ok,
            reason=report.reason,
            total_ms=round(report.total_ms, 3),
            phases_ms={phase.value: round(ms, 3) for phase, ms in report.phases_ms.items()},
            kv_blocks_from_parity=report.kv_blocks_from_parity,
            kv_blocks_from_mirrors=report.kv_blocks_from_mirrors,
            kv_bytes_rebuilt=report.kv_bytes_rebuilt,
            tokens_recomputed=report.tokens_recomputed,
            requests_recomputed=report.requests_recomputed,
            requests_resumed=resumed,
        )
    )
