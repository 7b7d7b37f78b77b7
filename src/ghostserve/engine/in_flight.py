"""Steps that were sent and are not accepted yet: what they are, and how requests leave them.

What that means for the KV is `shadow/unwritten.py`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from ghostserve.engine.request_state import WorkersView, increment_of
from ghostserve.recovery.step_times import StepSize
from ghostserve.shadow.manifest import Piece
from ghostserve.shadow.unwritten import Unwritten


@dataclass(slots=True, kw_only=True)
class OpenStep:
    """A step in flight. `sent` is what the workers got: the engine core's own, or less after rung 3."""

    step: int
    scheduler_output: Any
    sent: Any
    pieces: tuple[Piece, ...]
    size: StepSize
    sent_at_s: float  # first
    patience: float = 1.0  # times its deadline: doubled each time somebody was called hung in it
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


def unwritten(view: WorkersView, steps: Iterable[OpenStep], block_sizes: tuple[int, ...]) -> Unwritten:
    """What the steps in flight are to write. As they are sent now: an earlier attempt may have reduced them."""
    tables = {name: [list(ids) for ids in known.block_ids] for name, known in view.requests.items()}
    return Unwritten.of(tables, (increment_of(step.sent) for step in steps), block_sizes)


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
