"""What the scheduler tells of requests, as events. Each is a few microseconds between two steps, and never raises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vllm.v1.request import RequestStatus

from ghostserve.arena.event_rings import EventRings
from ghostserve.clock import wall_s
from ghostserve.events.kinds import (
    Event,
    RequestAborted,
    RequestAdmitted,
    RequestFailed,
    RequestFinished,
    RequestRecomputed,
    RequestResumed,
)


def admitted(events: EventRings, request: Any) -> None:
    """The scheduler has taken it."""
    events.tell(
        RequestAdmitted(
            request=request.request_id,
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            traceparent=traceparent_of(request),
        )
    )


def ended(events: EventRings, request: Any) -> None:
    """Its status says how."""
    events.tell(_end_of(request))


def recomputed(
    events: EventRings, scheduler: Any, names: Collection[str], scheduled: Mapping[str, int], reason: str
) -> None:
    """These requests start over from their tokens. `scheduled`: tokens that steps in flight were to compute."""
    for request in scheduler.running:
        if request.request_id in names:
            tokens = request.num_computed_tokens - scheduled.get(request.request_id, 0)
            events.tell(RequestRecomputed(request=request.request_id, tokens=tokens, reason=reason))


def resumed(
    events: EventRings, scheduler: Any, *, but: Collection[str], epoch: int, recovery_ms: float
) -> int:
    """A recovery is over, and every request that is still open goes on, `but` those; how many."""
    going_on = [
        (name, request)
        for name, request in scheduler.requests.items()
        if name not in but and not request.is_finished()
    ]
    for name, request in going_on:
        events.tell(
            RequestResumed(
                request=name,
                epoch=epoch,
                output_tokens=request.num_output_tokens,
                recovery_ms=round(recovery_ms, 3),
                traceparent=traceparent_of(request),
            )
        )
    return len(going_on)


def traceparent_of(request: Any) -> str | None:
    """The W3C trace context that the client sent, which vLLM passes on when it traces."""
    headers = request.trace_headers
    return None if not headers else headers.get("traceparent")


def _end_of(request: Any) -> Event:
    facts = {
        "request": request.request_id,
        "output_tokens": request.num_output_tokens,
        "total_ms": round(max(0.0, wall_s() - request.arrival_time) * 1e3, 3),
    }
    if request.status is RequestStatus.FINISHED_ABORTED:
        return RequestAborted(**facts)
    if request.status is RequestStatus.FINISHED_ERROR:
        return RequestFailed(**facts)
    return RequestFinished(**facts, reason=str(request.get_finished_reason()))
