"""Which ranks are dead, judged from exits and from stamps; pure.

Knows no process and reads no clock: the caller collects `RankView`s (pidfds, stamps in the arena) and acts.

How far a rank is with the step in flight, from its last stamp:

    0 NOT_SEEN   no stamp of this (epoch, step)
    1 BEGUN      stamped with the status RUNNING: it may be waiting in a collective for a slower rank
    2 ANSWERED   stamped with any other status, also that of a failure, or stamped a later step

Once the deadline has passed, the ranks that are furthest behind are dead: they hold up the others, who are
only suspect. If all are equally far, nobody can be told apart; all are suspect until `all_stuck_s`, then all
are dead. While a rank's exit explains why the others wait, none of them is judged dead by time. A later issue
adds finer signs.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

RUNNING = "running"  # the stamp status of a rank that has begun a step and not finished it
SLOW_SHARE = 0.5  # of the deadline: from here on a rank is shown as slow
ALL_STUCK_FACTOR = 2.0  # of the deadline: default bound for "all are equally stuck"


class Health(Enum):
    """What others may conclude about a rank."""

    ALIVE = "alive"  # nothing wrong
    SLOW = "slow"  # still within its deadline; shown, nothing done
    SUSPECT = "suspect"  # past the deadline, but somebody else may be the cause; do not fence yet
    DEAD = "dead"  # fence and replace


class Progress(Enum):
    """How far a rank is with the step in flight; see the module's head."""

    NOT_SEEN = 0
    BEGUN = 1
    ANSWERED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """What is known about one rank at one moment. The stamp is its last one, whatever step that was."""

    rank: int
    exited: bool
    exit_code: int | None  # as multiprocessing tells it: -9 is SIGKILL; None while running or if unknown
    stamp_epoch: int
    stamp_step: int
    stamp_status: str
    stamp_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankVerdict:
    """The judgement of one rank, with the reason for log and page."""

    rank: int
    state: Health
    reason: str


def verdict(
    now_s: float,
    ranks: Sequence[RankView],
    *,
    epoch: int,
    step: int,
    step_started_at_s: float | None,
    deadline_s: float,
    all_stuck_s: float | None = None,
) -> list[RankVerdict]:
    """Judge every rank, in the given order. Remembers nothing: call it with a fresh view each time.

    `step_started_at_s`: None when no step is in flight; then only exits count. `all_stuck_s`: for how long no
    rank may be ahead of another; at least `deadline_s`, by default `ALL_STUCK_FACTOR` times that.
    """
    stuck_s = max(deadline_s, ALL_STUCK_FACTOR * deadline_s if all_stuck_s is None else all_stuck_s)
    exited = [v.rank for v in ranks if v.exited]
    waiting = [v for v in ranks if not v.exited and _progress(v, epoch, step) is not Progress.ANSWERED]
    behind = min((_progress(v, epoch, step).value for v in ranks if not v.exited), default=0)
    someone_is_ahead = any(_progress(v, epoch, step).value > behind for v in ranks if not v.exited)

    def judge(view: RankView) -> RankVerdict:
        if view.exited:
            return RankVerdict(rank=view.rank, state=Health.DEAD, reason=exit_reason(view.exit_code))
        if step_started_at_s is None:
            return RankVerdict(rank=view.rank, state=Health.ALIVE, reason="no step in flight")
        if view not in waiting:
            return RankVerdict(rank=view.rank, state=Health.ALIVE, reason=f"step {step}: {view.stamp_status}")
        waited_s = now_s - step_started_at_s
        state, why = _overdue(waited_s)
        if state is Health.SUSPECT:
            if exited:
                why += f"; waits for rank {', '.join(map(str, exited))}, which is gone"
            elif someone_is_ahead and _progress(view, epoch, step).value == behind:
                state, why = Health.DEAD, why + "; the others are further on"
            elif someone_is_ahead:
                why += "; others are further behind"
            elif waited_s > stuck_s:
                state, why = Health.DEAD, why + f"; all ranks stuck for more than {stuck_s:.1f} s"
            else:
                why += "; all ranks equally far"
        why += f"; last stamp {now_s - view.stamp_at_s:.1f} s ago"
        return RankVerdict(rank=view.rank, state=state, reason=why)

    def _overdue(waited_s: float) -> tuple[Health, str]:
        why = f"step {step} not answered for {waited_s:.1f} of {deadline_s:.1f} s"
        if waited_s > deadline_s:
            return Health.SUSPECT, why
        return (Health.SLOW if waited_s > SLOW_SHARE * deadline_s else Health.ALIVE), why

    return [judge(view) for view in ranks]


def dead_ranks(verdicts: Sequence[RankVerdict]) -> frozenset[int]:
    """Those to be fenced and replaced."""
    return frozenset(v.rank for v in verdicts if v.state is Health.DEAD)


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


def _progress(view: RankView, epoch: int, step: int) -> Progress:
    if view.stamp_epoch != epoch or view.stamp_step < step:
        return Progress.NOT_SEEN
    if view.stamp_step == step and view.stamp_status == RUNNING:
        return Progress.BEGUN
    return Progress.ANSWERED
