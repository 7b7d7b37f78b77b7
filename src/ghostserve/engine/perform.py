"""Performs what the recovery machine decides, one action at a time, under the session's lock.

machine (pure)                      here
Fence(ranks)            ──▶  SIGKILL and reap
RaiseEpoch(e)           ──▶  control page
Run(leave)              ──▶  drain stale replies: survivors are back in their message loop
Run(spawn, regroup, weights) ▶ newcomers start while survivors wait for them at a new rendezvous
Run(state, kv)          ──▶  newcomers get KV memory; all roll back; lost blocks come back
RetryStep / FailStep / Resume ▶ back to the executor
"""

from __future__ import annotations

import logging
from collections import deque
from enum import Enum
from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import WorkerProc

from ghostserve.arena.control import Counter, Mark, StampStatus
from ghostserve.clock import monotonic_s
from ghostserve.engine import weights_identity
from ghostserve.engine.messages import JoinMessage, RegroupMessage
from ghostserve.engine.open_report import OpenReport
from ghostserve.engine.rebuild import Rebuild
from ghostserve.engine.recovery_events import raise_epoch, tell_end, tell_failed_phases, tell_failed_step
from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent
from ghostserve.engine.tally import Tally
from ghostserve.errors import EngineLost, GhostserveError
from ghostserve.events import kinds
from ghostserve.recovery.loss_rate import LossRate
from ghostserve.recovery.machine import (
    NOBODY,
    Event,
    FailStep,
    Fence,
    GiveUp,
    PhaseDone,
    PhaseFailed,
    RaiseEpoch,
    RanksLost,
    RecoveryMachine,
    Resume,
    RetryStep,
    Run,
    StepAccepted,
    StepRaised,
)
from ghostserve.recovery.report import PhaseClock, RecoveryReport
from ghostserve.shadow.commit_rule import raised_itself
from ghostserve.types import Phase, RecoveryOutcome

logger = logging.getLogger(__name__)

QUICK_S = 20.0  # for each message that restores: some blocks, or the state


class CannotReplace(GhostserveError):
    """A replacement would not be what was lost."""


class Outcome(Enum):
    """What the executor does after a recovery."""

    RETRY = "retry"  # send the open step again, if there is one
    STEP_FAILED = "step failed"  # its requests get an error


