"""Steps that were sent and are not accepted yet: what they are about to write, and how requests leave them.

With asynchronous scheduling the next step is scheduled and sent before the result of this one is known. After a loss all
of them run again, in order, over the state after the last accepted step; so nothing that one of them writes is there.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghostserve.engine.request_state import WorkersView, increment_of
from ghostserve.recovery.step_times import StepSize
from ghostserve.shadow.manifest import Piece
from ghostserve.shadow.step_plan import NULL_BLOCK, BlockTables, Write


@dataclass(slots=True, kw_only=True)
class OpenStep:
    """A step in flight. `sent` is what the workers got: the engine core's own, or less after rung 3."""

    step: int
    scheduler_output: Any
    sent: Any
    pieces: tuple[Piece, ...]
    size: StepSize
    sent_at_s: float  # first
    disturbed: bool = False  # a recovery came in between: it says nothing about how long such steps take
    grammar_output: Any = None
    sampling: bool = False  # the engine core has asked for the tokens
    executed: bool = False  # the reply to its first half was taken
    output: Any = None
    done: bool = False  # accepted, or given up
    replies: deque[Any] = field(default_factory=deque)  # here and not taken yet; RankRaised for a failure

    @property
    def one_message(self) -> bool:
        """Whether its halves need not be told apart: no grammar says what may be sampled.

        The engine core asks for the tokens of every step that schedules any; one round trip does for both then.
        """
        output = self.scheduler_output
        return output.total_num_scheduled_tokens > 0 and not output.has_structured_output_requests

    @property
    def replies_due(self) -> int:
        """Replies that were not taken yet, here or on their way."""
        return (not self.executed) + (self.sampling and not self.one_message)

    def forget_replies(self) -> None:
        """Whatever was answered belongs to an epoch that was given up."""
        self.executed, self.output, self.disturbed = False, None, True
        self.replies.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwritten:
    """What the steps in flight are to write, and what running them needs.

    `writes`: in the order of the steps. `started`: requests that one of them starts or resumes, with the tokens that
    each found computed: what the workers knew of them before is of no use.
    """

    writes: tuple[Write, ...]
    started: dict[str, tuple[int, tuple[tuple[int, ...], ...]]]
    scheduled: dict[str, int]  # tokens in flight by request, since it was started if it was

    @classmethod
    def of(cls, view: WorkersView, steps: Sequence[OpenStep], block_sizes: tuple[int, ...]) -> Unwritten:
        """From what the workers know and what they were sent since."""
        tables = BlockTables(
            block_sizes,
            {name: [list(ids) for ids in known.block_ids] for name, known in view.requests.items()},
        )
        writes: list[Write] = []
        started: dict[str, tuple[int, tuple[tuple[int, ...], ...]]] = {}
        scheduled: dict[str, int] = {}
        for step in steps:
            increment = increment_of(step.sent)
            for request in increment.requests:
                if request.replaces and request.blocks is not None:
                    started[request.request_id] = (request.computed, request.blocks)
                    scheduled[request.request_id] = 0
                known = scheduled.get(request.request_id, 0)
                scheduled[request.request_id] = known + request.scheduled
            writes.extend(tables.apply(increment))
        return cls(writes=tuple(writes), started=started, scheduled=scheduled)

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


def written_slots(computed: int, table: Iterable[int], block_size: int) -> dict[int, int]:
    """Block -> slots that hold data, of a request with so many tokens computed."""
    slots = {
        block: min(max(computed - index * block_size, 0), block_size)
        for index, block in enumerate(table)
        if block != NULL_BLOCK
    }
    return {block: count for block, count in slots.items() if count}


def grammar_of(grammar_output: Any, requests: Collection[str]) -> Any | None:
    """The part of a grammar output (one row for each request that has a grammar) that is about these requests."""
    if grammar_output is None:
        return None
    names = grammar_output.structured_output_request_ids
    keep = [index for index, name in enumerate(names) if name in requests]
    if len(keep) == len(names):
        return grammar_output
    drafts = grammar_output.num_acceptable_drafts
    return (
        dataclasses.replace(
            grammar_output,
            structured_output_request_ids=[names[index] for index in keep],
            grammar_bitmask=grammar_output.grammar_bitmask[keep],
            num_acceptable_drafts=None if drafts is None else [drafts[index] for index in keep],
        )
        if keep
        else None
    )


def without(output: Any, removed: Collection[str]) -> Any:
    """A copy of a scheduler's output without some of its requests."""
    cached = output.scheduled_cached_reqs
    keep = [index for index, name in enumerate(cached.req_ids) if name not in removed]
    scheduled = {name: count for name, count in output.num_scheduled_tokens.items() if name not in removed}
    return dataclasses.replace(
        output,
        scheduled_new_reqs=[new for new in output.scheduled_new_reqs if new.req_id not in removed],
        scheduled_cached_reqs=dataclasses.replace(
            cached,
            req_ids=[cached.req_ids[index] for index in keep],
            resumed_req_ids=cached.resumed_req_ids - set(removed),
            new_token_ids=[cached.new_token_ids[index] for index in keep] if cached.new_token_ids else [],
            all_token_ids={name: ids for name, ids in cached.all_token_ids.items() if name not in removed},
            new_block_ids=[cached.new_block_ids[index] for index in keep],
            num_computed_tokens=[cached.num_computed_tokens[index] for index in keep],
            num_output_tokens=[cached.num_output_tokens[index] for index in keep],
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
    )
