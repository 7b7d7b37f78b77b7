"""What rebuilding and computing KV takes on this server, from what it took before; pure.

Times of steps come from `step_times.py`; a restore's time is taken for proportional to its blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ghostserve.recovery.step_times import StepSize, StepTimes

GAIN = 1 / 4  # of a restore: there are few


@dataclass(slots=True)
class MeasuredCosts:
    """`plan.Costs`. `chunk`: tokens that one step computes at most."""

    times: StepTimes
    chunk: int
    block_s: float | None = None  # to restore one block on one rank, smoothed

    @property
    def known(self) -> bool:
        """Whether something was restored before; the first recovery rebuilds what it can."""
        return self.block_s is not None

    def learn_restore(self, blocks: int, took_s: float) -> None:
        """So many blocks were restored, one lost rank after the other; `blocks` counts them for each."""
        if not blocks:
            return
        found = took_s / blocks
        self.block_s = found if self.block_s is None else self.block_s + GAIN * (found - self.block_s)

    def rebuild_s(self, blocks: int) -> float:
        """Seconds to restore so many blocks of one rank; 0 while nothing is known."""
        return 0.0 if self.block_s is None else self.block_s * blocks

    def compute_s(self, tokens: int, context: int) -> float:
        """Seconds to compute so many tokens in steps of `chunk`, each after what was there before."""
        total = 0.0
        for first in range(0, tokens, self.chunk):
            size = StepSize(tokens=min(self.chunk, tokens - first), context=context + first)
            step_s = self.times.mean_s(size)
            total += math.inf if step_s is None else step_s
        return total
