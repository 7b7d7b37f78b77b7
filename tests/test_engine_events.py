"""What the engine core and the front process tell, as events: over the parts that tell it, without a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, LANE_FRONT, ControlPage, Counter
from ghostserve.arena.event_rings import Ring
from ghostserve.arena.memfd import Segment
from ghostserve.cli.serve_events import KeptEvents
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.config import GhostConfig
from ghostserve.engine import request_events
from ghostserve.engine.open_report import OpenReport
from ghostserve.engine.recovery_events import tell_end, tell_failed_phases, tell_failed_step
from ghostserve.engine.ring import RanksDied, RankSilent
from ghostserve.engine.scrub_repair import event_of
from ghostserve.engine.standbys import START_TIMEOUT_S, Standbys
from ghostserve.errors import UsageError
from ghostserve.events import kinds
from ghostserve.events.file import read_files
from ghostserve.events.kinds import Event
from ghostserve.recovery import machine
from ghostserve.recovery.report import PhaseClock
from ghostserve.shadow.scrub import Finding
from ghostserve.types import Phase, RecoveryOutcome

TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.fixture
def pages() -> Iterator[tuple[ControlPage, ControlPage]]:
    """(the engine core's, the front's)"""
    segment = Segment.create("test-control", CONTROL_BYTES)
    ControlPage.format(segment)
    yield ControlPage(segment, lane=LANE_ENGINE), ControlPage(segment, lane=LANE_FRONT)
    segment.close()


Pages = tuple[ControlPage, ControlPage]


def told(pages: Pages) -> list[Event]:
    return [event for _, event in pages[1].events.look().events]


def request(name: str, status: RequestStatus = RequestStatus.RUNNING, **facts: Any) -> SimpleNamespace:
    known = {
        "request_id": name, "status": status, "num_output_tokens": 3, "num_prompt_tokens": 5, "max_tokens": 9,
        "arrival_time": 0.0, "trace_headers": None, "num_computed_tokens": 8,
        "is_finished": lambda: RequestStatus.is_finished(status),
        "get_finished_reason": lambda: RequestStatus.get_finished_reason(status),
    }  # fmt: skip
    return SimpleNamespace(**{**known, **facts})


def workers(*pids: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(proc=SimpleNamespace(pid=pid)) for pid in pids]


# -- recoveries ----------------------------------------------------------------------------------------------------


def test_losses_and_phases_in_their_order(pages: Pages) -> None:
    """A phase that nobody saw begin has begun with the last mark; the loss is as old as the recovery."""
    began_s = monotonic_s() - 1
    report = OpenReport(clock=PhaseClock(began_s), reason="gone", events=pages[0].events)
    report.lose(RanksDied(frozenset({1}), "gone"), workers(7, 8))
    report.mark(Phase.DETECT, began_s + 0.01)
    report.begin(Phase.LEAVE)
    report.mark(Phase.LEAVE, began_s + 0.02)
    report.mark(Phase.SPAWN, began_s + 0.2)
    timed = pages[1].events.look().events
    assert [(event.kind, getattr(event, "phase", None)) for _, event in timed[:-1]] == [
        ("rank_lost", None),
        ("phase_begun", "detect"), ("phase_ended", "detect"),
        ("phase_ended", "leave"), ("phase_begun", "spawn"), ("phase_ended", "spawn"),
    ]  # fmt: skip
    assert timed[-1][1] == kinds.PhaseBegun(phase="leave")  # told as it began: now
    times = [at_s for at_s, _ in timed]
    assert times[0] == times[1]
    assert times[3] == times[4]
    assert times[5] - times[4] == pytest.approx(0.18, abs=1e-5)
    ended = [event for _, event in timed if isinstance(event, kinds.PhaseEnded)]
    assert [event.ms for event in ended] == pytest.approx([10.0, 10.0, 180.0], abs=0.01)


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (RanksDied(frozenset({0}), "x"), "crash"),
        (RankSilent(frozenset({0}), "x"), "hang"),
        (RankSilent(frozenset({0}), "x", evicted=True), "slow"),
    ],
)
def test_the_cause_of_a_loss(pages: Pages, failure: RanksDied | RankSilent, cause: str) -> None:
    OpenReport(clock=PhaseClock(0.0), reason="", events=pages[0].events).lose(failure, workers(7))
    assert told(pages) == [kinds.RankLost(rank=0, cause=cause, pid=7, reason="x")]


def executor_with(pages: Pages, *requests: SimpleNamespace) -> SimpleNamespace:
    step = SimpleNamespace(sent=SimpleNamespace(num_scheduled_tokens={"a": 1}))
    scheduler = SimpleNamespace(requests={one.request_id: one for one in requests}, running=list(requests))
    return SimpleNamespace(session=SimpleNamespace(page=pages[0], scheduler=scheduler), open_steps=[step])


@pytest.mark.parametrize(
    ("end", "resumed"),
    [
        (RecoveryOutcome.RECOVERED, ["a", "b"]),
        (RecoveryOutcome.STEP_FAILED, ["b"]),
        (RecoveryOutcome.GIVEN_UP, []),
    ],
)
def test_the_end_of_a_recovery(pages: Pages, end: RecoveryOutcome, resumed: list[str]) -> None:
    """Who goes on is told before the report is, so that who reads that has seen them all."""
    done = request("done", RequestStatus.FINISHED_STOPPED)
    executor = executor_with(pages, request("a", trace_headers=TRACE), request("b"), done)
    report = OpenReport(clock=PhaseClock(10.0), reason="gone", events=pages[0].events)
    report.clock.mark(Phase.RETRY, 10.5)
    tell_end(executor, report.close(epoch=2, ok=end is RecoveryOutcome.RECOVERED), end)
    *going_on, last = told(pages)
    assert [event.request for event in going_on] == resumed
    assert pages[1].get(Counter.REQUESTS_RESUMED_TOTAL) == len(resumed), "the metric counts what is told"
    assert isinstance(last, kinds.RecoveryEnded)
    assert (last.ok, last.requests_resumed, last.total_ms) == (
        end is RecoveryOutcome.RECOVERED,
        len(resumed),
        500.0,
    )
    if end is RecoveryOutcome.RECOVERED:
        assert going_on[0] == kinds.RequestResumed(
            request="a", epoch=2, output_tokens=3, recovery_ms=500.0, traceparent=TRACE["traceparent"]
        )


def test_what_could_not_be_done(pages: Pages) -> None:
    failed = machine.PhaseFailed(phase=Phase.SPAWN, reason="no pid", epoch=1)
    tell_failed_phases(pages[0].events, [machine.PhaseDone(Phase.LEAVE, 1), failed])
    tell_failed_step(executor_with(pages), "it raised again")
    assert told(pages) == [
        kinds.PhaseFailed(phase="spawn", reason="no pid"),
        kinds.StepFailed(reason="it raised again", requests=1),
    ]


# -- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (RequestStatus.FINISHED_STOPPED, kinds.RequestFinished, "stop"),
        (RequestStatus.FINISHED_LENGTH_CAPPED, kinds.RequestFinished, "length"),
        (RequestStatus.FINISHED_ABORTED, kinds.RequestAborted, None),
        (RequestStatus.FINISHED_ERROR, kinds.RequestFailed, None),
    ],
)
def test_how_a_request_ends(
    pages: Pages, status: RequestStatus, kind: type[Event], reason: str | None
) -> None:
    request_events.admitted(pages[0].events, request("a", trace_headers=TRACE))
    request_events.ended(pages[0].events, request("a", status))
    first, last = told(pages)
    assert first == kinds.RequestAdmitted(
        request="a", prompt_tokens=5, max_tokens=9, traceparent=TRACE["traceparent"]
    )
    assert type(last) is kind
    assert (last.request, getattr(last, "reason", None)) == ("a", reason)


def test_a_request_that_is_recomputed_says_why(pages: Pages) -> None:
    scheduler = SimpleNamespace(running=[request("a"), request("b")])
    request_events.recomputed(pages[0].events, scheduler, {"a"}, {"a": 1}, "2 KV blocks were not rebuilt")
    assert told(pages) == [
        kinds.RequestRecomputed(request="a", tokens=7, reason="2 KV blocks were not rebuilt")
    ]


# -- what stands behind --------------------------------------------------------------------------------------------


class Orders:
    """A standby's end of the pipe."""

    waiting = False

    def poll(self) -> bool:
        return self.waiting

    def recv(self) -> str:
        from ghostserve.engine.spawn import WAITING

        return WAITING

    def close(self) -> None:
        pass


