"""What a handful of measurements says, and what it does not. Pure: no clock, no process, randomness is an argument.

Two servers are compared by the ratio of neighbours in time, one ratio per round: what the machine does to both
(frequency, a noisy neighbour) cancels. Of these ratios the median is reported, with a bootstrap interval of it.

    rounds     a/c of each round          resampled medians
    1  c a  ─▶  0.97                      ┌ 2.5 % ┐        ┌ 97.5 % ┐
    2  a c  ─▶  0.95     ─▶  median, and  low ············· high
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

CONFIDENCE = 0.95
RESAMPLES = 10_000
# With n values all of which lie on one side of the true median by chance in 2 of 2^n cases, even the whole
# range of five covers it less often than CONFIDENCE.
VALUES_MIN = 6


class Judgement(Enum):
    """Whether a target holds."""

    MET = "met"  # the whole interval is on the good side, and narrow enough to mean something
    MISSED = "missed"  # the whole interval is on the bad side
    NOT_RESOLVED = "not resolved"  # this run cannot tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A judgement with its reason."""

    choice: Judgement
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A median of `count` values and the interval that holds it in CONFIDENCE of the resamples."""

    median: float
    low: float
    high: float
    count: int

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How values that are not averaged lie, e.g. outages. With 20 values or fewer, p95 is the largest."""

    median: float
    p95: float
    minimum: float
    maximum: float
    count: int


def estimate_median(values: Sequence[float], *, rng: random.Random, resamples: int = RESAMPLES) -> Estimate:
    """The median and its percentile-bootstrap interval. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1.0 - CONFIDENCE) / 2
    return Estimate(
        median=statistics.median(values),
        low=nearest_rank(medians, tail),
        high=nearest_rank(medians, 1.0 - tail),
        count=len(values),
    )


def nearest_rank(ordered: Sequence[float], share: float) -> float:
    """The smallest of `ordered` that at least `share` of them do not exceed; always one of the values."""
    rank = -(-len(ordered) * share // 1)  # ceiling
    return ordered[min(max(int(rank), 1), len(ordered)) - 1]


def spread_of(values: Sequence[float]) -> Spread:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return Spread(
        median=statistics.median(ordered),
        p95=nearest_rank(ordered, 0.95),
        minimum=ordered[0],
        maximum=ordered[-1],
        count=len(ordered),
    )


def judge_ratio(estimate: Estimate, *, at_least: float) -> Decision:
    """Whether a ratio of speeds is at least `at_least`, a little below 1.

         target      1      its opposite
    ──────┼──────────┼──────────┼──────▶ ratio
    └───┘ missed     └────┘ met            one that reaches below 1 must be no wider than from the
       └────┘ not resolved                 target to its opposite: a wider one would have held either
    """
    assert 0 < at_least < 1
    if estimate.count < VALUES_MIN:
        return Decision(
            choice=Judgement.NOT_RESOLVED,
            reason=f"{estimate.count} rounds are too few for an interval, at least {VALUES_MIN} are needed",
        )
    between = f"the interval, {estimate.low:.3f} to {estimate.high:.3f},"
    if estimate.high < at_least:
        return Decision(choice=Judgement.MISSED, reason=f"{between} lies below {at_least:g}")
    if estimate.low < at_least:
        return Decision(choice=Judgement.NOT_RESOLVED, reason=f"{between} holds {at_least:g}")
    if estimate.low < 1 and estimate.width > 2 * (1 - at_least):
        return Decision(
            choice=Judgement.NOT_RESOLVED,
            reason=f"{between} is wider than from {at_least:g} to its opposite, {2 - at_least:g}",
        )
    return Decision(choice=Judgement.MET, reason=f"{between} lies above {at_least:g}")


def judge_cost(ratio: Estimate, difference: Estimate, *, at_least: float, or_at_most: float) -> Decision:
    """As judge_ratio; else met if what a step takes longer is `or_at_most` or less, whole interval, as narrow as that."""
    decision = judge_ratio(ratio, at_least=at_least)
    if decision.choice is Judgement.MET or ratio.count < VALUES_MIN:
        return decision
    if difference.high > or_at_most or difference.width > 2 * or_at_most:
        return decision
    return Decision(
        choice=Judgement.MET,
        reason=f"the difference, {difference.low:.0f} to {difference.high:.0f}, lies below {or_at_most:g}",
    )


def distinct_ngrams(token_ids: Sequence[int], length: int = 4) -> float:
    """The share of n-grams that occur for the first time; near 0 for a text that repeats itself."""
    grams = [tuple(token_ids[at : at + length]) for at in range(len(token_ids) - length + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
