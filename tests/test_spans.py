"""The spans of a recovery, as a collector gets them over a real socket."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from ghostserve.events import kinds
from ghostserve.events.record import Record
from ghostserve.events.spans import RecoverySpans
from otlp_collector import Collector

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
END_S = 1_790_000_000.5
ENDED = kinds.RecoveryEnded(
    epoch=3, ranks=[1], path="rebuild", ok=True, reason="gone", total_ms=500.0, phases_ms={},
    kv_blocks_from_parity=32, kv_blocks_from_mirrors=1, kv_bytes_rebuilt=10, tokens_recomputed=0,
    requests_recomputed=0, requests_resumed=2,
)  # fmt: skip


def resumed(name: str, traceparent: str | None) -> kinds.Event:
    return kinds.RequestResumed(
        request=name, epoch=3, output_tokens=3, recovery_ms=500.0, traceparent=traceparent
    )


def recovery(ended: kinds.RecoveryEnded = ENDED) -> list[Record]:
    told: list[tuple[float, kinds.Event]] = [
        (END_S - 0.4, kinds.PhaseEnded(phase="detect", ms=100.0)),
        (END_S, kinds.PhaseEnded(phase="retry", ms=400.0)),
        (END_S, resumed("cmpl-a", f"00-{TRACE}-{PARENT}-01")),
        (END_S, resumed("cmpl-b", None)),
        (END_S, ended),
    ]
    return [Record(number, at_s, event) for number, (at_s, event) in enumerate(told)]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
def spans(collector: Collector) -> Iterator[RecoverySpans]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=collector.url)))
    yield RecoverySpans(provider.get_tracer("test"))
    provider.shutdown()


def test_a_recovery_with_its_phases_and_requests(spans: RecoverySpans, collector: Collector) -> None:
    spans(recovery()[:2])  # they come in pieces
    spans(recovery()[2:])
    (root,) = collector.named("ghostserve.recovery")
    assert root.parent_span_id == b""
    assert root.trace_id.hex() != TRACE
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (1_790_000_000 * 10**9, int(END_S * 1e9))
    attributes = {item.key: item.value for item in root.attributes}
    assert attributes["ghostserve.recovery.path"].string_value == "rebuild"
    assert [value.int_value for value in attributes["ghostserve.lost_ranks"].array_value.values] == [1]
    (link,) = root.links
    assert (link.trace_id.hex(), link.span_id.hex()) == (TRACE, PARENT)
    detect, retry = (collector.named(f"ghostserve.recovery.{name}")[0] for name in ("detect", "retry"))
    assert detect.parent_span_id == retry.parent_span_id == root.span_id
    assert detect.start_time_unix_nano == root.start_time_unix_nano
    assert abs(detect.end_time_unix_nano - retry.start_time_unix_nano) < 1000
    (paused,) = collector.named("ghostserve.request.paused")  # the other request has no trace
    assert (paused.trace_id.hex(), paused.parent_span_id.hex()) == (TRACE, PARENT)
    assert paused.links[0].span_id == root.span_id
    assert len(collector.spans) == 4


def test_a_recovery_that_failed_is_an_error(spans: RecoverySpans, collector: Collector) -> None:
    spans(recovery(dataclasses.replace(ENDED, ok=False, reason="no process")))
    (root,) = collector.named("ghostserve.recovery")
    assert (root.status.code, root.status.message) == (2, "no process")


def test_one_recovery_does_not_carry_over_into_the_next(spans: RecoverySpans, collector: Collector) -> None:
    spans(recovery())
    spans([Record(9, END_S + 1, ENDED)])
    second = collector.named("ghostserve.recovery")[1]
    assert not second.links
    assert len(collector.named("ghostserve.recovery.retry")) == 1
