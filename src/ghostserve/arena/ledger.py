"""What is counted by label, and histograms: words of the control page that only grow.

A lane per process, as counters have, would cost too much room here. So each word has one writing process: the front
counts what becomes of the keeper, the engine core everything else. They outlive both a rank and the engine core's
recoveries, so no count ever goes back. Reading waits for nobody; a reader may see a histogram's sum one observation late.

      0  failures      a u64 per FailureKind
     16  recoveries    a u64 per path and outcome
     32  histograms    per phase, then of the whole: f64 sum, u64 per bucket, padded to 24 words
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass

from ghostserve.types import FailureKind, Phase, RecoveryOutcome, RecoveryPath

LEDGER_BYTES = 4096
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds; what takes longer is in one more bucket."""

_FAILURES, _RECOVERIES, _HISTOGRAMS = 0, 16, 32
_HISTOGRAM_WORDS = 24
_KINDS, _PATHS, _OUTCOMES, _PHASES = map(tuple, (FailureKind, RecoveryPath, RecoveryOutcome, Phase))
assert len(_KINDS) <= _RECOVERIES
assert len(_PATHS) * len(_OUTCOMES) <= _HISTOGRAMS - _RECOVERIES
assert 2 + len(BUCKETS_S) <= _HISTOGRAM_WORDS
assert 8 * (_HISTOGRAMS + (len(_PHASES) + 1) * _HISTOGRAM_WORDS) <= LEDGER_BYTES


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts` has one more entry than BUCKETS_S, and is not cumulated."""

    counts: tuple[int, ...]
    sum_s: float


class Ledger:
    """A process's view of the ledger in `view`, LEDGER_BYTES long. Any thread of it may count."""

    def __init__(self, view: memoryview) -> None:
        assert len(view) == LEDGER_BYTES, len(view)
        self._words = view.cast("Q")
        self._floats = view.cast("d")
        self._lock = threading.Lock()

    # -- counting --------------------------------------------------------------------------------------

    def count_failure(self, kind: FailureKind) -> None:
        self._add(_FAILURES + _KINDS.index(kind))

    def count_recovery(self, path: RecoveryPath, outcome: RecoveryOutcome) -> None:
        self._add(_recovery_word(path, outcome))

    def observe(self, phase: Phase | None, took_s: float) -> None:
        """A phase of a recovery took so long; None: the whole of it."""
        at = _histogram_word(phase)
        with self._lock:
            self._floats[at] += took_s
            self._words[at + 1 + bisect_left(BUCKETS_S, took_s)] += 1

    def _add(self, word: int) -> None:
        with self._lock:
            self._words[word] += 1

    # -- reading ---------------------------------------------------------------------------------------

    def failures(self, kind: FailureKind) -> int:
        return self._words[_FAILURES + _KINDS.index(kind)]

    def recoveries(self, path: RecoveryPath, outcome: RecoveryOutcome) -> int:
        return self._words[_recovery_word(path, outcome)]

    def histogram(self, phase: Phase | None) -> Histogram:
        """Of one phase; None: of whole recoveries."""
        at = _histogram_word(phase)
        counts = self._words[at + 1 : at + 2 + len(BUCKETS_S)].tolist()
        return Histogram(counts=tuple(counts), sum_s=self._floats[at])


def _recovery_word(path: RecoveryPath, outcome: RecoveryOutcome) -> int:
    return _RECOVERIES + _PATHS.index(path) * len(_OUTCOMES) + _OUTCOMES.index(outcome)


def _histogram_word(phase: Phase | None) -> int:
    index = len(_PHASES) if phase is None else _PHASES.index(phase)
    return _HISTOGRAMS + index * _HISTOGRAM_WORDS
