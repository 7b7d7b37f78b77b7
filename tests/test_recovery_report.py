"""What recovery tells: the phase clock and the report."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from ghostserve.recovery.report import PhaseClock, RecoveryReport
from ghostserve.types import Phase, RecoveryPath


def test_phase_clock_sums_up() -> None:
    clock = PhaseClock(10.0)
    clock.mark(Phase.DETECT, 10.25)
    clock.mark(Phase.FENCE, 10.5)
    clock.mark(Phase.SPAWN, 12.0)
    clock.mark(Phase.FENCE, 12.5)  # a loss during the recovery
    clock.check()
    assert list(clock.phases_ms) == list(Phase)
    assert clock.phases_ms[Phase.FENCE] == 750.0
    assert clock.phases_ms[Phase.KV] == 0.0
    assert clock.total_ms == 2500.0


def test_phase_clock_takes_marks_that_ended_together() -> None:
    clock = PhaseClock(0.0)
    clock.mark(Phase.WEIGHTS, 2.0)
    clock.mark(Phase.REGROUP, 1.5)  # ended earlier, reported later
    clock.check()
    assert clock.phases_ms[Phase.WEIGHTS] == 2000.0
    assert clock.phases_ms[Phase.REGROUP] == 0.0


def report() -> RecoveryReport:
    clock = PhaseClock(0.0)
    clock.mark(Phase.SPAWN, 1.2345678)
    return RecoveryReport(
        epoch=2,
        lost_ranks=(1,),
        lost_pids=(4711,),
        path=RecoveryPath.REBUILD,
        ok=True,
        reason="killed by SIGKILL",
        noticed_at_s=clock.started_at_s,
        phases_ms=clock.phases_ms,
        total_ms=clock.total_ms,
        kv_blocks_from_parity=12,
        kv_blocks_from_mirrors=3,
        kv_bytes_rebuilt=1 << 20,
        kv_blocks_forgotten=0,
        tokens_recomputed=0,
        requests_recomputed=0,
        requests_recomputed_by_choice=0,
    )


def test_report_as_json() -> None:
    data = json.loads(report().to_json())
    assert "\n" not in report().to_json()
    phases = "detect fence leave spawn regroup weights state kv retry"
    assert list(data["phases_ms"]) == phases.split()
    assert data["phases_ms"]["spawn"] == 1234.568
    assert data["path"] == "rebuild"
    assert data["lost_ranks"] == [1]
    assert list(data) == list(RecoveryReport.__dataclass_fields__)


def test_report_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        report().ok = False  # type: ignore[misc]
