"""Where each packed log of a rank can be continued from, and its crc32 there. Pure; native/stage.c does the same.

    log:   |------- slots of accepted steps -------|-- step N --|-- step N+1 --|
    kept:                                          ^ crc        ^ crc          ^ crc

After a loss all steps in flight are staged again, so where each of them began is kept, not only the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ghostserve.types import STEPS_IN_FLIGHT_MAX


@dataclass(slots=True)
class LogProgress:
    """Of one rank, by frame: slots logged -> crc32 of the log so far."""

    _known: dict[int, dict[int, int]] = field(default_factory=dict)

    def begin(self, frame: int, start: int) -> tuple[int, int]:
        """From which slot to write to append slots from `start` on, and the crc32 before it.

        0 where the step before was not staged: then all of the log is written, from what is there.
        """
        known = self._known.get(frame, {})
        return (start, known[start]) if start and start in known else (0, 0)

    def logged(self, frame: int, *, start: int, stop: int, checksum: int) -> None:
        """Slots [start, stop) are in the log, as `begin` allowed; `checksum` covers all up to `stop`."""
        known = self._known.get(frame, {}) if start else {0: 0}
        kept = sorted(slots for slots in known if slots <= start)[-STEPS_IN_FLIGHT_MAX:]
        self._known[frame] = {**{slots: known[slots] for slots in kept}, stop: checksum}

    def seed(self, frame: int, *, slots: int, checksum: int) -> None:
        """A newcomer takes over a log where its predecessor left it."""
        self._known[frame] = {slots: checksum}
