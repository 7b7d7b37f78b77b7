"""OpenTelemetry spans of recoveries, made once one has ended, with the times at which it happened.

    ghostserve.recovery                 linked to the requests that waited for it
      ├── ghostserve.recovery.detect
      ├── ghostserve.recovery.fence ...
    ghostserve.request.paused           in the trace of each of these requests, linked to the recovery

vLLM's `--otlp-traces-endpoint` sets the tracer provider up; without it (or without the packages of the extra `otel`)
this does nothing. Names and units follow OpenTelemetry's conventions; ours have the prefix `ghostserve.`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghostserve.events.kinds import PhaseEnded, RecoveryEnded, RequestResumed
from ghostserve.events.record import Record

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

PENDING_MAX = 4096


class RecoverySpans:
    """A sink of a Follower; keeps what belongs to a recovery until that has ended."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._phases: deque[tuple[float, PhaseEnded]] = deque(maxlen=PENDING_MAX)
        self._resumed: deque[RequestResumed] = deque(maxlen=PENDING_MAX)

    def __call__(self, records: Sequence[Record]) -> None:
        for record in records:
            match record.event:
                case PhaseEnded() as phase:
                    self._phases.append((record.at_s, phase))
                case RequestResumed(traceparent=str()) as resumed:
                    self._resumed.append(resumed)
                case RecoveryEnded() as recovery:
                    self._emit(record.at_s, recovery)
                    self._phases.clear()
                    self._resumed.clear()

    def _emit(self, end_s: float, recovery: RecoveryEnded) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import (
            Link,
            SpanKind,
            Status,
            StatusCode,
            get_current_span,
            set_span_in_context,
        )

        start_s = end_s - recovery.total_ms / 1e3
        contexts = [_context_of(resumed) for resumed in self._resumed]
        links = [Link(get_current_span(context).get_span_context()) for context in contexts]
        span = self._tracer.start_span(
            "ghostserve.recovery",
            context=Context(),
            kind=SpanKind.INTERNAL,
            attributes=_attributes(recovery),
            links=links,
            start_time=_ns(start_s),
        )
        if not recovery.ok:
            span.set_status(Status(StatusCode.ERROR, recovery.reason))
        for at_s, phase in self._phases:
            child = self._tracer.start_span(
                f"ghostserve.recovery.{phase.phase}",
                context=set_span_in_context(span, Context()),
                start_time=_ns(at_s - phase.ms / 1e3),
            )
            child.end(end_time=_ns(at_s))
        for context, resumed in zip(contexts, self._resumed, strict=True):
            paused = self._tracer.start_span(
                "ghostserve.request.paused",
                context=context,
                attributes={"gen_ai.request.id": resumed.request or "", "ghostserve.epoch": resumed.epoch},
                links=[Link(span.get_span_context())],
                start_time=_ns(start_s),
            )
            paused.end(end_time=_ns(end_s))
        span.end(end_time=_ns(end_s))


def _context_of(resumed: RequestResumed) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": resumed.traceparent}, Context())


def _attributes(recovery: RecoveryEnded) -> dict[str, str | int | bool | float | Sequence[int]]:
    return {
        "ghostserve.epoch": recovery.epoch,
        "ghostserve.lost_ranks": recovery.ranks,
        "ghostserve.recovery.path": recovery.path,
        "ghostserve.recovery.ok": recovery.ok,
        "ghostserve.recovery.reason": recovery.reason,
        "ghostserve.recovery.kv_blocks_from_parity": recovery.kv_blocks_from_parity,
        "ghostserve.recovery.kv_blocks_from_mirrors": recovery.kv_blocks_from_mirrors,
        "ghostserve.recovery.tokens_recomputed": recovery.tokens_recomputed,
        "ghostserve.recovery.requests_resumed": recovery.requests_resumed,
    }


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
