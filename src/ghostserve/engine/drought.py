"""An injected fault: for some steps no frame of the pool is free, as when host memory has run out."""

from __future__ import annotations

from ghostserve.arena.control import ControlPage, FaultPoint
from ghostserve.arena.frames import FramePool

ENGINE_RANK = 0  # under which faults at PLANNING are armed


class Drought:
    """Holds the frames meanwhile. Used under the guard's lock, once per step, before the step is planned."""

    def __init__(self) -> None:
        self._held: tuple[int, ...] = ()

    def step(self, page: ControlPage, pool: FramePool) -> None:
        """Take what is free if the fault strikes in this step; give it all back in the first one after it."""
        if page.take_fault(FaultPoint.PLANNING, ENGINE_RANK) is not None:
            self._held += pool.allocate(pool.free_count) or ()
        elif self._held:
            frames, self._held = self._held, ()
            pool.retire(frames)
            pool.release(frames)  # nobody has written to them: there is nothing to wipe
