"""What to do next in a recovery: event in, actions out.

Knows no process, no clock, no bytes and no vLLM: `engine/` performs the actions in order, under a lock, and
reports back. At most the last of a list of actions is *work*; doing it gives the next events.

    HEALTHY ─RanksLost──▶ Fence · RaiseEpoch · Run(leave) ▶ Run(spawn+regroup+weights) ▶ Run(state+kv) ─▶ end
        │                  ▲
        │                  └─ RanksLost or PhaseFailed in any phase: next epoch, and usually next attempt
        │
        └────StepRaised─▶ RaiseEpoch · Run(leave) ▶ Run(regroup) ▶ Run(state) ─▶ end
    end:  RetryStep (a step was in flight) ─StepAccepted─▶ HEALTHY
          FailStep  (it was, and is not worth another try) ▶ HEALTHY
          Resume    (none was)                             ▶ HEALTHY
    any time: GiveUp (all attempts are used up, or a rank dies too often) ▶ GIVEN_UP

Theory of operation
- *Epochs.* Each (re)start raises the epoch. What an older epoch reports is ignored, but a loss is stale only
  if the rank was given to another process since: a survivor's death noticed in the last epoch still counts.
- *Attempts.* Losing ranks and failing phases use up attempts, but a loss that joins before anything was
  spawned does not. An accepted step gives them back; so does `calm_s` of health, as an idle server accepts no
  steps. The last attempt does not retry a step again: that step may be what kills the ranks, so it fails and
  the server lives.
- *A step that raises is not a lost rank* (REVIEW F13). All ranks roll back and the step is retried up to
  `max_step_retries` times; then it fails and serving goes on. Only a rank that alone raised each time is
  fenced, once per step, and the step gets one more try. A loss during the roll-back explains the raise, which
  is then forgotten. The roll-back forms the groups anew, as a raise leaves peers in a collective.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum

from ghostserve.recovery.after_raise import AfterRaise, after_raise
from ghostserve.recovery.loss_rate import LossRate
from ghostserve.types import Decision, Phase, RecoveryPath

NOBODY: frozenset[int] = frozenset()
HISTORY_MAX = 64

# Phases in DESIGN order, grouped as they are performed: one Run per group.
REPLACE = ((Phase.LEAVE,), (Phase.SPAWN, Phase.REGROUP, Phase.WEIGHTS), (Phase.STATE, Phase.KV))
ROLL_BACK = ((Phase.LEAVE,), (Phase.REGROUP,), (Phase.STATE,))


class State(Enum):
    """What the rest of the engine may do."""

    HEALTHY = "healthy"  # steps may be sent
    RECOVERING = "recovering"  # no step but the one that RetryStep asks for
    GIVEN_UP = "given up"  # final: clients get an error, the process exits with 4; every event is ignored


@dataclass(frozen=True, slots=True)
class RanksLost:
    """Processes exited, or were judged dead by a deadline. May come in any state.

    `epoch`: any epoch in which all of them held their ranks, e.g. the newest in which one was started.
    """

    ranks: frozenset[int]
    reason: str
    epoch: int
    step_in_flight: bool = False  # sticky: once True, a recovery ends with RetryStep or FailStep
    evicted: bool = False  # alive and replaced by choice: `Evictions` counts that, not the loss rate


@dataclass(frozen=True, slots=True)
class PhaseDone:
    """One phase of the current Run has been performed; phases of one Run may finish in any order."""

    phase: Phase
    epoch: int


@dataclass(frozen=True, slots=True)
class PhaseFailed:
    """A phase of the current Run cannot be finished. `ranks`: who is to blame; fenced with the newcomers."""

    phase: Phase
    reason: str
    epoch: int
    ranks: frozenset[int] = NOBODY


@dataclass(frozen=True, slots=True)
class StepRaised:
    """A step raised, all being alive. `ranks`: whose own error it was, no peer's; NOBODY if unknown."""

    ranks: frozenset[int]
    reason: str
    epoch: int


@dataclass(frozen=True, slots=True)
class StepAccepted:
    """A step was accepted. While HEALTHY it may be left out when `attempts` is 0."""

    epoch: int


Event = RanksLost | PhaseDone | PhaseFailed | StepRaised | StepAccepted


@dataclass(frozen=True, slots=True)
class Fence:
    """SIGKILL whoever holds these ranks, newcomers of an earlier attempt too; one already gone is fine."""

    ranks: frozenset[int]


@dataclass(frozen=True, slots=True)
class RaiseEpoch:
    """From here on this is the epoch: written to the arena before anything else is sent."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Run:
    """Work: perform these phases, concurrently if you like, on `RecoveryMachine.lost` and the survivors.

    Answer with a PhaseDone for each, or with one PhaseFailed or RanksLost.
    """

    phases: tuple[Phase, ...]
    epoch: int


@dataclass(frozen=True, slots=True)
class RetryStep:
    """Work: send the interrupted step again. Answer with StepAccepted, StepRaised or RanksLost."""

    epoch: int


@dataclass(frozen=True, slots=True)
class FailStep:
    """Last work: the step's requests get an error; the state is as before the step; serving goes on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Last work: nothing was in flight; serving goes on."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Last work, ever: clients get this as an error and the process exits with 4."""

    reason: str


