"""Which slots a step writes, from its increments alone."""

from __future__ import annotations

import random

import pytest

from ghostserve.shadow.step_plan import NULL_BLOCK, BlockTables, RequestStep, StepIncrement, Write

SIZE = 4


def new(
    name: str, *groups: list[int], computed: int = 0, scheduled: int, replaces: bool = True
) -> RequestStep:
    """A request whose blocks are told from the start: new, or resumed after a preemption."""
    return RequestStep(
        request_id=name,
        computed=computed,
        scheduled=scheduled,
        blocks=tuple(map(tuple, groups)),
        replaces=replaces,
    )


def known(name: str, *groups: list[int], computed: int, scheduled: int = 1) -> RequestStep:
    """A request that goes on; `groups` are blocks appended, none if nothing was."""
    return RequestStep(
        request_id=name,
        computed=computed,
        scheduled=scheduled,
        blocks=tuple(map(tuple, groups)) or None,
        replaces=False,
    )


def step(
    *requests: RequestStep,
    finished: tuple[str, ...] = (),
    copied: tuple[int, ...] = (),
    zeroed: tuple[int, ...] = (),
) -> StepIncrement:
    return StepIncrement(
        requests=requests, finished=frozenset(finished), copied_blocks=copied, zeroed_blocks=zeroed
    )


def writes(tables: BlockTables, increment: StepIncrement) -> list[tuple[int, int, int]]:
    """(block, start, stop) of a step of one KV group in which nothing is rewritten."""
    found = tables.apply(increment)
    assert all(write.group == 0 and not write.whole for write in found)
    return [(write.block, write.start, write.stop) for write in found]


@pytest.fixture
def tables() -> BlockTables:
    return BlockTables((SIZE,))


def test_a_prompt_then_tokens_one_by_one(tables: BlockTables) -> None:
    assert writes(tables, step(new("a", [5, 6], scheduled=6))) == [(5, 0, 4), (6, 0, 2)]
    assert writes(tables, step(known("a", computed=6))) == [(6, 2, 3)]
    assert writes(tables, step(known("a", computed=7))) == [(6, 3, 4)]
    assert writes(tables, step(known("a", [9], computed=8))) == [(9, 0, 1)]


def test_a_prompt_that_ends_with_its_block_writes_nothing_of_the_next(tables: BlockTables) -> None:
    assert writes(tables, step(new("a", [5, 6], scheduled=SIZE))) == [(5, 0, 4)]


def test_a_chunked_prompt(tables: BlockTables) -> None:
    assert writes(tables, step(new("a", [1, 2], scheduled=6))) == [(1, 0, 4), (2, 0, 2)]
    assert writes(tables, step(known("a", [3], computed=6, scheduled=6))) == [(2, 2, 4), (3, 0, 4)]
    assert writes(tables, step(known("a", [4], computed=12, scheduled=3))) == [(4, 0, 3)]


def test_a_prefix_cache_hit_writes_only_what_is_new(tables: BlockTables) -> None:
    assert writes(tables, step(new("a", [1, 2, 3], computed=8, scheduled=2))) == [(3, 0, 2)]


def test_a_resumed_request_starts_a_new_table(tables: BlockTables) -> None:
    writes(tables, step(new("a", [1, 2], scheduled=6)))
    resumed = new("a", [7, 8], scheduled=7)
    assert writes(tables, step(resumed)) == [(7, 0, 4), (8, 0, 3)]
    assert tables.tables["a"] == [[7, 8]]


def test_a_resumed_request_with_a_cache_hit(tables: BlockTables) -> None:
    writes(tables, step(new("a", [1, 2], scheduled=6)))
    assert writes(tables, step(new("a", [1, 8], computed=4, scheduled=3))) == [(8, 0, 3)]


def test_a_request_that_sits_out_a_step_keeps_its_table(tables: BlockTables) -> None:
    writes(tables, step(new("a", [1], scheduled=2), new("b", [2], scheduled=2)))
    assert writes(tables, step(known("b", computed=2))) == [(2, 2, 3)]
    assert writes(tables, step(known("a", computed=2))) == [(1, 2, 3)]


