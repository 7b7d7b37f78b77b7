"""How long a step should take, learnt from the steps before it; pure.

Steps are classed by the tokens that they compute and the tokens that these attend to, each by powers of two. A class
keeps a smoothed mean and mean deviation, as TCP does for round trips (RFC 6298): expected = mean + 4 * deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ghostserve.recovery.detector import Stage

GAIN, DEVIATION_GAIN, DEVIATIONS = 1 / 8, 1 / 4, 4.0  # RFC 6298, section 2


@dataclass(frozen=True, slots=True)
class StepSize:
    """`tokens` computed in a step, `context` tokens that were there before for its requests together."""

    tokens: int
    context: int

    @property
    def kind(self) -> tuple[int, int]:
        """The class: powers of two."""
        return self.tokens.bit_length(), self.context.bit_length()


@dataclass(slots=True)
class _Times:
    size: StepSize
    mean_s: float
    deviation_s: float

    @property
    def expected_s(self) -> float:
        return self.mean_s + DEVIATIONS * self.deviation_s


@dataclass(slots=True)
class StepTimes:
    """Remembers one estimate per class of steps."""

    _times: dict[tuple[int, int], _Times] = field(default_factory=dict)

    def learn(self, size: StepSize, took_s: float) -> None:
        """A step of that size took so long, undisturbed."""
        known = self._times.get(size.kind)
        if known is None:
            self._times[size.kind] = _Times(size, took_s, took_s / 2)
            return
        known.deviation_s += DEVIATION_GAIN * (abs(took_s - known.mean_s) - known.deviation_s)
        known.mean_s += GAIN * (took_s - known.mean_s)

    def expect(self, size: StepSize) -> tuple[Stage, float]:
        """What a step of that size is, and how many seconds it should take.

        One of a class that was not seen: as long as any seen one would take if its time grew with the tokens and
        with the context, whichever says least. Nothing was seen: 0.
        """
        expected_s = self._estimate(size, lambda times: times.expected_s)
        if expected_s is None:
            return Stage.FIRST_STEP, 0.0
        return (Stage.STEP if size.kind in self._times else Stage.UNSEEN), expected_s

    def mean_s(self, size: StepSize) -> float | None:
        """What a step of that size takes on average; guessed from others as in `expect`. None: nothing was seen."""
        return self._estimate(size, lambda times: times.mean_s)

    def _estimate(self, size: StepSize, seconds: Callable[[_Times], float]) -> float | None:
        known = self._times.get(size.kind)
        if known is not None:
            return seconds(known)
        guesses = (seconds(times) * _growth(times.size, size) for times in self._times.values())
        return min(guesses, default=None)


def _growth(seen: StepSize, size: StepSize) -> float:
    tokens = max(1.0, size.tokens / max(1, seen.tokens))
    return tokens * max(1.0, size.context / max(1, seen.context))