class Performer:
    """Drives one machine over one executor's processes."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._page = executor.session.page
        self._config = executor.settings.config
        self._machine = RecoveryMachine(
            executor.world_size,
            self._config.parity_shards,
            max_attempts=self._config.recovery_attempts,
            loss_rate=LossRate(losses_max=self._config.losses_max, window_s=self._config.losses_window),
        )
        self._report: OpenReport | None = None
        self.tally = Tally(executor)
        self.reports: list[RecoveryReport] = []
        self.phase: Phase | None = None

    @property
    def epoch(self) -> int:
        return self._machine.epoch

    @property
    def lost(self) -> frozenset[int]:
        """Ranks that are being replaced now."""
        return self._machine.lost

    @property
    def recovering_since_s(self) -> float | None:
        """When the loss that is being repaired was noticed; any thread may ask."""
        report = self._report
        return None if report is None else report.clock.started_at_s

    # -- called by the executor and the monitor --------------------------------------------------------

    def recover(self, failure: RanksDied | RankRaised | RankSilent) -> Outcome:
        """Repair the group. Raises EngineLost when all attempts are used up, and whenever asked after that: the step of a
        request that came during the last attempt would be sent for ever.
        """
        if self._executor.is_failed:
            raise EngineLost(self._executor.status.failed)
        self.tally.failed(failure)
        if self._report is None:
            self._open_report(failure)
        elif isinstance(failure, RanksDied | RankSilent):
            self._report.lose(failure, self._executor.workers)
        events: deque[Event] = deque([self._event_of(failure)])
        while events:
            for action in self._machine.handle(events.popleft(), monotonic_s()):
                match action:
                    case Fence(ranks=ranks):
                        self._fence(ranks)
                    case RaiseEpoch(epoch=epoch):
                        raise_epoch(self._page, epoch, self._report.reason if self._report else "")
                    case Run():
                        events.extend(self._run(action))
                    case RetryStep():
                        self._begin(Phase.RETRY)
                        return Outcome.RETRY
                    case Resume():
                        self._close_report(RecoveryOutcome.RECOVERED)
                        return Outcome.RETRY
                    case FailStep(reason=reason):
                        tell_failed_step(self._executor, reason)
                        self._close_report(RecoveryOutcome.STEP_FAILED)
                        return Outcome.STEP_FAILED
                    case GiveUp(reason=reason):
                        self._close_report(RecoveryOutcome.GIVEN_UP)
                        self._executor.give_up(reason)
                        raise EngineLost(reason)
        # Nothing to do: the loss was repaired before, and a step that it interrupted is sent again.
        self._report = None
        return Outcome.RETRY

    def step_accepted(self) -> None:
        """A step was accepted; the end of a recovery if one was waiting for it."""
        self._machine.handle(StepAccepted(self.epoch), monotonic_s())
        if self._report is not None:
            self._close_report(RecoveryOutcome.RECOVERED)

    # -- events ----------------------------------------------------------------------------------------

    def _event_of(self, failure: RanksDied | RankRaised | RankSilent) -> Event:
        in_flight = bool(self._executor.open_steps)
        if isinstance(failure, RankRaised):
            reason = failure.reason.splitlines()[0]
            self._page.events.tell(kinds.StepRaised(reason=reason))
            return StepRaised(ranks=self._own_errors(), reason=reason, epoch=self.epoch)
        return RanksLost(
            ranks=failure.ranks,
            reason=failure.reason,
            epoch=self.epoch,
            step_in_flight=in_flight,
            evicted=isinstance(failure, RankSilent) and failure.evicted,
        )

    def _own_errors(self) -> frozenset[int]:
        """Ranks that raised by themselves in the oldest step, not because a peer had left."""
        if not self._executor.open_steps:
            return NOBODY
        step = self._executor.open_steps[0]
        return frozenset(
            rank
            for rank in range(self._executor.world_size)
            if raised_itself(self._page.read_stamp(rank), epoch=self.epoch, step=step.step)
        )

    def _run(self, run: Run) -> list[Event]:
        """Perform a group of phases; the events that tell how it went."""
        events = self._try(run)
        tell_failed_phases(self._page.events, events)
        if any(isinstance(event, RanksLost | PhaseFailed) for event in events):
            self._executor.starter.meeting.close()  # who waits there for somebody who is gone leaves
        return events

    def _try(self, run: Run) -> list[Event]:
        self._begin(run.phases[0])
        assert self.phase is not None
        try:
            if Phase.LEAVE in run.phases:
                self._leave()
            elif Phase.REGROUP in run.phases:
                self._regroup()
            else:
                self._restore(with_kv=Phase.KV in run.phases)
        except (RanksDied, RankSilent) as failure:
            self.tally.failed(failure)
            if self._report is not None:
                self._report.lose(failure, self._executor.workers)
            return [RanksLost(ranks=failure.ranks, reason=failure.reason, epoch=run.epoch)]
        except CannotReplace as failure:
            logger.critical("%s", failure)
            return [PhaseFailed(phase=self.phase, reason=str(failure), epoch=run.epoch)]
        except RankRaised as failure:
            logger.error("%s failed on rank %d: %s", self.phase.value, failure.rank, failure.reason)
            reason = failure.reason.splitlines()[0]
            return [PhaseFailed(phase=self.phase, reason=reason, epoch=run.epoch)]
        except (
            OSError,
            EOFError,
        ) as failure:  # no process, descriptor or port to be had; perhaps in a moment
            logger.exception("%s failed", self.phase.value)
            return [
                PhaseFailed(phase=self.phase, reason=f"{type(failure).__name__}: {failure}", epoch=run.epoch)
            ]
        return [PhaseDone(phase, run.epoch) for phase in run.phases]

    # -- phases ----------------------------------------------------------------------------------------

    def _fence(self, ranks: frozenset[int]) -> None:
        for rank in ranks:
            worker = self._executor.workers[rank]
            worker.proc.kill()
            self._page.events.tell(kinds.RankFenced(rank=rank, pid=worker.proc.pid))
            worker.proc.join(timeout=self._config.leave_timeout)
            if worker.death_writer is not None:
                worker.death_writer.close()
                worker.death_writer = None
            self._executor.leftovers.remove_of(worker.proc.pid)
        self._mark(Phase.FENCE)

    def _leave(self) -> None:
        """Survivors leave the broken collective; a rank that cannot is lost too."""
        survivors = self._survivors()
        silent = self._executor.ring.drain(survivors, gone=self.lost, timeout_s=self._config.leave_timeout)
        if silent:
            raise RankSilent(silent, f"ranks {sorted(silent)} did not leave the broken group in time")
        self._executor.ring.ask(
            "ghost_leave", ranks=survivors, gone=self.lost, timeout_s=self._config.leave_timeout
        )
        self._mark(Phase.LEAVE)

    def _regroup(self) -> None:
        """Newcomers start, survivors wait for them at a new rendezvous, weights are loaded."""
        executor, lost, survivors = self._executor, self.lost, self._survivors()
        ring, timeout_s = executor.ring, executor.starter.bound_s
        if lost and (reason := weights_identity.why_no_replacement(executor)):
            raise CannotReplace(reason)
        executor.starter.meet()
        message = RegroupMessage(
            init_method=executor.starter.meeting.url,
            epoch=self.epoch,
            newcomers=lost,
            start_timeout_s=timeout_s,
            # A bit less than survivors get to leave it again, should a newcomer die on the way.
            rendezvous_timeout_s=0.8 * self._config.leave_timeout,
        )
        for rank in lost:
            self._page.clear_marks(rank)  # survivors wait for those of the newcomer
        # Newcomers join the ring behind this message, so it is sent before they start.
        ring.send("ghost_regroup", message, gone=lost)
        join_at = executor.rpc_broadcast_mq.current_idx
        started_s = monotonic_s()
        unready = {}
        for rank in sorted(lost):
            handle = unready[rank] = executor.starter.start_rank(rank, join_at=join_at)
            # From here on a fence finds it.
            executor.workers[rank].proc = handle.proc
            executor.workers[rank].death_writer = handle.death_writer
        for rank, handle in unready.items():
            self._await_ready(rank, handle, deadline_s=started_s + timeout_s)
        for rank in unready:
            self._shake_hands(rank, deadline_s=started_s + timeout_s)
        ring.collect(survivors, timeout_s=timeout_s)
        executor.starter.met()
        executor.note_segments()
        executor.starter.ready_after(monotonic_s() - started_s)
        executor.watch.replaced(lost)
        self._mark_start(lost, started_s)

    def _await_ready(self, rank: int, handle: Any, *, deadline_s: float) -> None:
        """A newcomer's READY, bounded; it takes the rank from here on."""
        executor = self._executor
        while not handle.ready_pipe.poll(0.02):
            self._check_start(rank, handle.proc, deadline_s=deadline_s)
        try:
            worker = WorkerProc.wait_for_ready([handle])[0]
        except Exception as error:
            raise RanksDied(frozenset({rank}), f"the replacement of rank {rank} failed: {error}") from None
        executor.workers[rank] = worker
        executor.response_mqs[rank] = worker.worker_response_mq

    def _shake_hands(self, rank: int, *, deadline_s: float) -> None:
        """The stock handshake of a newcomer's reply queue, bounded."""
        worker = self._executor.workers[rank]
        while not worker.worker_response_mq.local_socket.poll(20):
            self._check_start(rank, worker.proc, deadline_s=deadline_s)
        worker.worker_response_mq.wait_until_ready()

    def _check_start(self, rank: int, process: Any, *, deadline_s: float) -> None:
        """While a newcomer is waited for: raises if it, or a survivor, cannot come."""
        ring = self._executor.ring
        if not process.is_alive():
            raise RanksDied(frozenset({rank}), f"the replacement of rank {rank} ended while starting")
        if died := ring.dead() - self.lost:
            raise RanksDied(died, f"rank {sorted(died)} died during the regroup")
        if hung := ring.hung():
            raise RankSilent(hung, f"process of rank {sorted(hung)} is stopped")
        for survivor in self._survivors():
            stamp = self._page.read_stamp(survivor)
            if stamp.status is StampStatus.FAILED and stamp.epoch == self.epoch:
                raise RankRaised(survivor, f"rank {survivor} could not form the groups")
        if monotonic_s() > deadline_s:
            raise RankSilent(frozenset({rank}), f"the replacement of rank {rank} was not ready in time")

    def _mark_start(self, lost: frozenset[int], started_s: float) -> None:
        """Charge the concurrent start by what the slowest newcomer noted down."""
        if self._report is None:
            return
        marks = [self._page.marks(rank) for rank in lost]
        for phase, mark in ((Phase.SPAWN, Mark.IMPORTS_DONE), (Phase.REGROUP, Mark.GROUPS_READY)):
            times = [found[mark] for found in marks if mark in found]
            self._report.mark(phase, max(times, default=monotonic_s()))
        self._mark(Phase.WEIGHTS if lost else Phase.REGROUP)

    def _restore(self, *, with_kv: bool) -> None:
        executor, every = self._executor, range(self._executor.world_size)
        if self.lost or self._graphs():  # graphs were dropped with the groups, also where nobody was lost
            message = JoinMessage(
                newcomers=self.lost,
                kv_cache_configs=executor.kv_cache_configs,
                geometry=executor.session.guard.geometry,
                warm_up=bool(self.lost) and self._compiled(),
            )
            executor.ring.ask("ghost_join", message, ranks=every, timeout_s=self._config.restore_timeout)
        rebuild = Rebuild(executor, lost=self.lost, epoch=self.epoch)
        quick_s = min(self._config.restore_timeout, QUICK_S)
        rebuild.roll_back(timeout_s=quick_s)
        self._mark(Phase.STATE)
        if with_kv:
            self._begin(Phase.KV)
            result = rebuild.restore_kv(timeout_s=quick_s)
        else:
            result = rebuild.recompute_half_collected(timeout_s=quick_s)
        if self._report is not None:
            self._report.add(result)
        self._mark(Phase.KV if with_kv else Phase.STATE)

    def _graphs(self) -> bool:
        mode = self._executor.vllm_config.compilation_config.cudagraph_mode
        return bool(current_platform.is_cuda() and mode != CUDAGraphMode.NONE)

    def _compiled(self) -> bool:
        return bool(self._executor.vllm_config.compilation_config.mode != CompilationMode.NONE)

    def _survivors(self) -> list[int]:
        return [rank for rank in range(self._executor.world_size) if rank not in self.lost]

    # -- reporting -------------------------------------------------------------------------------------

    def _open_report(self, failure: RanksDied | RankRaised | RankSilent) -> None:
        now_s = monotonic_s()
        noticed_s = self._executor.monitor.noticed_at_s
        self._report = OpenReport(
            clock=PhaseClock(min(noticed_s, now_s) if noticed_s is not None else now_s),
            reason=str(failure),
            events=self._page.events,
        )
        if isinstance(failure, RanksDied | RankSilent):
            self._report.lose(failure, self._executor.workers)
        self._page.add(Counter.FAILURES_TOTAL)
        self._report.mark(Phase.DETECT, now_s)
        self._executor.status.write()

    def _begin(self, phase: Phase) -> None:
        self.phase = phase
        if self._report is not None:
            self._report.begin(phase)

    def _mark(self, phase: Phase) -> None:
        if self._report is not None:
            self._report.mark(phase, monotonic_s())
        self._executor.status.write()

    def _close_report(self, outcome: RecoveryOutcome) -> None:
        report, self._report, self.phase = self._report, None, None
        self._executor.starter.standbys.calm()
        self._executor.monitor.noticed_at_s = None
        if report is None:
            return
        report.mark(Phase.RETRY, monotonic_s())
        finished = report.close(epoch=self.epoch, ok=outcome is RecoveryOutcome.RECOVERED)
        self.reports.append(finished)
        del self.reports[:-16]
        self.tally.ended(finished, outcome)
        tell_end(self._executor, finished, outcome)
        self._page.add(Counter.RECOVERIES_TOTAL)  # last: who sees it sees the rest
        self._executor.status.write()
