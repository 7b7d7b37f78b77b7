"""The verdicts of the probes, row by row, and what counts as quiet."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from ghostserve.config import GhostConfig
from ghostserve.errors import UsageError
from ghostserve.web.health_state import Facts, HealthState, Limits, Quiet, judge

LIMITS = Limits(stall_timeout_s=60.0, ready_while_recovering_s=10.0)


def document(**more: Any) -> dict[str, Any]:
    return {"state": "serving", "phase": None, "recovering_since_s": None, "recoveries": [], **more}


SERVING = Facts(document=document(), now_s=1000.0)
RECOVERING = Facts(
    document=document(state="recovering", phase="spawn", recovering_since_s=999.5), now_s=1000.0
)


@pytest.mark.parametrize(
    ("facts", "state", "healthy", "ready"),
    [
        (SERVING, HealthState.SERVING, True, True),
        (replace(SERVING, running=3, quiet_s=60.0), HealthState.SERVING, True, True),
        (replace(SERVING, running=3, quiet_s=60.1), HealthState.STALLED, False, False),
        (replace(SERVING, running=0, quiet_s=999.0), HealthState.SERVING, True, True),
        (RECOVERING, HealthState.RECOVERING, True, True),
        (replace(RECOVERING, now_s=1009.5), HealthState.RECOVERING, True, True),
        (replace(RECOVERING, now_s=1009.6), HealthState.RECOVERING, True, False),
        (replace(RECOVERING, running=1, quiet_s=61.0), HealthState.STALLED, False, False),
        (replace(SERVING, document=document(written_at_s=940.0)), HealthState.SERVING, True, True),
        (replace(SERVING, document=document(written_at_s=939.9)), HealthState.STALLED, False, False),
        (
            replace(SERVING, document=document(written_at_s=939.9), draining=True),
            HealthState.STALLED,
            False,
            False,
        ),
        (replace(SERVING, draining=True), HealthState.DRAINING, True, False),
        (replace(RECOVERING, draining=True), HealthState.DRAINING, True, False),
        (replace(SERVING, draining=True, engine_dead=True), HealthState.FAILED, False, False),
        (replace(SERVING, document=None), HealthState.STARTING, False, False),
        (replace(SERVING, document=document(state="starting")), HealthState.STARTING, False, False),
        (replace(SERVING, document=document(failure="gone")), HealthState.FAILED, False, False),
        (replace(SERVING, document=document(state="failed")), HealthState.FAILED, False, False),
    ],
)
def test_each_state_has_its_verdict(facts: Facts, state: HealthState, healthy: bool, ready: bool) -> None:
    verdict = judge(facts, LIMITS)
    assert (verdict.state, verdict.healthy, verdict.ready) == (state, healthy, ready)
    assert (verdict.reason is None) == (state is HealthState.SERVING)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"stall_timeout": 0.0}, "--stall-timeout 0.0"),
        ({"stall_timeout": math.inf}, "--stall-timeout inf"),
        ({"ready_while_recovering": -1.0}, "--ready-while-recovering -1.0"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GhostConfig(**bounds)  # type: ignore[arg-type]
    assert GhostConfig(ready_while_recovering=0.0).ready_while_recovering == 0.0


def test_a_recovery_is_expected_to_take_what_such_took() -> None:
    past = [{"ok": True, "total_ms": ms} for ms in (400.0, 900.0, 600.0)]
    failed = {"ok": False, "total_ms": 60_000.0}
    facts = replace(
        RECOVERING,
        document=document(phase="kv", recovering_since_s=999.5, recoveries=[*past, failed]),
    )
    recovery = judge(facts, LIMITS).recovery
    assert recovery is not None
    assert (recovery.phase, recovery.elapsed_s, recovery.expected_s) == ("kv", 0.5, 0.6)


def test_the_first_recovery_is_not_guessed_at() -> None:
    """Noticed and not begun yet: it is in `detect`."""
    recovery = judge(replace(SERVING, document=document(recovering_since_s=999.0)), LIMITS).recovery
    assert recovery is not None
    assert (recovery.phase, recovery.expected_s) == ("detect", None)


def test_quiet_counts_while_requests_wait_and_no_step_is_accepted() -> None:
    quiet = Quiet()
    assert quiet.look(100.0, running=1, last_step_s=90.0) == 0.0
    assert quiet.look(130.0, running=2, last_step_s=90.0) == 30.0
    assert quiet.look(131.0, running=2, last_step_s=130.5) == 0.0
    assert quiet.look(140.0, running=1, last_step_s=130.5) == 9.0


def test_an_idle_server_is_not_quiet_and_work_that_arrives_starts_the_count() -> None:
    """Else the first request after an hour would find a server that is called stalled."""
    quiet = Quiet()
    assert quiet.look(100.0, running=1, last_step_s=90.0) == 0.0
    assert quiet.look(3700.0, running=0, last_step_s=90.0) == 0.0  # the look when a request arrives
    assert quiet.look(3701.0, running=1, last_step_s=90.0) == 1.0
