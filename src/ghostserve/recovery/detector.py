"""Which ranks are dead, slow or suspect, judged from exits, stamps and the progress of collectives; pure.

Knows no process and reads no clock: the caller samples (`RankSample`) and acts. The detector remembers, for each rank,
for how long nothing about it has changed while work was open (`quiet_s`).

How far a rank is with the open work, compared in this order:

    0 NOT_SEEN   no stamp of this (epoch, step)            met: rounds of collectives begun since the groups were
    1 BEGUN      stamped, not finished                      formed. A rank that waits for peers has met one more round
    2 ANSWERED   finished, failed, or at a later step       than the one it waits for.

Once a rank that has not answered was quiet for longer than the deadline:

    some are further behind than others           those are dead: they hold up the others, who are suspect
    all equally far, some wait for a peer         those who do not wait are dead
    all equally far, nobody can be told apart     suspect; after `ALL_STUCK_FACTOR` deadlines all of them are dead
    all have finished, one does not answer        it is dead
    stopped (SIGSTOP, a debugger)                 dead, whatever the others do
    an exit explains the wait                     the exited are dead; nobody else is judged by time

The deadline is `factor` times what such work is expected to take, not below a floor and not above a ceiling; a rank
that makes progress is never late, however long a prefill takes. Work that is tried again after a verdict gets twice the
time (`patience`): it may be the work that takes so long, and no rank is ill (RFC 6298, section 5.5). Time in which the observer itself did not look, or in
which a rank was ready to run and got no processor, is not held against a rank (compare local health in Lifeguard,
Dadgar et al. 2018): a busy or suspended machine is not a hang.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

ALL_STUCK_FACTOR = 2.0  # of the deadline
SUSPECT_SHARE = 0.5  # of the deadline: from here on a rank is shown as suspect
LOOK_MAX_S = 0.1  # what one look adds to `quiet_s` at most: longer, and the observer itself was asleep


class Health(Enum):
    """What others may conclude about a rank."""

    ALIVE = "alive"  # nothing wrong
    SLOW = "slow"  # makes progress, but takes much longer than the others; shown, evicted only if asked for
    SUSPECT = "suspect"  # quiet for long, but not past its deadline, or somebody else may be the cause
    DEAD = "dead"  # fence and replace


class Stage(Enum):
    """What is being waited for; each has a deadline of its own."""

    FIRST_STEP = "first step"  # after the start: kernels compile, and nothing is known of steps
    UNSEEN = "step of a new size"  # kernels may compile; others were seen
    REPLACED = "first step of a replacement"  # its peers know such steps, its own caches are cold
    STEP = "step"  # such a step was seen before


class Progress(Enum):
    """How far a rank is with the open step; see the module's head."""

    NOT_SEEN = 0
    BEGUN = 1
    ANSWERED = 2


