"""Who is dead, judged by the product's detector from samples of the simulated ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ghostserve.arena.control import StampStatus
from ghostserve.recovery.detector import Detector, Limits, OpenWork, RankSample, dead_ranks
from ghostserve.recovery.step_times import StepSize, StepTimes
from ghostserve.testing.simulation.cluster import Cluster, OpenStep, Violation
from ghostserve.testing.simulation.workers import Rank, Stage

LIMITS = Limits(floor_s=0.5, ceiling_s=5.0, first_step_s=2.0)
LOOK_S = 0.1
LOOKS_MAX = 150  # longer than any deadline, twice
_AT_WORK = (StampStatus.BEGUN, StampStatus.STAGED)


@dataclass(slots=True)
class Suspicion:
    """Of one engine core."""

    cluster: Cluster
    detector: Detector = field(default_factory=lambda: Detector(LIMITS))
    times: StepTimes = field(default_factory=StepTimes)

    def accepted(self, step: OpenStep) -> None:
        """Learn how long such a step takes."""
        self.times.learn(_size(step), self.cluster.now_s - step.sent_s)

    def wait(self, go_on: Callable[[], bool]) -> frozenset[int]:
        """Look again and again while the others `go_on`, until that says that the wait is over, somebody is to be
        fenced, or nothing is open any more.

        Violation if a rank that is well is fenced, or if nobody is though one hangs.
        """
        cluster = self.cluster
        for _ in range(LOOKS_MAX):
            if go_on() or not cluster.open_steps:
                return frozenset()
            cluster.now_s += LOOK_S
            found = dead_ranks(self.detector.look(cluster.now_s, self._samples(), self._work()))
            if found:
                self._check_fair(found)
                return found
        if any(rank.queue for rank in cluster.hanging):
            raise Violation(f"ranks {[rank.index for rank in cluster.hanging]} hang, and nobody is fenced")
        return frozenset()

    def _work(self) -> OpenWork:
        step = self.cluster.open_steps[0]
        stage, expected_s = self.times.expect(_size(step))
        return OpenWork(epoch=self.cluster.epoch, step=step.step, stage=stage, expected_s=expected_s)

    def _samples(self) -> list[RankSample]:
        return [self._sample(rank) for rank in self.cluster.workers.ranks]

    def _sample(self, rank: Rank) -> RankSample:
        stamp = self.cluster.page.read_stamp(rank.index)
        return RankSample(
            rank=rank.index,
            exited=not rank.alive,
            stopped=rank.stopped,
            epoch=stamp.epoch,
            step=stamp.step,
            at_work=stamp.status in _AT_WORK,
            status=stamp.status.name.lower(),
            met=rank.met,
            waiting=rank.stage is Stage.BEGUN and not rank.hung_alone,
        )

    def _check_fair(self, found: frozenset[int]) -> None:
        """Who is well is fenced only where all wait in the same collective: then nobody can be told apart."""
        ranks = self.cluster.workers.ranks
        well = [index for index in found if ranks[index].alive and not ranks[index].hung]
        if well and any(rank.hung_alone for rank in self.cluster.hanging):
            raise Violation(f"ranks {well} are well and fenced")
        if well and len(found) < sum(rank.alive for rank in ranks):
            raise Violation(f"ranks {well} are well and fenced, others are not")


def _size(step: OpenStep) -> StepSize:
    requests = step.sent.increment.requests
    return StepSize(
        tokens=sum(request.scheduled for request in requests),
        context=sum(request.computed for request in requests),
    )