def test_finished_requests_are_forgotten_before_the_step(tables: BlockTables) -> None:
    writes(tables, step(new("a", [1], scheduled=2)))
    assert writes(tables, step(finished=("a", "never heard of"))) == []
    assert tables.tables == {}


def test_a_name_that_is_used_again_in_the_same_step(tables: BlockTables) -> None:
    writes(tables, step(new("a", [1], scheduled=2)))
    assert writes(tables, step(new("a", [4], scheduled=1), finished=("a",))) == [(4, 0, 1)]
    assert tables.tables["a"] == [[4]]


def test_several_groups_each_with_blocks_of_its_own() -> None:
    tables = BlockTables((4, 8))
    found = tables.apply(step(new("a", [1, 2, 3], [10, 11], scheduled=10)))
    assert found == [
        Write(block=1, group=0, start=0, stop=4, request_id="a"),
        Write(block=2, group=0, start=4 - 4, stop=4, request_id="a"),
        Write(block=3, group=0, start=0, stop=2, request_id="a"),
        Write(block=10, group=1, start=0, stop=8, request_id="a"),
        Write(block=11, group=1, start=0, stop=2, request_id="a"),
    ]
    found = tables.apply(step(known("a", [], [], computed=10)))
    assert found == [
        Write(block=3, group=0, start=2, stop=3, request_id="a"),
        Write(block=11, group=1, start=2, stop=3, request_id="a"),
    ]


def test_blocks_outside_a_sliding_window_are_not_written() -> None:
    tables = BlockTables((SIZE, SIZE))
    found = tables.apply(step(new("a", [1, 2, 3], [NULL_BLOCK, NULL_BLOCK, 7], computed=6, scheduled=5)))
    assert [(w.group, w.block, w.start, w.stop) for w in found] == [
        (0, 2, 2, 4),
        (0, 3, 0, 3),
        (1, 7, 0, 3),
    ]


def test_copied_and_zeroed_blocks_changed_as_a_whole(tables: BlockTables) -> None:
    found = tables.apply(step(new("a", [1, 2, 3], computed=6, scheduled=4), copied=(2,), zeroed=(3, 99)))
    assert found == [
        Write(block=2, group=0, start=2, stop=4, whole=True, request_id="a"),
        Write(block=3, group=0, start=0, stop=2, whole=True, request_id="a"),
    ]


def test_a_new_request_without_blocks_is_our_bug(tables: BlockTables) -> None:
    request = RequestStep(request_id="a", computed=0, scheduled=1, blocks=None, replaces=True)
    with pytest.raises(AssertionError, match="a starts without blocks"):
        tables.apply(step(request))


def test_a_request_nobody_introduced_is_an_error(tables: BlockTables) -> None:
    with pytest.raises(KeyError):
        tables.apply(step(known("a", computed=0)))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_written_once_and_in_its_place(seed: int) -> None:
    """Any chunks, any block sizes: the writes of a request tile its tokens, slot by slot, in every group."""
    rng = random.Random(seed)
    sizes = tuple(rng.choice((1, 3, 4, 8)) for _ in range(rng.randint(1, 3)))
    tables = BlockTables(sizes)
    blocks: list[list[int]] = [[] for _ in sizes]
    fresh = iter(range(1, 10_000))
    tokens = [0] * len(sizes)
    computed = 0
    for number in range(30):
        scheduled = rng.randint(1, 9)
        added = []
        for group, size in enumerate(sizes):
            missing = -(-(computed + scheduled) // size) - len(blocks[group])
            added.append([next(fresh) for _ in range(missing)])
            blocks[group] += added[-1]
        if number == 0:
            request = new("a", *added, scheduled=scheduled)
        else:
            request = known("a", *(added if any(added) else []), computed=computed, scheduled=scheduled)
        for write in tables.apply(step(request)):
            size = sizes[write.group]
            at = tokens[write.group]
            assert (blocks[write.group][at // size], at % size) == (write.block, write.start)
            assert write.start < write.stop <= size
            tokens[write.group] += write.stop - write.start
        computed += scheduled
        assert tokens == [computed] * len(sizes)
