"""What one recovery did and how long its phases took. Knows no clock: times are handed in."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ghostserve.types import Phase, RecoveryPath


class PhaseClock:
    """Charges the time since the last mark to the phase that has just ended; no moment is counted twice.

        t0 ──detect──▶ mark(DETECT) ──fence──▶ mark(FENCE) ──leave──▶ mark(LEAVE) ...

    A phase that runs again (a loss during the recovery) adds up. Of phases that run at the same time, each is
    charged with what it took beyond the one marked before it, so that the phases always sum up to the total.
    """

    def __init__(self, started_at_s: float) -> None:
        self._started_at_s = started_at_s
        self._last_s = started_at_s
        self._spent_s: dict[Phase, float] = dict.fromkeys(Phase, 0.0)

    def mark(self, phase: Phase, now_s: float) -> float:
        """`phase` ends now; what it is charged with. A time before the last mark, as read by another thread, counts as
        that mark.
        """
        spent_s = max(now_s, self._last_s) - self._last_s
        self._spent_s[phase] += spent_s
        self._last_s += spent_s
        return spent_s

    @property
    def last_s(self) -> float:
        """The last mark, or the start."""
        return self._last_s

    @property
    def started_at_s(self) -> float:
        """As it was handed in."""
        return self._started_at_s

    @property
    def phases_ms(self) -> dict[Phase, float]:
        """A copy: every phase in DESIGN order, 0.0 for one that did not run."""
        return {phase: spent_s * 1e3 for phase, spent_s in self._spent_s.items()}

    @property
    def total_ms(self) -> float:
        """From the start to the last mark."""
        return (self._last_s - self._started_at_s) * 1e3

    def check(self) -> None:
        """The phases sum up to the total."""
        assert abs(sum(self._spent_s.values()) - (self._last_s - self._started_at_s)) < 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """One finished recovery, good or bad. Counts are measured by the process that wrote the bytes."""

    epoch: int  # the epoch that it ended in
    lost_ranks: tuple[int, ...]
    lost_pids: tuple[int, ...]
    path: RecoveryPath
    ok: bool  # False: the server gave up, or the interrupted step failed
    reason: str
    noticed_at_s: float  # monotonic time of this machine at which `detect` began
    phases_ms: dict[Phase, float]
    total_ms: float
    kv_blocks_from_parity: int
    kv_blocks_from_mirrors: int
    kv_bytes_rebuilt: int
    kv_blocks_forgotten: int  # only the prefix cache held them, and there was no time
    tokens_recomputed: int  # without the retried step's own tokens
    requests_recomputed: int
    requests_recomputed_by_choice: int

    def as_dict(self) -> dict[str, object]:
        """Plain values under the same names; phases by name, in DESIGN order; times to the microsecond."""
        return {
            "epoch": self.epoch,
            "lost_ranks": list(self.lost_ranks),
            "lost_pids": list(self.lost_pids),
            "path": self.path.value,
            "ok": self.ok,
            "reason": self.reason,
            "noticed_at_s": round(self.noticed_at_s, 6),
            "phases_ms": {phase.value: round(self.phases_ms.get(phase, 0.0), 3) for phase in Phase},
            "total_ms": round(self.total_ms, 3),
            "kv_blocks_from_parity": self.kv_blocks_from_parity,
            "kv_blocks_from_mirrors": self.kv_blocks_from_mirrors,
            "kv_bytes_rebuilt": self.kv_bytes_rebuilt,
            "kv_blocks_forgotten": self.kv_blocks_forgotten,
            "tokens_recomputed": self.tokens_recomputed,
            "requests_recomputed": self.requests_recomputed,
            "requests_recomputed_by_choice": self.requests_recomputed_by_choice,
        }

    def to_json(self) -> str:
        """`as_dict` on one line."""
        return json.dumps(self.as_dict())
