"""The frame pool against a model of it, under random use."""

from __future__ import annotations

import random

import pytest

from ghostserve.arena.frames import FramePool, FrameState


def test_all_or_nothing() -> None:
    pool = FramePool(4)
    assert pool.allocate(3) == (0, 1, 2)
    assert pool.allocate(2) is None
    assert (pool.free_count, pool.used_count, pool.retired_count) == (1, 3, 0)
    assert pool.allocate(0) == ()
    assert pool.allocate(1) == (3,)
    pool.check()


def test_a_retired_frame_is_not_given_out_before_it_is_wiped() -> None:
    pool = FramePool(2)
    frames = pool.allocate(2)
    assert frames is not None
    pool.retire(frames[:1])
    assert pool.allocate(1) is None
    pool.release(frames[:1])
    assert pool.allocate(1) == frames[:1]


def test_our_bugs_are_found() -> None:
    pool = FramePool(3)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="frame 2 is free, not used"):
        pool.retire([2])
    with pytest.raises(AssertionError, match="frame 0 is used, not retired"):
        pool.release([0])
    pool.retire([0])
    with pytest.raises(AssertionError, match="frame 0 is retired, not used"):
        pool.retire([0])
    pool.release([0])
    with pytest.raises(AssertionError, match="frame 0 is free, not retired"):
        pool.release([0])
    with pytest.raises(AssertionError, match="frame 7 of a pool of 3"):
        pool.retire([7])
    with pytest.raises(AssertionError):
        pool.allocate(-1)
    pool.check()


def test_check_can_fail() -> None:
    pool = FramePool(2)
    pool._states[0] = FrameState.USED
    with pytest.raises(AssertionError):
        pool.check()


@pytest.mark.parametrize("seed", range(50))
def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(0, 40)
    pool = FramePool(size)
    used: set[int] = set()
    retired: set[int] = set()
    for _ in range(300):
        match rng.randrange(3):
            case 0:
                count = rng.randrange(0, 6)
                frames = pool.allocate(count)
                assert (frames is None) == (count > size - len(used) - len(retired))
                if frames is not None:
                    assert len(frames) == count
                    assert not set(frames) & (used | retired)
                    assert set(frames) <= set(range(size))
                    used |= set(frames)
            case 1:
                chosen = rng.sample(sorted(used), min(len(used), rng.randrange(4)))
                pool.retire(chosen)
                used -= set(chosen)
                retired |= set(chosen)
            case _:
                chosen = rng.sample(sorted(retired), min(len(retired), rng.randrange(4)))
                pool.release(chosen)
                retired -= set(chosen)
        pool.check()
        assert (pool.used_count, pool.retired_count) == (len(used), len(retired))
        assert pool.free_count == size - len(used) - len(retired)
