"""Which slots a step writes. Pure, and computed from the step's increments alone.

The scheduler tells workers only what changed: new requests with their blocks, blocks appended to known
requests, how many tokens run. `BlockTables` keeps the same tables the workers keep, so that a step costs
O(requests in the step), never O(blocks of a request).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

NULL_BLOCK = 0  # vLLM's placeholder for blocks outside a sliding window; never holds data


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStep:
    """One request's share of a step.

    `computed` tokens had their KV before the step, `scheduled` more get it now. `blocks` holds, per KV group,
    the block ids to append, or to start from when `replaces` (a new or resumed request).
    """

    request_id: str
    computed: int
    scheduled: int
    blocks: tuple[tuple[int, ...], ...] | None
    replaces: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepIncrement:
    """A step, as far as KV is concerned."""

    requests: tuple[RequestStep, ...]
    finished: frozenset[str] = frozenset()
    copied_blocks: tuple[int, ...] = ()  # copy-on-write destinations, rewritten as a whole
    zeroed_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Slots [start, stop) of `block` get written for a request; `whole` if slots before `start` changed as well."""

    block: int
    group: int
    start: int
    stop: int
    whole: bool = False
    request_id: str = ""


@dataclass(slots=True)
class BlockTables:
    """The workers' block tables, per request and KV group, as of the last planned step."""

    block_sizes: tuple[int, ...]
    tables: dict[str, list[list[int]]] = field(default_factory=dict)

    def apply(self, increment: StepIncrement) -> list[Write]:
        """Advance the tables by one step and return the slots it writes."""
        for request_id in increment.finished:
            self.tables.pop(request_id, None)
        touched_whole = frozenset((*increment.copied_blocks, *increment.zeroed_blocks))
        writes: list[Write] = []
        for request in increment.requests:
            table = self._table(request)
            writes.extend(self._writes(request, table, touched_whole))
        return writes

    def _table(self, request: RequestStep) -> list[list[int]]:
        if request.replaces:
            assert request.blocks is not None, f"{request.request_id} starts without blocks"
            self.tables[request.request_id] = [list(blocks) for blocks in request.blocks]
        elif request.blocks is not None:
            for known, new in zip(self.tables[request.request_id], request.blocks, strict=True):
                known.extend(new)
        return self.tables[request.request_id]

    def _writes(
        self, request: RequestStep, table: list[list[int]], touched_whole: frozenset[int]
    ) -> Iterator[Write]:
        first, last = request.computed, request.computed + request.scheduled
        for group, (size, blocks) in enumerate(zip(self.block_sizes, table, strict=True)):
            for index in range(first // size, -(-last // size)):
                block = blocks[index]
                if block == NULL_BLOCK:
                    continue
                start, stop = max(first - index * size, 0), min(last - index * size, size)
                yield Write(
                    block=block,
                    group=group,
                    start=start,
                    stop=stop,
                    whole=block in touched_whole,
                    request_id=request.request_id,
                )
