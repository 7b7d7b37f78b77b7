"""What steps in flight are to write, and what must be there before they run again."""

from __future__ import annotations

import pytest

from ghostserve.shadow.step_plan import NULL_BLOCK, RequestStep, StepIncrement
from ghostserve.shadow.unwritten import CachedBlock, Tables, Unwritten, written_slots

SIZE = 4


def goes_on(name: str, *, computed: int, scheduled: int = 1, blocks: tuple[int, ...] = ()) -> RequestStep:
    return RequestStep(
        request_id=name,
        computed=computed,
        scheduled=scheduled,
        blocks=(blocks,) if blocks else None,
        replaces=False,
    )


def starts(name: str, *blocks: int, computed: int = 0, scheduled: int) -> RequestStep:
    return RequestStep(
        request_id=name, computed=computed, scheduled=scheduled, blocks=(blocks,), replaces=True
    )


def step(*requests: RequestStep) -> StepIncrement:
    return StepIncrement(requests=requests)


def nobody(name: str) -> tuple[int, Tables]:
    raise AssertionError(f"the workers are asked for {name}")


def needed_of(
    coming: Unwritten,
    *,
    running: dict[str, tuple[int, list[list[int]]]],
    known: dict[str, tuple[int, list[list[int]]]] | None = None,
    cached: tuple[CachedBlock, ...] = (),
) -> dict[int, int]:
    """Block -> slots."""
    users = coming.users(
        ((name, computed, tables) for name, (computed, tables) in running.items()),
        known.__getitem__ if known is not None else nobody,
    )
    needed, _ = coming.needed_slots(users, cached, (SIZE,))
    return {block: slots for block, (_, slots) in needed.items()}


def test_a_running_request_needs_what_it_had_before_the_steps_in_flight() -> None:
    coming = Unwritten.of(
        {"a": [[1, 2]]}, [step(goes_on("a", computed=5)), step(goes_on("a", computed=6))], (SIZE,)
    )
    assert coming.scheduled == {"a": 2}
    assert coming.blocks() == {2: 1}, "slot 0 of block 2 holds data before"
    assert needed_of(coming, running={"a": (7, [[1, 2]])}) == {1: 4, 2: 1}


@pytest.mark.parametrize("is_running", [True, False], ids=["started over", "and preempted again"])
def test_a_request_that_is_started_over_in_flight_needs_its_old_blocks_too(is_running: bool) -> None:
    """The step before the new start runs again, with the blocks of that time: what it reads there must be there."""
    coming = Unwritten.of(
        {"a": [[1, 2]]},
        [step(goes_on("a", computed=6)), step(starts("a", 7, 8, computed=4, scheduled=3))],
        (SIZE,),
    )
    running = {"a": (7, [[7, 8]])} if is_running else {}
    needed = needed_of(coming, running=running, known={"a": (6, [[1, 2]])})
    assert needed == {1: 4, 2: 2, 7: 4}


def test_a_request_started_in_flight_needs_what_it_found_in_the_prefix_cache() -> None:
    coming = Unwritten.of({}, [step(starts("a", 1, 2, computed=4, scheduled=2))], (SIZE,))
    assert needed_of(coming, running={}) == {1: 4}, "preempted since, it runs again all the same"


def test_what_only_the_prefix_cache_knows_is_needed_unless_it_is_still_to_be_written() -> None:
    coming = Unwritten.of({}, [step(starts("a", 1, scheduled=4))], (SIZE,))
    cached = tuple(CachedBlock(block=block, group=0, slots=SIZE) for block in (1, 5))
    assert needed_of(coming, running={"a": (4, [[1]])}, cached=cached) == {5: 4}


def test_who_counts_on_unwritten_blocks_leaves_with_who_was_to_write_them() -> None:
    coming = Unwritten.of(
        {},
        [
            step(starts("a", 1, scheduled=4)),
            step(starts("b", 1, 2, computed=4, scheduled=4), starts("c", 1, 2, 3, computed=8, scheduled=1)),
            step(starts("d", 9, scheduled=1)),
        ],
        (SIZE,),
    )
    used = {"a": {1}, "b": {1, 2}, "c": {1, 2, 3}, "d": {9}}
    assert coming.with_sharers({"a"}, used) == {"a", "b", "c"}
    assert coming.with_sharers({"b"}, used) == {"b", "c"}
    assert coming.with_sharers({"d"}, used) == {"d"}


def test_written_slots_of_a_table() -> None:
    assert written_slots(6, [1, 2, 3], SIZE) == {1: 4, 2: 2}
    assert written_slots(6, [NULL_BLOCK, 2], SIZE) == {2: 2}
