"""Watches the ranks for the recovery: samples them, has the detector judge, and says who is to be replaced.

Looked at from within every wait for a step (`look`), for an answer to anything else (`stopped`), and every second or
so for slow ranks (`look_for_slow`). Nothing here is on the way of a step that is answered in time.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm import envs

from ghostserve.arena.control import StampStatus
from ghostserve.clock import monotonic_s
from ghostserve.config import EVICTIONS_MAX
from ghostserve.engine.in_flight import OpenStep
from ghostserve.engine.process import is_stopped
from ghostserve.engine.ring import RankSilent
from ghostserve.engine.starvation import Starvation
from ghostserve.events.kinds import RankNotSlow, RankSlow
from ghostserve.recovery.costs import MeasuredCosts
from ghostserve.recovery.detector import (
    Detector,
    Health,
    Limits,
    OpenWork,
    RankSample,
    RankVerdict,
    Stage,
    dead_ranks,
    laggards,
    reasons,
    waited_for,
)
from ghostserve.recovery.loss_rate import Evictions
from ghostserve.recovery.slow import SlowRank, SlowRanks, Work
from ghostserve.recovery.step_times import StepSize, StepTimes
from ghostserve.types import FailureKind

logger = logging.getLogger(__name__)

OWN_ABSENCE_S = 0.7  # the monitor looks every half second at least
PATIENCE_GROWTH = 2.0  # RFC 6298, section 5.5
LOOK_S = 0.015  # a look takes some 0.1 ms
# From this share of --hang-timeout without progress on, all threads of a rank are looked at: that takes longer.
THREADS_SHARE = 0.25


def size_of(scheduler_output: Any) -> StepSize:
    """By what a step's duration is predicted."""
    context = sum(scheduler_output.scheduled_cached_reqs.num_computed_tokens)
    context += sum(new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs)
    return StepSize(tokens=scheduler_output.total_num_scheduled_tokens, context=context)


