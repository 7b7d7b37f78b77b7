"""Faults that are armed from outside while a server runs, and strike a given number of times.

    word 0: generation, raised by each arming
    then 8 entries: | state | point | rank | action | skip | argument | count |

An entry has one writer at a time: while it is free the process that arms (there is one, the front), while it
is armed the process that it names. So no lock between processes is needed.
"""

from __future__ import annotations

import threading

from ghostserve.arena.names import Fault, FaultAction, FaultPoint
from ghostserve.arena.records import fence
from ghostserve.errors import BudgetExceeded, UsageError

FAULTS_MAX = 8
_ENTRY_WORDS = 8
_STATE, _POINT, _RANK, _ACTION, _SKIP, _ARGUMENT, _COUNT = range(7)
_FREE, _ARMED = 0, 1
_POINTS = tuple(FaultPoint)
_ACTIONS = tuple(FaultAction)

TABLE_BYTES = 8 * _ENTRY_WORDS * (1 + FAULTS_MAX)


class FaultTable:
    """The table in `view`, `TABLE_BYTES` bytes of shared memory, zeros at first."""

    def __init__(self, view: memoryview) -> None:
        assert len(view) == TABLE_BYTES, len(view)
        self._words = view.cast("Q")
        self._none_armed_at = 0  # the generation at which nothing was armed any more
        self._lock = threading.Lock()

    def arm(self, fault: Fault) -> int:
        """Arm a fault and return its entry. BudgetExceeded if all are taken, UsageError for a negative number."""
        for name in ("rank", "skip", "argument", "count"):
            if getattr(fault, name) < 0:
                raise UsageError(f"{name} {getattr(fault, name)}: must not be negative")
        with self._lock:
            for index, base in enumerate(_bases()):
                if self._words[base + _STATE] != _FREE:
                    continue
                self._words[base + _POINT] = _POINTS.index(fault.point)
                self._words[base + _RANK] = fault.rank
                self._words[base + _ACTION] = _ACTIONS.index(fault.action)
                self._words[base + _SKIP] = fault.skip
                self._words[base + _ARGUMENT] = fault.argument
                self._words[base + _COUNT] = fault.count
                fence()
                self._words[base + _STATE] = _ARMED
                self._words[0] += 1
                return index
        raise BudgetExceeded(
            f"{FAULTS_MAX} faults are armed already; disarm them, or wait until one has struck"
        )

    def take(self, point: FaultPoint, rank: int) -> Fault | None:
        """What strikes here and now, as it was before it struck. One read where nothing is armed."""
        generation = self._words[0]
        if generation == self._none_armed_at:
            return None
        armed = 0
        for base in _bases():
            if self._words[base + _STATE] != _ARMED:
                continue
            armed += 1
            if self._words[base + _RANK] != rank or _POINTS[self._words[base + _POINT]] is not point:
                continue
            if self._words[base + _SKIP]:
                self._words[base + _SKIP] -= 1
                continue
            fault = self._at(base)
            if fault.count == 1:
                self._words[base + _STATE] = _FREE
            elif fault.count:
                self._words[base + _COUNT] -= 1
            return fault
        if not armed:
            self._none_armed_at = generation
        return None

    def disarm(self) -> None:
        """Free all entries; called by the process that arms, while no step runs."""
        with self._lock:
            for base in _bases():
                self._words[base + _STATE] = _FREE

    def armed(self) -> list[Fault]:
        """What is armed now."""
        return [self._at(base) for base in _bases() if self._words[base + _STATE] == _ARMED]

    def _at(self, base: int) -> Fault:
        return Fault(
            point=_POINTS[self._words[base + _POINT]],
            rank=self._words[base + _RANK],
            action=_ACTIONS[self._words[base + _ACTION]],
            skip=self._words[base + _SKIP],
            argument=self._words[base + _ARGUMENT],
            count=self._words[base + _COUNT],
        )


def _bases() -> range:
    return range(_ENTRY_WORDS, _ENTRY_WORDS * (1 + FAULTS_MAX), _ENTRY_WORDS)
