"""What steps in flight are to write, and what must be there before they run again. Pure.

With asynchronous scheduling the next step is sent before the result of the one before is known. After a loss all of them
run again, in order, over the state after the last accepted step; so nothing that one of them writes is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ghostserve.shadow.step_plan import NULL_BLOCK, BlockTables, StepIncrement, Write

Tables: TypeAlias = Sequence[Sequence[int]]
"""Block ids of a request, by KV group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A request whose KV is of use: tokens with KV before the steps in flight, and its blocks."""

    request_id: str
    computed: int
    tables: Tables


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedBlock:
    """A block that the prefix cache knows: slots that its hash covers."""

    block: int
    group: int
    slots: int


@dataclass(frozen=True, slots=True)
class Start:
    """How the steps in flight first name a request, or name it anew after a preemption.

    `computed` tokens were found with KV in `tables`; None: it goes on from what the workers knew before.
    """

    computed: int = 0
    tables: Tables | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwritten:
    """What the steps in flight are to write, and what running them needs.

    `writes`: in the order of the steps. `starts`: for each request that they name; of several only the last is what the
    scheduler knows, but the steps before run again with the blocks that it had then.
    """

    writes: tuple[Write, ...]
    starts: dict[str, tuple[Start, ...]]
    scheduled: dict[str, int]  # tokens in flight by request, since it was started if it was

    @classmethod
    def of(
        cls, tables: dict[str, list[list[int]]], steps: Iterable[StepIncrement], block_sizes: tuple[int, ...]
    ) -> Unwritten:
        """From what the workers knew before (`tables`, which is changed) and what they were sent since."""
        known_tables = BlockTables(block_sizes, tables)
        writes: list[Write] = []
        starts: dict[str, tuple[Start, ...]] = {}
        scheduled: dict[str, int] = {}
        for increment in steps:
            for request in increment.requests:
                name = request.request_id
                if request.replaces and request.blocks is not None:
                    starts[name] = (*starts.get(name, ()), Start(request.computed, request.blocks))
                    scheduled[name] = 0
                starts.setdefault(name, (Start(),))
                scheduled[name] = scheduled.get(name, 0) + request.scheduled
            writes.extend(known_tables.apply(increment))
        return cls(writes=tuple(writes), starts=starts, scheduled=scheduled)

    def blocks(self, requests: Collection[str] | None = None) -> dict[int, int]:
        """Blocks that these requests (or all) are to write -> slots that hold data before."""
        slots: dict[int, int] = {}
        for write in self.writes:
            if requests is None or write.request_id in requests:
                before = 0 if write.whole else write.start
                slots[write.block] = min(before, slots.get(write.block, before))
        return slots

    def with_sharers(self, requests: Collection[str], used: dict[str, set[int]]) -> set[str]:
        """These and all that count on blocks which these were to write: in the prefix cache, or in a later step."""
        affected = set(requests)
        while True:
            unwritten = self.blocks(affected).keys()
            sharing = {name for name, blocks in used.items() if blocks & unwritten} - affected
            if not sharing:
                return affected
            affected |= sharing

    def users(
        self, running: Iterable[tuple[str, int, Tables]], known: Callable[[str], tuple[int, Tables]]
    ) -> Iterator[User]:
        """Running requests, given as (request, tokens scheduled so far, tables), and what only a step in flight still
        names: preempted, finished or aborted since, or started over; it runs again with the blocks of that time.

        `known`: tokens with KV and tables of such a request, as the workers know them.
        """
        names = set()
        for name, computed, tables in running:
            names.add(name)
            yield User(request_id=name, computed=computed - self.scheduled.get(name, 0), tables=tables)
        for name, starts in self.starts.items():
            for start in starts[:-1] if name in names else starts:
                computed, found = known(name) if start.tables is None else (start.computed, start.tables)
                yield User(request_id=name, computed=computed, tables=found)

    def needed_slots(
        self, users: Iterable[User], cached: Iterable[CachedBlock], block_sizes: tuple[int, ...]
    ) -> tuple[dict[int, tuple[int, int]], dict[str, set[int]]]:
        """What must be there before they run again: (block -> (group, written slots)), and the blocks each user needs.

        What the steps in flight are to write was not written, also not for those that found it in the prefix cache,
        which knows a block as soon as it is scheduled.
        """
        needed: dict[int, tuple[int, int]] = {}
        used: dict[str, set[int]] = {}
        coming = self.blocks()
        for user in users:
            mine = used.setdefault(user.request_id, set())
            for group, (size, table) in enumerate(zip(block_sizes, user.tables, strict=True)):
                for block, written in written_slots(user.computed, table, size).items():
                    mine.add(block)
                    slots = min(written, coming.get(block, written))
                    if slots:
                        needed[block] = (group, max(slots, needed.get(block, (group, 0))[1]))
        for known in cached:
            if known.block not in needed and known.block not in coming:
                needed[known.block] = (known.group, known.slots)
        return needed, used


def written_slots(computed: int, table: Iterable[int], block_size: int) -> dict[int, int]:
    """Block -> slots that hold data, of a request with so many tokens computed."""
    slots = {
        block: min(max(computed - index * block_size, 0), block_size)
        for index, block in enumerate(table)
        if block != NULL_BLOCK
    }
    return {block: count for block, count in slots.items() if count}