def test_standbys_tell_that_they_are_ready_and_that_they_die() -> None:
    events: list[Event] = []
    process = SimpleNamespace(pid=4_000_000, alive=True, kill=lambda: None, join=lambda timeout: None)
    process.is_alive = lambda: process.alive
    started = SimpleNamespace(process=process, orders=Orders(), ready=None, death=None)
    standbys = Standbys(lambda: started, wanted=1, tell=events.append)  # type: ignore[arg-type, return-value]
    standbys.keep()
    standbys.keep()
    assert events == []
    started.orders.waiting = True
    standbys.keep()
    standbys.keep()
    (ready,) = events
    assert isinstance(ready, kinds.StandbyReady)
    assert 0 <= ready.start_ms < START_TIMEOUT_S * 1e3
    assert [standby["state"] for standby in standbys.describe()] == ["ready"]
    process.alive = False
    assert standbys.describe() == [], "not shown as ready until it is cleared away"
    standbys.keep()
    assert events[1:] == [kinds.StandbyDied(pid=4_000_000, reason="ended")]


def test_a_finding_of_the_scrub() -> None:
    def finding(part: str) -> Finding:
        return Finding(
            part=part,
            block=8,
            index=1,
            layers=("l0",),
            slots=(1,),
            remedy="rebuild",
            repaired=True,
            reason="",
        )

    of_kv = kinds.ScrubFinding(rank=1, part="kv", block=8, repaired=True, remedy="rebuild", layers=["l0"])
    assert event_of(finding("kv")) == of_kv
    of_parity = event_of(finding("parity"))
    assert (of_parity.rank, of_parity.shard) == (None, 1)


