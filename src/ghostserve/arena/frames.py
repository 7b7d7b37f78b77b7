"""Which frames of the pool are in use. Pure: counts numbers, touches no bytes.

    FREE ──allocate──▶ USED ──retire──▶ RETIRED ──release──▶ FREE
                                        (being wiped)

A frame passes through RETIRED because it holds its former user's text until it is wiped, and because a wipe
that came late would destroy the next user's.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class FrameState(Enum):
    """What may be done with a frame."""

    FREE = "free"  # reads as zeros; may be allocated
    USED = "used"  # belongs to whom it was allocated
    RETIRED = "retired"  # belongs to nobody, but still holds bytes; waits to be wiped


class FramePool:
    """States of `frames` frames, numbered from 0. Not thread-safe: the owner holds a lock.

    Asserts on what only a bug of ours can ask for: a frame given back twice, or one that was not given out.
    """

    def __init__(self, frames: int) -> None:
        assert frames >= 0, frames
        self.frames = frames
        self._states = [FrameState.FREE] * frames
        # A stack, so that the pool grows into memory only as far as it must; the lowest numbers are on top.
        self._free = list(range(frames - 1, -1, -1))
        self._retired_count = 0

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return self.frames - len(self._free) - self._retired_count

    @property
    def retired_count(self) -> int:
        return self._retired_count

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Take `count` free frames, all or nothing; None if there are not as many."""
        assert count >= 0, count
        if count > len(self._free):
            return None
        frames = tuple(self._free.pop() for _ in range(count))
        for frame in frames:
            self._states[frame] = FrameState.USED
        return frames

    def retire(self, frames: Iterable[int]) -> None:
        """Their user is done with these frames; they are not reusable until wiped and released."""
        for frame in frames:
            self._move(frame, FrameState.USED, FrameState.RETIRED)
            self._retired_count += 1

    def release(self, frames: Iterable[int]) -> None:
        """These retired frames are wiped."""
        for frame in frames:
            self._move(frame, FrameState.RETIRED, FrameState.FREE)
            self._retired_count -= 1
            self._free.append(frame)

    def state(self, frame: int) -> FrameState:
        return self._states[frame]

    def check(self) -> None:
        """Invariants, for tests and for idle time."""
        assert len(set(self._free)) == len(self._free), "a frame is free twice"
        assert all(self._states[frame] is FrameState.FREE for frame in self._free)
        assert self._states.count(FrameState.FREE) == self.free_count
        assert self._states.count(FrameState.RETIRED) == self.retired_count
        assert self._states.count(FrameState.USED) == self.used_count

    def _move(self, frame: int, before: FrameState, after: FrameState) -> None:
        assert 0 <= frame < self.frames, f"frame {frame} of a pool of {self.frames}"
        found = self._states[frame]
        assert found is before, (
            f"frame {frame} is {found.value}, not {before.value}: cannot become {after.value}"
        )
        self._states[frame] = after
