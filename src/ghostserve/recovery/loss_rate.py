"""How often each rank was lost lately; pure. A rank that keeps dying is not worth replacing for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class LossRate:
    """At most `losses_max` losses of one rank within `window_s` seconds."""

    losses_max: int
    window_s: float
    _lost: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, ranks: Iterable[int], now_s: float) -> str | None:
        """These are lost now. In words what is too much, None if nothing is."""
        too_often = []
        for rank in sorted(ranks):
            times = self._lost.setdefault(rank, deque())
            times.append(now_s)
            while times[0] <= now_s - self.window_s:
                times.popleft()
            if len(times) > self.losses_max:
                too_often.append(f"rank {rank} was lost {len(times)} times within {self.window_s:g} s")
        return "; ".join(too_often) or None