# -- in the front process ------------------------------------------------------------------------------------------


def test_the_front_keeps_and_writes_what_is_told(pages: Pages, tmp_path: Path) -> None:
    """Also what was told before it looked, and the end."""
    engine, front = pages
    others = set(threading.enumerate())  # apps that tests mounted and never served have such threads, too
    path = tmp_path / "events.jsonl"
    engine.events.tell(kinds.RankSlow(rank=0, reason="early"))
    kept = KeptEvents(front, GhostConfig(event_log=str(path)))
    kept.trace()
    ours = set(threading.enumerate()) - others
    assert ours
    engine.events.tell(kinds.RankNotSlow(rank=0))
    assert [record.event.kind for record in kept.log.all()] == ["rank_slow", "rank_not_slow"]
    kept.close(4, "no worker could be started")
    *_, last = read_files(path)
    assert last.event == kinds.ServerStopped(exit_status=4, reason="no worker could be started")
    assert [record.event.kind for record in read_files(path)] == [
        "rank_slow",
        "rank_not_slow",
        "server_stopped",
    ]
    assert ours & set(threading.enumerate()) == set()


def test_what_the_front_missed_and_could_not_write_is_counted(
    pages: Pages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, front = pages
    slots, _ = Ring.ENGINE.value
    for _ in range(slots + 3):
        engine.events.tell(kinds.RankNotSlow(rank=0))
    directory = tmp_path / "logs"
    directory.mkdir()
    kept = KeptEvents(front, GhostConfig(event_log=str(directory / "events.jsonl")))
    try:
        (directory / "events.jsonl").unlink()
        directory.rmdir()
        engine.events.tell(kinds.RankSlow(rank=0, reason="later"))
        deadline_s = monotonic_s() + 20
        while front.get(Counter.EVENT_LOG_ERRORS_TOTAL) < 2:
            assert monotonic_s() < deadline_s
            sleep_s(0.02)
        assert front.get(Counter.EVENTS_LOST_TOTAL) in (
            3,
            4,
        )  # whether the later one was told before the first look
        warnings = [record for record in caplog.records if "the file of events fails" in record.message]
        assert len(warnings) == 1
        assert kept.log.latest(1).records[0].event.kind == "rank_slow"
    finally:
        directory.mkdir()
        kept.close(0)
    assert [record.event.kind for record in read_files(directory / "events.jsonl")][-1] == "server_stopped"


def test_options_of_the_file_are_checked(pages: Pages, tmp_path: Path) -> None:
    for wrong, said in (
        ({"event_log": "x", "protection": "none"}, "--event-log needs --protection"),
        ({"event_log_max_bytes": 10}, "--event-log-max-bytes 10: at least 4096"),
        ({"event_log_files": 0}, "--event-log-files 0: 1 to 1000"),
    ):
        with pytest.raises(UsageError, match=said):
            GhostConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--event-log .*: No such file or directory"):
        KeptEvents(pages[1], GhostConfig(event_log=str(tmp_path / "no" / "x")))