class Watch:
    """One per executor; used under the session's lock, except `look_for_slow`, which has a thread of its own."""

    def __init__(self, executor: Any) -> None:
        config = executor.settings.config
        self._executor = executor
        self._page = executor.session.page
        self._limits = Limits(
            floor_s=config.hang_timeout,
            ceiling_s=float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS),
            first_step_s=config.first_step_timeout,
            factor=config.hang_factor,
        )
        self._detector = Detector(self._limits)
        self._looked_at_s = 0.0
        ranks = range(executor.world_size)
        self._starved = [Starvation() for _ in ranks]  # as the detector sees it
        self._starved_lately = [Starvation() for _ in ranks]  # as `look_for_slow` does, in its own thread
        self._times = StepTimes()
        self.costs = MeasuredCosts(
            times=self._times, chunk=executor.vllm_config.scheduler_config.max_num_batched_tokens
        )
        self._fresh: Stage | None = Stage.FIRST_STEP  # what the next step is, if not one like others
        self._accepted_at_s = 0.0
        self._stopped_at: dict[int, float] = {}  # pid -> since when it is seen stopped
        self._stops_seen_s = 0.0
        self._slow = SlowRanks(factor=config.slow_factor)
        self._slow_ranks: dict[int, SlowRank] = {}
        self._verdicts: dict[int, RankVerdict] = {}
        self._evict: RankSilent | None = None
        self._evictions = Evictions(evictions_max=EVICTIONS_MAX, window_s=config.losses_window)
        self._staying = ""  # who is slow and not replaced any more, in words

    # -- steps -----------------------------------------------------------------------------------------

    def look(self, step: OpenStep, *, awaits: int | None = None) -> None:
        """The oldest step is not done yet: judge everybody. Raises RankSilent; an exit is the ring's to see.

        `awaits`: the rank whose reply is waited for, if that is what is missing.
        """
        now_s = monotonic_s()
        if not self._limits.floor_s or now_s - self._looked_at_s < LOOK_S:
            return
        self._looked_at_s = now_s
        verdicts = self._detector.look(now_s, self._samples(), self._work(step, awaits))
        self._note(verdicts)
        hung = dead_ranks([found for found in verdicts if not self._gone(found.rank)])
        if hung:
            step.patience *= PATIENCE_GROWTH
            raise RankSilent(hung, reasons([found for found in verdicts if found.rank in hung]))

    def blame(self, step: OpenStep, failure: RankSilent) -> RankSilent:
        """vLLM's own limit for a step is over: those who are furthest behind, not who was to answer."""
        samples = self._samples()
        return RankSilent(laggards(samples, self._work(step, None)) or failure.ranks, failure.reason)

    def accepted(self, step: OpenStep) -> None:
        """Learn from a step that went undisturbed."""
        now_s = monotonic_s()
        if not step.disturbed:
            if self._fresh is None:
                self._times.learn(step.size, now_s - max(step.sent_at_s, self._accepted_at_s))
            self._fresh = None
        self._accepted_at_s = self._page.last_step_s = now_s
        self._verdicts = {}

    def replaced(self, newcomers: frozenset[int]) -> None:
        """The next step is a first one for them, and who was slow may not be there any more."""
        self._evict = None
        if newcomers:
            self._fresh = Stage.REPLACED

    def evict_slow(self) -> None:
        """Between two waits: raises RankSilent for ranks that are slow, where they are to be evicted."""
        failure, self._evict = self._evict, None
        if failure is None:
            return
        decision = self._evictions.take(failure.ranks, monotonic_s())
        if decision.reason and decision.reason != self._staying:
            logger.warning("%s", decision.reason)
        self._staying = decision.reason
        if decision.choice:
            raise RankSilent(decision.choice, failure.reason, evicted=True)

    def _work(self, step: OpenStep, awaits: int | None) -> OpenWork:
        stage, expected_s = self._times.expect(step.size)
        return OpenWork(
            epoch=self._executor.performer.epoch,
            step=step.step,
            stage=self._fresh if self._fresh is not None and stage is Stage.STEP else stage,
            expected_s=expected_s,
            awaits=awaits,
            patience=step.patience,
        )

    # -- anything else ---------------------------------------------------------------------------------

    def stopped(self) -> frozenset[int]:
        """Ranks whose process has been stopped for longer than a hang may last; they answer nothing at all."""
        if not self._limits.floor_s:
            return frozenset()
        now_s, found = monotonic_s(), {}
        if now_s - self._stops_seen_s > OWN_ABSENCE_S:  # we were stopped ourselves, with them perhaps
            self._stopped_at = {}
        self._stops_seen_s = now_s
        for worker in self._executor.workers:
            if is_stopped(worker.proc.pid):
                found[worker.proc.pid] = self._stopped_at.get(worker.proc.pid, now_s)
        self._stopped_at = found
        return frozenset(
            worker.rank
            for worker in self._executor.workers
            if now_s - found.get(worker.proc.pid, now_s) > self._limits.floor_s
        )

    def at_fault(self, silent: frozenset[int]) -> frozenset[int]:
        """Of ranks that do not answer: those whom the others wait for, not who happens to be asked first."""
        return waited_for([self._sample(rank) for rank in sorted(silent)])

    def look_for_slow(self) -> None:
        """Every second or so: who holds the others up, though alive."""
        performer = self._executor.performer
        epoch = performer.epoch
        if performer.phase is not None:
            return
        works = [self._work_of(worker) for worker in self._executor.workers]
        slow = {found.rank: found for found in self._slow.look(monotonic_s(), works, epoch=epoch)}
        for rank in slow.keys() - self._slow_ranks.keys():
            logger.warning("rank %d is slow: %s", rank, slow[rank].reason)
            self._page.events.tell(RankSlow(rank=rank, reason=slow[rank].reason))
            self._page.ledger.count_failure(FailureKind.SLOW)
        for rank in self._slow_ranks.keys() - slow.keys():
            logger.warning("rank %d is no longer slow", rank)
            self._page.events.tell(RankNotSlow(rank=rank))
        self._slow_ranks = slow
        if slow and self._executor.settings.config.evict_slow:
            why = "; ".join(f"rank {rank} is slow: {found.reason}" for rank, found in slow.items())
            self._evict = RankSilent(frozenset(slow), why)

    @property
    def longest_quiet_s(self) -> float:
        """The longest time without progress after which a rank went on, in a step."""
        return self._detector.longest_quiet_s

    def health(self, rank: int) -> tuple[Health, str]:
        """What is thought of a rank now, with the reason; for the status page."""
        verdict, slow = self._verdicts.get(rank), self._slow_ranks.get(rank)
        if verdict is not None and verdict.state is not Health.ALIVE:
            return verdict.state, verdict.reason
        return (Health.ALIVE, "") if slow is None else (Health.SLOW, slow.reason)

    # -- private ---------------------------------------------------------------------------------------

    def _work_of(self, worker: Any) -> Work:
        found = self._page.progress(worker.rank)
        return Work(
            in_steps_s=found.in_steps_s,
            waited_s=found.waited_s,
            steps=found.steps,
            starved_s=self._starved_lately[worker.rank].look(
                worker.proc.pid, threads=True, now_s=monotonic_s()
            ),
        )

    def _note(self, verdicts: list[RankVerdict]) -> None:
        for found in verdicts:
            before = self._verdicts.get(found.rank)
            if found.state is not Health.ALIVE and (before is None or before.state is not found.state):
                logger.warning("rank %d is %s: %s", found.rank, found.state.value, found.reason)
        self._verdicts = {found.rank: found for found in verdicts}

    def _gone(self, rank: int) -> bool:
        return not self._executor.workers[rank].proc.is_alive()

    def _samples(self) -> list[RankSample]:
        return [self._sample(rank) for rank in range(self._executor.world_size)]

    def _sample(self, rank: int) -> RankSample:
        process, stamp = self._executor.workers[rank].proc, self._page.read_stamp(rank)
        progress = self._page.progress(rank)
        late = self._detector.quiet_s(rank) > THREADS_SHARE * self._limits.floor_s
        return RankSample(
            rank=rank,
            exited=self._gone(rank),
            exit_code=None,
            stopped=is_stopped(process.pid),
            epoch=stamp.epoch,
            step=stamp.step,
            at_work=stamp.status in (StampStatus.BEGUN, StampStatus.STAGED),
            status=stamp.status.name.lower(),
            met=progress.met,
            waiting=progress.waiting,
            starved_s=self._starved[rank].look(process.pid, threads=late, now_s=monotonic_s()),
        )