Action = Fence | RaiseEpoch | Run | RetryStep | FailStep | Resume | GiveUp


class IllegalTransition(AssertionError):
    """The performer broke the protocol: our bug, hence not in the tree of errors.py. Tells the history."""


class RecoveryMachine:
    """Decides; one per engine. Not thread-safe: called under the recovery lock only."""

    def __init__(
        self,
        ranks: int,
        parity_shards: int,
        *,
        max_attempts: int,
        max_step_retries: int = 1,
        calm_s: float = 300.0,
        loss_rate: LossRate | None = None,
        epoch: int = 0,
    ) -> None:
        assert min(ranks, max_attempts) >= 1
        assert min(parity_shards, max_step_retries) >= 0
        self._everyone = frozenset(range(ranks))
        self.parity_shards = parity_shards
        self.max_attempts = max_attempts
        self.max_step_retries = max_step_retries
        self.calm_s = calm_s
        self._loss_rate = loss_rate
        self.state = State.HEALTHY
        self.epoch = epoch
        self.lost = NOBODY  # ranks whose KV is not back yet
        self.attempts = 0
        self._since_s: float | None = None  # end of the last recovery
        self._started_in = [epoch] * ranks  # epoch in which a rank's present process was, or will be, started
        self._groups: list[tuple[Phase, ...]] = []  # still to be run
        self._outstanding: list[Phase] = []  # of the current Run
        self._spawned = False  # this attempt may have newcomers
        # Of the interrupted step:
        self._in_flight = False
        self._retrying = False
        self._retried = False
        self._raises: list[frozenset[int]] = []
        self._fenced_for_raising = False
        self._fail_reason: str | None = None
        self._history: deque[tuple[float, str, Event, Sequence[Action]]] = deque(maxlen=HISTORY_MAX)

    @property
    def phase(self) -> Phase | None:
        """The phase being performed; None when not recovering."""
        retry = Phase.RETRY if self._retrying else None
        return self._outstanding[0] if self._outstanding else retry

    @property
    def history(self) -> tuple[str, ...]:
        """The last events, each with the state it met and what it led to; for messages only."""
        return tuple(
            f"{at_s:.3f} [{where}] {text(event)} -> {'; '.join(map(text, actions)) or 'nothing'}"
            for at_s, where, event, actions in self._history
        )

    def expected_path(self) -> Decision[RecoveryPath]:
        """How the KV of the lost ranks should come back; what really happened is in the report."""
        n, m = len(self.lost), self.parity_shards
        path = RecoveryPath.REBUILD if n <= m else RecoveryPath.RECOMPUTE
        return Decision(choice=path, reason=f"{n} lost, parity covers {m}, mirrors any number")

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event; the actions are performed before the next call. Raises IllegalTransition.

        No actions while RECOVERING: the current work is still owed. None on a loss while HEALTHY: it was
        repaired before, and the owner of a step that it interrupted sends it again.
        """
        if isinstance(event, StepAccepted) and self.state is State.HEALTHY and event.epoch == self.epoch:
            self.attempts = 0  # every step comes by here: not worth a line of history
            return []
        where = f"{self.state.value}{f' {self.phase.value}' if self.phase else ''} epoch={self.epoch}"
        why_illegal = self._why_illegal(event)
        if why_illegal:
            what = f"{now_s:.3f} [{where}] {text(event)} is illegal: {why_illegal}; before it:"
            raise IllegalTransition("\n".join((what, *self.history)))
        is_stale = event.epoch < self.epoch and not isinstance(event, RanksLost)
        actions = [] if is_stale or self.state is State.GIVEN_UP else self._decide(event, now_s)
        self._history.append((now_s, where, event, actions))
        return actions

    def check(self) -> None:
        """Assert what must hold between two events."""
        assert 0 <= self.attempts <= self.max_attempts
        assert self.lost <= self._everyone
        assert all(e <= self.epoch for e in self._started_in)
        assert not (self._outstanding and self._retrying)
        match self.state:
            case State.HEALTHY:
                assert self.phase is None
                assert not any((self.lost, self._groups, self._in_flight, self._raises))
                assert self._fail_reason is None
            case State.RECOVERING:
                assert self.phase is not None
                assert self.lost or self._in_flight, "recovering from nothing"
                if self._retrying:
                    assert self._in_flight
                    assert not any((self.lost, self._groups))
            case State.GIVEN_UP:
                assert self.phase is None

    def _why_illegal(self, event: Event) -> str | None:
        """None: the event may come now."""
        if event.epoch > self.epoch:
            return "that epoch has not begun"
        if isinstance(event, RanksLost | PhaseFailed | StepRaised) and not event.ranks <= self._everyone:
            return "no such ranks"
        if event.epoch < self.epoch or self.state is State.GIVEN_UP:
            return None
        match event:
            case PhaseDone(phase=phase) | PhaseFailed(phase=phase) if phase not in self._outstanding:
                return "that phase is not being run"
            case StepRaised() | StepAccepted() if self._outstanding:
                return "no step may be running"
        return None

    def _decide(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case RanksLost():
                return self._ranks_lost(event, now_s)
            case PhaseDone():
                self._outstanding.remove(event.phase)
                return [] if self._outstanding else self._next(now_s)
            case PhaseFailed():
                return self._begin(
                    event.ranks, f"{event.phase.value} failed: {event.reason}", is_attempt=True
                )
            case StepRaised():
                return self._step_raised(event.ranks, event.reason)
            case StepAccepted():
                self.attempts = 0
                self._end(now_s)
                return []

    def _ranks_lost(self, event: RanksLost, now_s: float) -> list[Action]:
        waiting = NOBODY if self._spawned else self.lost  # lost already, nobody in their place yet
        fresh = frozenset(r for r in event.ranks - waiting if self._started_in[r] <= event.epoch)
        if event.step_in_flight and (fresh or self.state is State.RECOVERING):
            self._in_flight = True
        if not fresh:
            return []
        rate = None if event.evicted else self._loss_rate
        if rate is not None and (too_often := rate.add(fresh, now_s)) is not None:
            return self._give_up(f"{too_often}: {event.reason}")
        if self.state is State.HEALTHY and self._since_s is not None and now_s - self._since_s >= self.calm_s:
            self.attempts = 0
        if self._raises and not self.lost and not self._retrying:  # rolling back: the loss explains the raise
            self._raises.pop()
            self._fail_reason = None
        return self._begin(fresh, event.reason, is_attempt=not waiting)

    def _step_raised(self, ranks: frozenset[int], reason: str) -> list[Action]:
        self._in_flight = True
        self._raises.append(ranks)
        is_replaceable = len(self._everyone) > 1 and self.attempts < self.max_attempts
        may_fence = is_replaceable and not self._fenced_for_raising
        decision = after_raise(self._raises, retries=self.max_step_retries, may_fence=may_fence)
        reason = f"{reason} ({decision.reason})"
        if decision.choice is AfterRaise.FENCE:
            self._fenced_for_raising = True
            return self._begin(ranks, reason, is_attempt=True)
        if decision.choice is AfterRaise.FAIL:
            self._fail_reason = reason
        return self._begin(NOBODY, reason, is_attempt=False)

    def _begin(self, ranks: frozenset[int], reason: str, *, is_attempt: bool) -> list[Action]:
        """(Re)start a recovery for the lost ranks and these: in the next epoch, from the first phase."""
        self._retrying = False
        self._outstanding, self._groups = [], []
        self.lost |= ranks
        if is_attempt:
            if self.attempts == self.max_attempts:
                return self._give_up(f"gave up after {self.attempts} attempts: {reason}")
            self.attempts += 1
            if self.attempts == self.max_attempts and self._retried and self._fail_reason is None:
                self._fail_reason = f"not retried in the last of {self.max_attempts} attempts: {reason}"
        self.state = State.RECOVERING
        self.epoch += 1
        self._spawned = False
        for rank in self.lost:
            self._started_in[rank] = self.epoch
        self._groups = list(REPLACE if self.lost else ROLL_BACK)
        fence: list[Action] = [Fence(self.lost)] if self.lost else []
        return [*fence, RaiseEpoch(self.epoch), self._run_group()]

    def _give_up(self, reason: str) -> list[Action]:
        self.state = State.GIVEN_UP
        self._retrying, self._outstanding = False, []
        return [GiveUp(reason)]

    def _run_group(self) -> Run:
        group = self._groups.pop(0)
        self._outstanding = list(group)
        self._spawned = self._spawned or Phase.SPAWN in group
        return Run(group, self.epoch)

    def _next(self, now_s: float) -> list[Action]:
        """The current Run is done."""
        if self._groups:
            return [self._run_group()]
        self.lost = NOBODY
        if self._in_flight and self._fail_reason is None:
            self._retrying = self._retried = True
            return [RetryStep(self.epoch)]
        last = Resume() if self._fail_reason is None else FailStep(self._fail_reason)
        self._end(now_s)
        return [last]

    def _end(self, now_s: float) -> None:
        self.state = State.HEALTHY
        self._since_s = now_s
        self._in_flight = self._retrying = self._retried = self._fenced_for_raising = False
        self._raises = []
        self._fail_reason = None


def text(message: Event | Action) -> str:
    """An event or action in one short line: for history, logs and scenarios."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    shown = (f"{name}={_value(v)}" for name, v in values.items() if v is not False and v != NOBODY)
    return " ".join((type(message).__name__, *shown))


def _value(value: object) -> str:
    if isinstance(value, frozenset | tuple):
        return ",".join(map(_value, sorted(value) if isinstance(value, frozenset) else value))
    return repr(value) if isinstance(value, str) else str(getattr(value, "value", value))
