"""What probes are told: from facts to a verdict. Pure; reads no page and no clock.

           | /livez | /health | /readyz
starting   |  200   |   503   |  503      not served yet
serving    |  200   |   200   |  200
recovering |  200   |   200   |  200, and 503 once it lasts longer than `ready_while_recovering_s`
draining   |  200   |   200   |  503      nothing new is taken; restarting it would cut what is open
stalled    |  200   |   503   |  503      for `stall_timeout_s` requests wait and nothing happened, or the engine core
           |        |         |           wrote no state, which it does every two seconds: it hangs, though nobody asks it yet
failed     |  200   |   503   |  503      the engine is gone; the process ends by itself

Why a recovery counts as ready: it is over in about a second, sooner than one period of a probe, and requests that arrive
meanwhile are answered after it. To be taken out of a load balancer and put back takes longer, and where there is one replica only,
its clients would get errors instead of a pause. One that lasts is another matter: then other replicas are faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ghostserve.types import Phase, ServerState


class HealthState(Enum):
    """What a client may expect of the server; `ServerState` as seen from outside."""

    STARTING = "starting"
    SERVING = "serving"
    RECOVERING = "recovering"  # a lost worker is being replaced; open requests wait
    DRAINING = "draining"  # told to end: open requests are finished, new ones refused
    STALLED = (
        "stalled"  # for too long no step was accepted though requests wait, or the engine core wrote nothing
    )
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds, as configured."""

    stall_timeout_s: float
    ready_while_recovering_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was read. `document` is the state document, None before the first; ages are None where nothing happened yet."""

    document: Mapping[str, Any] | None
    engine_dead: bool = False
    draining: bool = False
    running: int = 0
    quiet_s: float = 0.0
    last_token_age_s: float | None = None
    now_s: float = 0.0  # monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One that is under way. `expected_s`: what such a recovery took so far, None if there was none."""

    phase: str
    elapsed_s: float
    expected_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the probes answer; `reason` for what is not well."""

    state: HealthState
    healthy: bool
    ready: bool
    reason: str | None = None
    recovery: Recovery | None = None


def judge(facts: Facts, limits: Limits) -> Verdict:
    """The first row of the table that holds, worst first."""
    document = facts.document
    failure = (document or {}).get("failure")
    if facts.engine_dead or failure or (document or {}).get("state") == ServerState.FAILED.value:
        return _unwell(HealthState.FAILED, failure or "the engine has ended")
    if document is None or document["state"] == ServerState.STARTING.value:
        return _unwell(HealthState.STARTING, "the engine is still starting")
    recovery = _recovery(document, facts.now_s)
    if facts.running and facts.quiet_s > limits.stall_timeout_s:
        reason = f"{facts.running} requests wait, and for {facts.quiet_s:.0f} s no step was accepted"
        return _unwell(HealthState.STALLED, reason, recovery)
    silent_s = facts.now_s - document.get("written_at_s", facts.now_s)
    if silent_s > limits.stall_timeout_s:
        return _unwell(
            HealthState.STALLED, f"the engine core has written nothing for {silent_s:.0f} s", recovery
        )
    if facts.draining:
        return Verdict(
            state=HealthState.DRAINING,
            healthy=True,
            ready=False,
            reason="the server is shutting down",
            recovery=recovery,
        )
    if recovery is None:
        return Verdict(state=HealthState.SERVING, healthy=True, ready=True)
    ready = recovery.elapsed_s <= limits.ready_while_recovering_s
    reason = "a worker is being replaced" if ready else f"recovering for {recovery.elapsed_s:.0f} s"
    return Verdict(state=HealthState.RECOVERING, healthy=True, ready=ready, reason=reason, recovery=recovery)


def _unwell(state: HealthState, reason: str, recovery: Recovery | None = None) -> Verdict:
    return Verdict(state=state, healthy=False, ready=False, reason=reason, recovery=recovery)


def _recovery(document: Mapping[str, Any], now_s: float) -> Recovery | None:
    since_s = document.get("recovering_since_s")
    if since_s is None:
        return None
    took_s = [past["total_ms"] / 1e3 for past in document.get("recoveries", ()) if past["ok"]]
    return Recovery(
        phase=document.get("phase") or Phase.DETECT.value,
        elapsed_s=max(0.0, now_s - since_s),
        expected_s=statistics.median(took_s) if took_s else None,
    )


class Quiet:
    """For how long requests have been waiting without a step being accepted, as seen by whoever looks now and then.

    Looked at when work arrives and at every probe. Time counts from the first look that found the last step where it still
    is and requests waiting: an idle server is not quiet, and the answer is never too long.
    """

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._last_step_s: float | None = None

    def look(self, now_s: float, *, running: int, last_step_s: float | None) -> float:
        """Seconds of quiet."""
        if not running or self._since_s is None or last_step_s != self._last_step_s:
            self._since_s, self._last_step_s = now_s, last_step_s
        return now_s - self._since_s
