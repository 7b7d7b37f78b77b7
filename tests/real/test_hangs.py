"""A rank that hangs is found, fenced and replaced; one that is only slow is not. TP=2, float32, eager."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ghostserve.testing.client import StopStreaming, StreamResult
from real import kit
from real.kit import SEEDED, Ask, Hurt, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def _healthy(float32: Served):
    float32.settle()
    yield
    float32.server.admin.disarm_faults()
    float32.settle()


def pid_of(served: Served, rank: int) -> int:
    return int(served.settle()["ranks"][rank]["pid"])


def run_open(served: Served, ask: Ask, hurt: Hurt, *, timeout_s: float = 90) -> StreamResult:
    """Its tokens, of a stream that is held open until `hurt` is done: that may take longer than they do."""
    seen = 0

    def on_token(index: int, ids: Sequence[int], text: str, at_s: float) -> None:
        nonlocal seen
        seen += len(ids)
        hurt(index, ids, text, at_s)
        if seen >= ask.max_tokens and hurt.done:
            raise StopStreaming

    result = served.run(replace(ask, max_tokens=3900), on_token=on_token, timeout_s=timeout_s)
    assert result.aborted, "the stream has ended before"
    return kit.head(result, ask.max_tokens)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_in_mid_answer(float32: Served, rank: int) -> None:
    """SIGSTOP: the process lives and does not take the step; its peer has begun it and waits in a collective."""
    ask = Ask(max_tokens=150)
    reference, before = float32.reference(ask), float32.recoveries()
    pid = pid_of(float32, rank)
    faulted = float32.run_with_stops(ask, (70, lambda: os.kill(pid, signal.SIGSTOP)))
    assert_same(reference, faulted)
    gap_s = max(after - before for before, after in itertools.pairwise(faulted.arrivals_s[0]))
    report = float32.recovery(after=before)
    assert report["lost_pids"] == [pid], [
        (r["lost_pids"], r["reason"]) for r in float32.server.status()["recoveries"]
    ]
    assert_rebuilt(report, sealed=True)
    assert gap_s > 0.8, "it was replaced before it could be called hung"


@pytest.mark.parametrize(
    ("rank", "point"),
    [
        pytest.param(rank, point, marks=[pytest.mark.slow] * ((rank + index) % 2))
        for index, point in enumerate(["before_model", "after_model", "before_reply"])
        for rank in (0, 1)
    ],
)
def test_a_rank_that_does_nothing_more(float32: Served, rank: int, point: str) -> None:
    """It runs, and never comes to its next collective, its stamp or its answer."""
    reference, before = float32.reference(SEEDED), float32.recoveries()
    pid = pid_of(float32, rank)
    float32.arm(point=point, rank=rank, action="hang", skip=70)
    assert_same(reference, float32.run(SEEDED))
    report = float32.recovery(after=before)
    assert report["lost_pids"] == [pid], [
        (r["lost_pids"], r["reason"]) for r in float32.server.status()["recoveries"]
    ]
    assert_rebuilt(report, sealed=True)


def test_a_rank_stopped_while_idle(float32: Served) -> None:
    before, pid = float32.recoveries(), pid_of(float32, 1)
    os.kill(pid, signal.SIGSTOP)
    report = float32.recovery(after=before)
    assert report["lost_pids"] == [pid]
    assert report["ok"]


def slow_down(served: Served, rank: int) -> None:
    """Six times slower, until disarmed."""
    served.server.admin.arm_fault(point="after_model", rank=rank, action="slow", argument=6, count=0)


def test_a_slow_rank_is_shown_and_kept(float32: Served) -> None:
    """It holds everybody up, and makes progress: a state, not a loss."""
    ask, seen = Ask(max_tokens=150), set()
    reference, before, pid = float32.reference(ask), float32.recoveries(), pid_of(float32, 1)

    def look() -> None:
        slow_down(float32, 1)
        status = float32.server.wait_status(
            lambda status: status["ranks"][1]["health"] == "slow", timeout_s=30, what="a slow rank"
        )
        seen.add(status["ranks"][1]["health_reason"])
        assert status["ranks"][0]["health"] != "slow"
        float32.server.admin.disarm_faults()

    assert_same(reference, run_open(float32, ask, Hurt(40, look)))
    assert any("ms of work per step" in reason for reason in seen)
    assert float32.recoveries() == before
    assert pid_of(float32, 1) == pid


@pytest.mark.slow
def test_a_slow_rank_is_evicted_where_that_is_asked_for(tmp_path: Path) -> None:
    served = kit.serve(tmp_path, "evicting", "--dtype", "float32", "--enforce-eager", "--evict-slow")
    try:
        ask = Ask(max_tokens=150)
        reference, before, pid = served.reference(ask), served.recoveries(), pid_of(served, 1)

        def until_replaced() -> None:
            slow_down(served, 1)
            served.server.wait_status(
                lambda status: status["ranks"][1]["pid"] != pid, timeout_s=60, what="an eviction"
            )
            served.server.admin.disarm_faults()  # or its successor would be slow, too

        assert_same(reference, run_open(served, ask, Hurt(40, until_replaced), timeout_s=150))
        report = served.recovery(after=before)
        assert report["lost_pids"] == [pid]
        assert "slow" in report["reason"]
        assert_rebuilt(report, sealed=True)
    finally:
        served.server.stop()