PATIENCE = {Stage.UNSEEN: 12.0, Stage.REPLACED: 4.0}
"""How many floors such a step gets at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Configuration, in seconds. `floor_s` 0: nobody is judged by time."""

    floor_s: float
    ceiling_s: float
    first_step_s: float
    factor: float = 5.0

    def deadline_s(self, stage: Stage, expected_s: float) -> float:
        """How long a rank may be quiet."""
        if stage is Stage.FIRST_STEP:
            return max(self.floor_s, self.first_step_s)
        floor_s = self.floor_s * PATIENCE.get(stage, 1.0)
        return min(max(floor_s, self.factor * expected_s), max(floor_s, self.ceiling_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSample:
    """What is known about one rank at one moment. The stamp is its last one, whatever step that was."""

    rank: int
    exited: bool = False
    exit_code: int | None = (
        None  # as multiprocessing tells it: -9 is SIGKILL; None while running or if unknown
    )
    stopped: bool = False  # by a signal or a debugger
    epoch: int = 0
    step: int = 0
    at_work: bool = False  # the stamp says that the step was begun and not finished there
    status: str = ""  # the stamp in a word, for reasons
    met: int = 0
    waiting: bool = False  # for a peer, in a collective
    starved_s: float = 0.0  # total time ready to run without a processor


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWork:
    """What every rank is expected to answer."""

    epoch: int
    step: int
    stage: Stage
    expected_s: float
    awaits: int | None = None  # the rank whose answer is missing, even if it has finished
    patience: float = 1.0  # times the deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class RankVerdict:
    """The judgement of one rank, with the reason for log and page."""

    rank: int
    state: Health
    reason: str


class Detector:
    """Judges all ranks of one group at each look. Not thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._work: OpenWork | None = None
        self._looked_at_s = 0.0
        self._before: dict[int, RankSample] = {}
        self._quiet_s: dict[int, float] = {}
        self.longest_quiet_s = 0.0  # of any rank that moved again: what a limit must be above

    def quiet_s(self, rank: int) -> float:
        """For how long nothing about this rank has changed while the present work was open."""
        return self._quiet_s.get(rank, 0.0)

    def look(self, now_s: float, samples: Sequence[RankSample], work: OpenWork | None) -> list[RankVerdict]:
        """Judge every rank, in the given order. Call it again and again while work is open; None: nothing is."""
        same = work is not None and self._work is not None and _same(work, self._work)
        gone_s = min(max(now_s - self._looked_at_s, 0.0), LOOK_MAX_S) if same else 0.0
        for sample in samples:
            self._count(sample, gone_s if same else None)
        self._work, self._looked_at_s = work, now_s
        self._before = {sample.rank: sample for sample in samples}
        if work is None:
            return [_idle(sample) for sample in samples]
        return self._judge(samples, work)

    def _count(self, sample: RankSample, gone_s: float | None) -> None:
        before = self._before.get(sample.rank)
        if gone_s is None or before is None or _moved(before, sample):
            self.longest_quiet_s = max(self.longest_quiet_s, self._quiet_s.get(sample.rank, 0.0))
            self._quiet_s[sample.rank] = 0.0
            return
        starved_s = min(max(sample.starved_s - before.starved_s, 0.0), gone_s)
        self._quiet_s[sample.rank] += gone_s - starved_s

    def _judge(self, samples: Sequence[RankSample], work: OpenWork) -> list[RankVerdict]:
        deadline_s = work.patience * self.limits.deadline_s(work.stage, work.expected_s)
        present = [sample for sample in samples if not sample.exited]
        exited = [sample.rank for sample in samples if sample.exited]
        places = {sample.rank: _place(sample, work) for sample in present}
        behind = min(places.values(), default=(0, 0))
        someone_is_ahead = any(place > behind for place in places.values())
        someone_waits = any(sample.waiting for sample in present)
        all_answered = all(_progress(sample, work) is Progress.ANSWERED for sample in present)

        def judge(sample: RankSample) -> RankVerdict:
            if sample.exited:
                return _verdict(sample, Health.DEAD, exit_reason(sample.exit_code))
            owes_answer = all_answered and sample.rank == work.awaits
            if _progress(sample, work) is Progress.ANSWERED and not owes_answer:
                return _verdict(sample, Health.ALIVE, f"step {work.step}: {sample.status}")
            quiet_s = self._quiet_s[sample.rank]
            why = f"step {work.step}: no progress for {quiet_s:.2f} s of {deadline_s:.2f} s"
            if not self.limits.floor_s or quiet_s <= SUSPECT_SHARE * deadline_s:
                return _verdict(sample, Health.ALIVE, why)
            if quiet_s <= deadline_s:
                return _verdict(sample, Health.SUSPECT, why)
            if sample.stopped:
                return _verdict(sample, Health.DEAD, f"{why}; its process is stopped")
            if owes_answer:
                return _verdict(sample, Health.DEAD, f"{why}; it has finished, and its answer does not come")
            if exited:
                return _verdict(sample, Health.SUSPECT, f"{why}; rank {_names(exited)} is gone")
            if someone_is_ahead:
                if places[sample.rank] == behind:
                    return _verdict(sample, Health.DEAD, f"{why}; the others are further on")
                return _verdict(sample, Health.SUSPECT, f"{why}; others are further behind")
            if someone_waits:
                if not sample.waiting:
                    return _verdict(sample, Health.DEAD, f"{why}; its peers wait for it")
                if not all(other.waiting for other in present):
                    return _verdict(sample, Health.SUSPECT, f"{why}; it waits for a peer")
            if quiet_s > ALL_STUCK_FACTOR * deadline_s:
                return _verdict(sample, Health.DEAD, f"{why}; all ranks are stuck")
            return _verdict(sample, Health.SUSPECT, f"{why}; all ranks are equally far")

        return [judge(sample) for sample in samples]


def dead_ranks(verdicts: Sequence[RankVerdict]) -> frozenset[int]:
    """Those to be fenced and replaced."""
    return frozenset(v.rank for v in verdicts if v.state is Health.DEAD)


def laggards(samples: Sequence[RankSample], work: OpenWork) -> frozenset[int]:
    """Those who are furthest behind with the open work; nobody where all have answered."""
    open_ = [s for s in samples if not s.exited and _progress(s, work) is not Progress.ANSWERED]
    behind = min((_place(sample, work) for sample in open_), default=None)
    return frozenset(sample.rank for sample in open_ if _place(sample, work) == behind)


def waited_for(samples: Sequence[RankSample]) -> frozenset[int]:
    """Of ranks that owe an answer to anything but a step: those whom the others wait for in a collective. They met the fewest
    rounds, and of these it is those that do not wait themselves.

    Where nothing tells them apart it is the first: to be rid of one that is well costs its KV, and of the others those that
    hang will not leave the group either.
    """
    behind = min((sample.met for sample in samples), default=0)
    last = [sample for sample in samples if sample.met == behind]
    found = [sample.rank for sample in [s for s in last if not s.waiting] or last]
    return frozenset(found if len(found) < len(samples) else found[:1])


def reasons(verdicts: Sequence[RankVerdict]) -> str:
    """One line for the log: what is said of each rank."""
    return "; ".join(f"rank {found.rank} {found.state.value}: {found.reason}" for found in verdicts)


def exit_reason(exit_code: int | None) -> str:
    """An exit code in words; a negative one is the signal that ended the process."""
    if exit_code is None:
        return "process is gone"
    if exit_code >= 0:
        return f"exited with {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def _idle(sample: RankSample) -> RankVerdict:
    if sample.exited:
        return _verdict(sample, Health.DEAD, exit_reason(sample.exit_code))
    return _verdict(sample, Health.ALIVE, "no step in flight")


def _verdict(sample: RankSample, state: Health, reason: str) -> RankVerdict:
    return RankVerdict(rank=sample.rank, state=state, reason=reason)


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _same(work: OpenWork, before: OpenWork) -> bool:
    return (work.epoch, work.step) == (before.epoch, before.step)


def _moved(before: RankSample, sample: RankSample) -> bool:
    """Whether the rank has done anything since."""
    return (before.epoch, before.step, before.status, before.met) != (
        sample.epoch,
        sample.step,
        sample.status,
        sample.met,
    )


def _place(sample: RankSample, work: OpenWork) -> tuple[int, int]:
    return _progress(sample, work).value, sample.met


def _progress(sample: RankSample, work: OpenWork) -> Progress:
    if sample.epoch != work.epoch or sample.step < work.step:
        return Progress.NOT_SEEN
    if sample.step == work.step and sample.at_work:
        return Progress.BEGUN
    return Progress.ANSWERED
