"""What happens once a group cannot be repaired: whoever asks again is told so, with the reason, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.config import GhostConfig
from ghostserve.engine.executor import GhostExecutor
from ghostserve.engine.in_flight import OpenStep
from ghostserve.engine.monitor import Monitor
from ghostserve.engine.perform import Performer
from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent
from ghostserve.errors import EngineLost
from ghostserve.recovery.step_times import StepSize
from ghostserve.types import FailureKind, RecoveryOutcome, RecoveryPath

SENDS_MAX = 50  # of one step: a server that goes on for ever ends here
REASON = "no replacement comes up"
DEAD = frozenset({1})


class Ring:
    """Rank 1 is dead, and the survivors cannot leave."""

    def dead(self) -> frozenset[int]:
        return DEAD

    def hung(self) -> frozenset[int]:
        return frozenset()

    def drain(self, *_: Any, **__: Any) -> frozenset[int]:
        raise RankRaised(0, REASON)


class Process(SimpleNamespace):
    """Of a worker; dead."""

    pid = 1

    def kill(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass


class Executor(SimpleNamespace):
    """As much of the executor as a recovery touches before it gives up."""

    def give_up(self, reason: str) -> None:
        self.is_failed, self.status.failed = True, reason

    def recover(self, failure: Any) -> None:
        GhostExecutor.recover(self, failure)  # type: ignore[arg-type]

    def _send_step(self, step: OpenStep) -> None:
        self.sends += 1
        assert self.sends <= SENDS_MAX, "a step is sent again and again to ranks that are gone"

    def _run_oldest(self) -> None:
        raise RanksDied(DEAD, "process of rank 1 exited")


@pytest.fixture
def executor() -> Iterator[Executor]:
    segment = Segment.create("test-control", CONTROL_BYTES)
    ControlPage.format(segment)
    page = ControlPage(segment, lane=LANE_ENGINE)
    nothing = SimpleNamespace(close=lambda: None, calm=lambda: None, remove_of=lambda pid: None)
    executor = Executor(
        is_failed=False,
        leftovers=nothing,
        open_steps=[],
        ring=Ring(),
        sends=0,
        rpc_broadcast_mq=SimpleNamespace(current_idx=0),
        session=SimpleNamespace(
            page=page,
            lock=threading.RLock(),
            scheduler=SimpleNamespace(open=False, running=[], requests={}),
        ),
        settings=SimpleNamespace(config=GhostConfig(recovery_attempts=2)),
        starter=SimpleNamespace(standbys=nothing, meeting=nothing, bound_s=20.0),
        status=SimpleNamespace(failed=None, write=lambda: None),
        workers=[SimpleNamespace(proc=Process(), death_writer=None) for _ in range(2)],
        weights=(),
        weights_now=tuple,
        weights_changed_by=None,
        world_size=2,
    )
    executor.monitor = Monitor(executor)
    executor.performer = Performer(executor)
    yield executor
    segment.close()


def test_an_idle_give_up_keeps_its_reason(executor: Executor) -> None:
    executor.monitor._repair_if_idle()
    assert executor.is_failed
    assert executor.status.failed == f"gave up after 2 attempts: leave failed: {REASON}"


def test_what_was_given_up_is_not_called_recovered(
    executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    executor.monitor._repair_if_idle()
    (line,) = [record.message for record in caplog.records if '"ok": false' in record.message]
    assert line.startswith("not recovered: ")
    ledger = executor.session.page.ledger
    assert ledger.recoveries(RecoveryPath.REBUILD, RecoveryOutcome.GIVEN_UP) == 1
    assert ledger.recoveries(RecoveryPath.REBUILD, RecoveryOutcome.RECOVERED) == 0
    assert ledger.failures(FailureKind.CRASH) == 1


def test_a_request_that_came_during_the_last_attempt_ends(executor: Executor) -> None:
    """The monitor gives up while a request waits for its lock: its step must not be sent for ever."""
    executor.monitor._repair_if_idle()
    step = OpenStep(
        step=1,
        scheduler_output=SimpleNamespace(total_num_scheduled_tokens=1, has_structured_output_requests=False),
        sent=None,
        pieces=(),
        size=StepSize(tokens=1, context=0),
        sent_at_s=0.0,
        sampling=True,
    )
    executor.open_steps.append(step)
    with pytest.raises(EngineLost, match=REASON):
        GhostExecutor._complete(executor, step, sampled=True)  # type: ignore[arg-type]


def test_an_eviction_is_told_to_the_machine_as_one(executor: Executor) -> None:
    """Else it would count as a loss, and a slow server would end as one whose worker dies too often."""
    evicted = executor.performer._event_of(RankSilent(frozenset({1}), "rank 1 is slow", evicted=True))
    hung = executor.performer._event_of(RankSilent(frozenset({1}), "rank 1 hangs"))
    assert (evicted.evicted, hung.evicted) == (True, False)


class FreedRing(Ring):
    """All ranks are dead: nobody has anything to leave."""

    def drain(self, *_: Any, **__: Any) -> frozenset[int]:
        return frozenset()

    def ask(self, *_: Any, **__: Any) -> dict[int, Any]:
        return {}

    def send(self, *_: Any, **__: Any) -> None:
        pass


def test_a_process_that_cannot_be_started_uses_up_an_attempt(executor: Executor) -> None:
    """The kernel may refuse one process and give the next; and the first newcomer of two must be known, or nobody fences it."""
    newcomers: list[Process] = []

    def start_rank(rank: int, *, join_at: int) -> Any:
        if rank == 1:
            raise BlockingIOError("Resource temporarily unavailable")
        newcomers.append(Process())
        return SimpleNamespace(proc=newcomers[-1], death_writer=None)

    executor.ring = FreedRing()
    executor.starter.meet = lambda: None
    executor.starter.meeting.url = "ghostserve://nowhere"
    executor.starter.start_rank = start_rank
    with pytest.raises(EngineLost, match="after 2 attempts: spawn failed: BlockingIOError"):
        executor.performer.recover(RanksDied(frozenset({0, 1}), "both gone"))
    assert len(newcomers) == 2
    assert executor.workers[0].proc is newcomers[-1]
