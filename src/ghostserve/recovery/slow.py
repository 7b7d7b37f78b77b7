"""Which ranks are much slower than the others, by the time that each spends on steps without waiting for peers; pure.

All ranks of a group end a step together; the slow one is the one for which the others wait. So what counts is

    busy time per step = (time in steps - time waiting in collectives - time without a processor) / steps

over a window. Who gets no processor, because something else has it, is not slow: a successor would get none either. Which of a
rank's threads held its step up is not known, though, so that time is uncertain by as much as it is long. A rank is
slow while its busy time is `factor` times the median of the others', and longer than that by more than any rank was starved. Where collectives do not tell how long they waited (over gloo, on a
GPU), all ranks look equally busy and none is called slow.

A recovery ends the window: who survived it has waited in a step that did not end, and for longer than it was in steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW_S = 2.0
STEPS_MIN = 20  # in a window; fewer say little
LEAST_S = 0.001  # a difference below that is noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one rank since its process began: sums in seconds."""

    in_steps_s: float
    waited_s: float
    steps: int
    starved_s: float = 0.0  # ready to run, and without a processor


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRank:
    """One that holds the others up."""

    rank: int
    busy_s: float  # per step
    others_s: float  # per step, the median of the others
    reason: str


class SlowRanks:
    """Fed every second or so. Not thread-safe."""

    def __init__(self, *, factor: float) -> None:
        self._factor = factor
        self._seen: deque[tuple[float, tuple[Work, ...]]] = deque()
        self._epoch = 0

    def look(self, now_s: float, works: Sequence[Work], *, epoch: int) -> list[SlowRank]:
        """Those that are slow now; `works[rank]`. None of a group of one. Not to be called during a recovery."""
        if epoch != self._epoch:
            self._seen.clear()
            self._epoch = epoch
        self._seen.append((now_s, tuple(works)))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - WINDOW_S:
            self._seen.popleft()
        began_s, first = self._seen[0]
        steps = min(work.steps - old.steps for work, old in zip(works, first, strict=True))
        if len(works) < 2 or now_s - began_s < WINDOW_S or steps < STEPS_MIN:
            return []
        pairs = list(zip(works, first, strict=True))
        busy = [_busy_s(work, old) for work, old in pairs]
        starved_s = max(work.starved_s - old.starved_s for work, old in pairs) / steps
        least_s = max(LEAST_S, starved_s)
        return [
            found for rank in range(len(works)) if (found := self._judge(rank, busy, least_s)) is not None
        ]

    def _judge(self, rank: int, busy: list[float], least_s: float) -> SlowRank | None:
        others_s = median(busy[:rank] + busy[rank + 1 :])
        if busy[rank] < self._factor * others_s or busy[rank] - others_s < least_s:
            return None
        return SlowRank(
            rank=rank,
            busy_s=busy[rank],
            others_s=others_s,
            reason=f"{1e3 * busy[rank]:.1f} ms of work per step, {1e3 * others_s:.1f} ms on the others",
        )


def _busy_s(work: Work, old: Work) -> float:
    steps = work.steps - old.steps
    elsewhere_s = (work.waited_s - old.waited_s) + (work.starved_s - old.starved_s)
    return max(0.0, work.in_steps_s - old.in_steps_s - elsewhere_s) / steps
