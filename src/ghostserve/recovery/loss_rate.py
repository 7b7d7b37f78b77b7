"""How often each rank was lost, or replaced for being slow, lately; pure.

A rank that keeps dying is not worth replacing for ever: the server gives up. One whose successors are slow as well sits
in a slow place (a throttled core, say): another successor would be slow too, so it stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ghostserve.types import Decision


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
            times = _within(self._lost, rank, now_s - self.window_s)
            times.append(now_s)
            if len(times) > self.losses_max:
                too_often.append(f"rank {rank} was lost {len(times)} times within {self.window_s:g} s")
        return "; ".join(too_often) or None


@dataclass(slots=True, kw_only=True)
class Evictions:
    """At most `evictions_max` replacements of one rank for being slow within `window_s` seconds."""

    evictions_max: int
    window_s: float
    _evicted: dict[int, deque[float]] = field(default_factory=dict)

    def take(self, slow: Iterable[int], now_s: float) -> Decision[frozenset[int]]:
        """Which of these to replace now, counted as done; the reason names those that stay, empty if none does."""
        evicted, stay = set(), []
        for rank in sorted(slow):
            times = _within(self._evicted, rank, now_s - self.window_s)
            if len(times) < self.evictions_max:
                times.append(now_s)
                evicted.add(rank)
            else:
                stay.append(
                    f"rank {rank} stays, though slow: it was replaced {len(times)} times within {self.window_s:g} s, "
                    "and its successors are slow as well"
                )
        return Decision(choice=frozenset(evicted), reason="; ".join(stay))


def _within(known: dict[int, deque[float]], rank: int, since_s: float) -> deque[float]:
    """When it happened to the rank, less what is too long ago."""
    times = known.setdefault(rank, deque())
    while times and times[0] <= since_s:
        times.popleft()
    return times
