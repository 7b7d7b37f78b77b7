"""What recovery is told and tells: the detector's verdicts, the phase clock and report, and the event log."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from itertools import product

import pytest

from ghostserve.recovery.detector import (
    RUNNING,
    Health,
    RankVerdict,
    RankView,
    dead_ranks,
    exit_reason,
    verdict,
)
from ghostserve.recovery.report import PhaseClock, RecoveryReport
from ghostserve.types import Phase, RecoveryPath

EPOCH, STEP = 3, 70
BEHIND = RankView(
    rank=0,
    exited=False,
    exit_code=None,
    stamp_epoch=EPOCH,
    stamp_step=STEP - 1,
    stamp_status="done",
    stamp_at_s=99.0,
)
BEGUN = replace(BEHIND, stamp_step=STEP, stamp_status=RUNNING)
ANSWERED = replace(BEHIND, stamp_step=STEP, stamp_status="done")
EXITED = replace(BEHIND, exited=True, exit_code=-9)


def judge(
    *views: RankView, waited_s: float, in_flight: bool = True, all_stuck_s: float | None = None
) -> list[RankVerdict]:
    """Verdicts on these ranks after so long a wait; the deadline is 10 s."""
    numbered = [replace(view, rank=rank) for rank, view in enumerate(views)]
    return verdict(
        100.0 + waited_s,
        numbered,
        epoch=EPOCH,
        step=STEP,
        deadline_s=10.0,
        step_started_at_s=100.0 if in_flight else None,
        all_stuck_s=all_stuck_s,
    )


def states(verdicts: list[RankVerdict]) -> list[str]:
    return [v.state.value for v in verdicts]


# ---- detector ----


@pytest.mark.parametrize(
    ("views", "waited_s", "expected"),
    [
        pytest.param((BEHIND, BEHIND), 1.0, "alive alive", id="a step has just begun"),
        pytest.param((ANSWERED, BEHIND), 6.0, "alive slow", id="past half of the deadline"),
        pytest.param((ANSWERED, BEHIND), 10.0, "alive slow", id="the deadline itself is still in time"),
        pytest.param((ANSWERED, BEHIND), 10.1, "alive dead", id="hung: the other has answered"),
        pytest.param((BEGUN, BEHIND, BEGUN), 10.1, "suspect dead suspect", id="hung before the step"),
        pytest.param(
            (ANSWERED, BEGUN, BEHIND), 10.1, "alive suspect dead", id="only those furthest behind are dead"
        ),
        pytest.param((BEHIND, BEHIND), 10.1, "suspect suspect", id="all equally stuck"),
        pytest.param((BEGUN, BEGUN), 20.0, "suspect suspect", id="all equally stuck, in the step"),
        pytest.param((BEGUN, BEGUN), 20.1, "dead dead", id="all equally stuck for too long"),
        pytest.param((EXITED, BEHIND), 0.1, "dead alive", id="an exit counts at once"),
        pytest.param((EXITED, BEGUN, BEHIND), 30.0, "dead suspect suspect", id="an exit explains the wait"),
        pytest.param((EXITED, ANSWERED), 30.0, "dead alive", id="an exit while the other has answered"),
        pytest.param((BEHIND,), 20.1, "dead", id="a single rank"),
    ],
)
def test_verdict(views: tuple[RankView, ...], waited_s: float, expected: str) -> None:
    assert states(judge(*views, waited_s=waited_s)) == expected.split()


def test_only_exits_count_when_no_step_is_in_flight() -> None:
    assert states(judge(BEHIND, EXITED, waited_s=1e6, in_flight=False)) == ["alive", "dead"]


def test_a_failed_step_is_an_answer() -> None:
    assert states(judge(replace(ANSWERED, stamp_status="failed"), waited_s=1e6)) == ["alive"]


def test_a_stamp_of_a_later_step_is_an_answer() -> None:
    assert states(judge(replace(BEGUN, stamp_step=STEP + 1), waited_s=1e6)) == ["alive"]


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1])
def test_a_stamp_of_another_epoch_says_nothing(epoch: int) -> None:
    assert states(judge(ANSWERED, replace(ANSWERED, stamp_epoch=epoch), waited_s=11.0)) == ["alive", "dead"]


@pytest.mark.parametrize(
    ("all_stuck_s", "waited_s", "expected"),
    [
        (15.0, 14.9, "suspect"),
        (15.0, 15.1, "dead"),
        (0.0, 9.0, "slow"),
        (0.0, 10.1, "dead"),  # never before the deadline
    ],
)
def test_the_bound_for_all_stuck_is_the_callers(all_stuck_s: float, waited_s: float, expected: str) -> None:
    assert states(judge(BEGUN, BEGUN, waited_s=waited_s, all_stuck_s=all_stuck_s)) == [expected, expected]


def test_reasons_are_for_people() -> None:
    dead, waiting = judge(EXITED, BEHIND, waited_s=12.0)
    assert dead.reason == "killed by SIGKILL"
    assert waiting.reason == (
        "step 70 not answered for 12.0 of 10.0 s; waits for rank 0, which is gone; last stamp 13.0 s ago"
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, "process is gone"),
        (0, "exited with 0"),
        (3, "exited with 3"),
        (-11, "killed by SIGSEGV"),
        (-200, "killed by signal 200"),
    ],
)
def test_exit_reason(code: int | None, reason: str) -> None:
    assert exit_reason(code) == reason


def test_dead_ranks() -> None:
    verdicts = judge(EXITED, ANSWERED, EXITED, waited_s=1.0)
    assert dead_ranks(verdicts) == {0, 2}
    assert verdicts[1].state is Health.ALIVE


def test_no_ranks_no_verdicts() -> None:
    assert judge(waited_s=1.0) == []


def test_worse_with_time_only() -> None:
    """Whatever the ranks look like, waiting longer never makes a verdict milder."""
    order = [h.value for h in Health]
    for views in product((BEHIND, BEGUN, ANSWERED, EXITED), repeat=2):
        seen = [states(judge(*views, waited_s=w / 2)) for w in range(60)]
        for rank in range(2):
            levels = [order.index(line[rank]) for line in seen]
            assert levels == sorted(levels), (views, rank)


# ---- phase clock and report ----


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
        phases_ms=clock.phases_ms,
        total_ms=clock.total_ms,
        kv_blocks_from_parity=12,
        kv_blocks_from_mirrors=3,
        kv_bytes_rebuilt=1 << 20,
        tokens_recomputed=0,
        requests_recomputed=0,
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
