"""An arena without free frames: as long as told, and everything comes back."""

from __future__ import annotations

from ghostserve.arena.control import (
    ControlPage,
    Counter,
    Fault,
    FaultAction,
    FaultPoint,
)
from ghostserve.arena.frames import FramePool
from ghostserve.engine.drought import ENGINE_RANK, Drought


def test_without_a_fault_nothing_is_taken(page: ControlPage) -> None:
    pool = FramePool(4)
    Drought().step(page, pool)
    assert pool.free_count == 4


def test_also_what_comes_back_meanwhile_is_taken(page: ControlPage) -> None:
    pool, drought = FramePool(8), Drought()
    mine = pool.allocate(3)
    assert mine is not None
    page.arm_fault(
        Fault(point=FaultPoint.PLANNING, rank=ENGINE_RANK, action=FaultAction.TAKE_FRAMES, count=2)
    )
    drought.step(page, pool)
    assert pool.allocate(1) is None
    pool.retire(mine)
    pool.release(mine)
    drought.step(page, pool)
    assert pool.free_count == 0
    drought.step(page, pool)
    assert pool.free_count == 8
    assert page.get(Counter.FAULTS_STRUCK_TOTAL) == 2
    pool.check()
    drought.step(page, pool)
    assert pool.free_count == 8
