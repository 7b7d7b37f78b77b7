"""The watch between the detector and the executor: what outlives a verdict, and what must not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.config import EVICTIONS_MAX, GhostConfig
from ghostserve.engine import watch as engine_watch
from ghostserve.engine.in_flight import OpenStep
from ghostserve.engine.ring import RankSilent
from ghostserve.engine.starvation import Starvation
from ghostserve.engine.watch import Watch
from ghostserve.recovery.detector import Health
from ghostserve.recovery.slow import SlowRank
from ghostserve.recovery.step_times import StepSize

SLOW = SlowRank(rank=1, busy_s=0.1, others_s=0.01, reason="100 ms of work per step")


class Clock:
    """Time as the test wants it."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine_watch, "monotonic_s", clock)
    monkeypatch.setattr(Starvation, "look", lambda self, pid, threads, now_s: 0.0)
    return clock


@pytest.fixture
def watch(clock: Clock) -> Iterator[Watch]:
    segment = Segment.create("test-control", CONTROL_BYTES)
    ControlPage.format(segment)
    process = SimpleNamespace(pid=os.getpid(), is_alive=lambda: True)
    yield Watch(
        SimpleNamespace(
            settings=SimpleNamespace(
                config=GhostConfig(evict_slow=True, hang_timeout=1.0, first_step_timeout=4.0)
            ),
            vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=256)),
            session=SimpleNamespace(page=ControlPage(segment, lane=LANE_ENGINE)),
            performer=SimpleNamespace(epoch=0, phase=None),
            workers=[SimpleNamespace(rank=rank, proc=process) for rank in range(2)],
            world_size=2,
        )
    )
    segment.close()


def test_a_newcomer_is_not_evicted_for_its_predecessor(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is slow is looked for in a thread of its own: once more, perhaps, before the rank has been replaced."""
    monkeypatch.setattr(watch._slow, "look", lambda now_s, works, epoch: [SLOW])
    watch.look_for_slow()
    with pytest.raises(RankSilent):
        watch.evict_slow()
    watch.look_for_slow()
    watch.replaced(frozenset({1}))
    watch.evict_slow()


def test_who_is_slow_for_good_is_only_shown_in_the_end(
    watch: Watch, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each successor on a slow core is slow as well: evicting them for ever would end a server that is only slow."""
    monkeypatch.setattr(watch._slow, "look", lambda now_s, works, epoch: [SLOW])
    evicted: list[RankSilent] = []
    for _ in range(10 * EVICTIONS_MAX):
        clock.now_s += 5.0
        watch.look_for_slow()
        try:
            watch.evict_slow()
        except RankSilent as failure:
            evicted.append(failure)
            watch.replaced(failure.ranks)
    assert [(failure.ranks, failure.evicted) for failure in evicted] == EVICTIONS_MAX * [({1}, True)]
    assert watch.health(1)[0] is Health.SLOW
    assert len([record for record in caplog.records if "rank 1 stays, though slow" in record.message]) == 1
    clock.now_s += GhostConfig().losses_window
    watch.look_for_slow()
    with pytest.raises(RankSilent):
        watch.evict_slow()


def test_threads_are_looked_at_once_a_rank_is_late(
    watch: Watch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All threads but the main one are starved throughout: nobody is called hung, and a look in time stays cheap."""
    asked: list[bool] = []

    def look(self: Starvation, pid: int, *, threads: bool, now_s: float) -> float:
        asked.append(threads)
        return clock.now_s if threads else 0.0

    monkeypatch.setattr(Starvation, "look", look)
    step = OpenStep(
        step=1, scheduler_output=None, sent=None, pieces=(), size=StepSize(tokens=8, context=0), sent_at_s=0.0
    )
    began_s = clock.now_s
    while clock.now_s - began_s < 20:
        clock.now_s += 0.05
        watch.look(step)
    assert not any(asked[:8])
    assert all(asked[-8:])


def test_who_waits_for_a_peer_is_not_at_fault(watch: Watch) -> None:
    """Outside of steps: neither answers, and rank 0 has announced one round more."""
    watch._page.progress_words(0)[:] = (9, 0, 1)
    watch._page.progress_words(1)[:] = (8, 0, 0)
    assert watch.at_fault(frozenset({0, 1})) == {1}
    assert watch.at_fault(frozenset({0})) == {0}


def wait_until_hung(watch: Watch, clock: Clock, step: OpenStep) -> float:
    """For how long all ranks may do nothing."""
    began_s = clock.now_s
    while clock.now_s - began_s < 100:
        clock.now_s += 0.05
        try:
            watch.look(step)
        except RankSilent:
            return clock.now_s - began_s
    raise AssertionError("nobody is called hung")


def test_a_step_that_is_tried_again_gets_twice_the_time(watch: Watch, clock: Clock) -> None:
    step = OpenStep(
        step=1, scheduler_output=None, sent=None, pieces=(), size=StepSize(tokens=8, context=0), sent_at_s=0.0
    )
    waits: list[Any] = []
    for attempt in range(3):
        watch._executor.performer.epoch = attempt
        waits.append(wait_until_hung(watch, clock, step))
    assert waits[1] == pytest.approx(2 * waits[0], rel=0.1)
    assert waits[2] == pytest.approx(4 * waits[0], rel=0.1)
