"""A scheduler as vLLM's: block pool with prefix cache, chunked prompts, preemption, placeholders for tokens on their way.

It decides only what a step is; whom the product protects, and how, it does not know. Where vLLM's own scheduler is
subtle it does the same: the prefix cache knows a block once it is *scheduled*, and what a request gave up while a step
in flight may read it stays taken for as long as the product's policy says (`defers_frees`).
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from ghostserve.shadow import commit_rule
from ghostserve.shadow.step_plan import RequestStep, StepIncrement
from ghostserve.shadow.unwritten import CachedBlock
from ghostserve.testing.simulation.block_pool import BlockPool, Key
from ghostserve.testing.simulation.contents import Truth, ends
from ghostserve.testing.simulation.setup import Setup


class Name(str):
    """A request's id. It hashes alike in every process, so that sets of them have one order, and a seed one schedule."""

    __slots__ = ()

    def __hash__(self) -> int:
        return zlib.crc32(self.encode())


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """`tokens`: prompt and outputs shown. `computed`: tokens whose KV is there or on its way."""

    name: str
    prompt: int
    outputs_max: int
    truth: Truth
    tokens: list[int]
    tables: list[list[int]]
    computed: int = 0
    placeholders: int = 0  # outputs on their way
    stale: int = 0  # outputs that were on their way when it was preempted
    drops_stale: bool = False  # they are computed anew; otherwise they are shown when they come

    def answer(self) -> list[int]:
        """All outputs of the failure-free run."""
        outputs: list[int] = []
        while len(outputs) < self.outputs_max:
            outputs.append(self.truth.token(self.prompt + len(outputs)))
            if ends(outputs[-1]):
                break
        return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A step: what the workers are told, the tokens of requests that start, and who samples."""

    increment: StepIncrement
    tokens: dict[str, tuple[int, ...]]  # of those that start or resume
    samples: frozenset[str]

    def without(self, removed: Collection[str]) -> Scheduled:
        """The same step without some of its requests. What it tells of those that finished stays."""
        increment = self.increment
        kept = tuple(request for request in increment.requests if request.request_id not in removed)
        return Scheduled(
            increment=StepIncrement(
                requests=kept,
                finished=increment.finished,
                copied_blocks=increment.copied_blocks,
                zeroed_blocks=increment.zeroed_blocks,
            ),
            tokens={name: tokens for name, tokens in self.tokens.items() if name not in removed},
            samples=self.samples - set(removed),
        )


@dataclass(slots=True)
class Scheduler:
    """One engine core's. `in_flight()` says which was the last step sent; 0: none is in flight."""

    setup: Setup
    pool: BlockPool = field(init=False)
    running: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    requests: dict[str, Request] = field(default_factory=dict)
    _finished: set[str] = field(default_factory=set)
    _deferred: list[tuple[int, list[int]]] = field(default_factory=list)
    last_sent: int = 0  # step; what is given up now may be read by it
    in_flight: int = 0
    preempted_for_room: int = 0  # so often, while a step in flight may still read what was given up

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.setup.blocks)

    # -- a step ----------------------------------------------------------------------------------------

    def schedule(self) -> Scheduled | None:
        """The next step; None if there is nothing to do."""
        budget = self.setup.tokens_per_step
        steps: list[RequestStep] = []
        tokens: dict[str, tuple[int, ...]] = {}
        samples: set[str] = set()
        fresh: list[int] = []
        for request in list(self.running):
            if request not in self.running:
                continue
            count = min(self._due(request), budget)
            if count <= 0:
                continue
            new = self._allocate(request, count, preempt=True, taken={step.request_id for step in steps})
            if new is None:
                continue
            steps.append(
                self._step(request, count, new if any(new) else None, replaces=False, samples=samples)
            )
            fresh.extend(block for blocks in new for block in blocks)
            budget -= count
        while budget > 0 and self.waiting and len(self.running) < self.setup.requests_running:
            request = self.waiting[0]
            if request.stale and not request.drops_stale:
                break  # what is on its way comes first
            found = self._find_prefix(request)
            count = min(self._due(request), budget)
            new = self._allocate(request, count, preempt=False, taken=set())
            if new is None:
                self._leave_prefix(request)
                break
            self.waiting.popleft()
            self.running.append(request)
            tokens[request.name] = tuple(request.tokens)
            blocks = tuple((*old, *added) for old, added in zip(found, new, strict=True))
            steps.append(self._step(request, count, blocks, replaces=True, samples=samples))
            fresh.extend(block for added in new for block in added)
            budget -= count
        if not steps and not self._finished:
            return None
        finished, self._finished = frozenset(self._finished), set()
        return Scheduled(
            increment=StepIncrement(
                requests=tuple(steps),
                finished=finished,
                zeroed_blocks=tuple(fresh) if self.setup.zeroes else (),
            ),
            tokens=tokens,
            samples=frozenset(samples),
        )

    def _due(self, request: Request) -> int:
        """Tokens it could compute now."""
        outputs = len(request.tokens) + request.placeholders - request.prompt
        if request.placeholders and outputs >= request.outputs_max:
            return 0  # its last token is on its way
        return len(request.tokens) + request.placeholders - request.computed

    def _step(
        self,
        request: Request,
        count: int,
        blocks: tuple[tuple[int, ...], ...] | None,
        *,
        replaces: bool,
        samples: set[str],
    ) -> RequestStep:
        step = RequestStep(
            request_id=request.name,
            computed=request.computed,
            scheduled=count,
            blocks=blocks,
            replaces=replaces,
        )
        request.computed += count
        if request.computed == len(request.tokens) + request.placeholders:
            request.placeholders += 1
            samples.add(request.name)
        self._remember(request, min(request.computed, len(request.tokens)))
        return step

    def _allocate(
        self, request: Request, count: int, *, preempt: bool, taken: set[str]
    ) -> tuple[tuple[int, ...], ...] | None:
        """New blocks by group, for `count` more tokens; None if there are not as many."""
        wanted = [
            -(-(request.computed + count) // size) - len(table)
            for size, table in zip(self.setup.block_sizes, request.tables, strict=True)
        ]
        while sum(wanted) > len(self.pool.free):
            victim = self.running[-1] if self.running else None
            if not preempt or victim is None or victim.name in taken:
                return None
            self.preempted_for_room += victim.placeholders > 0
            self.preempt(victim, drop=False)
            if victim is request:
                return None
        new = tuple(tuple(self.pool.take() for _ in range(max(0, more))) for more in wanted)
        for table, blocks in zip(request.tables, new, strict=True):
            table.extend(blocks)
        return new

    def _find_prefix(self, request: Request) -> tuple[tuple[int, ...], ...]:
        """Take over what the prefix cache knows of its tokens; at least one is left to compute."""
        sizes = self.setup.block_sizes
        step = math.lcm(*sizes)
        longest = 0
        found: list[list[int]] = [[] for _ in sizes]
        while longest + step < len(request.tokens):
            more = [
                [
                    self.pool.find(self._key(request, group, index))
                    for index in range(longest // size, (longest + step) // size)
                ]
                for group, size in enumerate(sizes)
            ]
            if any(block is None for blocks in more for block in blocks):
                break
            for known, blocks in zip(found, more, strict=True):
                known.extend(block for block in blocks if block is not None)
            longest += step
        for block in (block for blocks in found for block in blocks):
            self.pool.share(block)
        request.computed, request.tables = longest, [list(blocks) for blocks in found]
        return tuple(map(tuple, found))

    def _leave_prefix(self, request: Request) -> None:
        for table in request.tables:
            self.pool.give_back(reversed(table))
        request.computed, request.tables = 0, [[] for _ in self.setup.block_sizes]

    def _key(self, request: Request, group: int, index: int) -> Key:
        return group, index, hash(tuple(request.tokens[: (index + 1) * self.setup.block_sizes[group]]))

    def _remember(self, request: Request, tokens: int) -> None:
        for group, (size, table) in enumerate(zip(self.setup.block_sizes, request.tables, strict=True)):
            for index in range(tokens // size):
                if self.pool.keys[table[index]] is None:
                    self.pool.remember(table[index], self._key(request, group, index))

    # -- its result ------------------------------------------------------------------------------------

    def update(self, step: int, scheduled: Scheduled, outputs: dict[str, int]) -> list[tuple[Request, int]]:
        """The step was accepted; returns what clients are shown now."""
        shown = []
        for name in sorted(scheduled.samples):
            request = self.requests.get(name)
            if request is None:
                continue
            if request.stale:
                request.stale -= 1
                if request.drops_stale:
                    continue
            else:
                request.placeholders -= 1
            request.tokens.append(outputs[name])
            shown.append((request, outputs[name]))
            self._remember(request, request.computed - request.placeholders)
            if ends(outputs[name]) or len(request.tokens) - request.prompt >= request.outputs_max:
                self.finish(name)
        self.release_deferred(step)
        return shown

    def unanswered(self, scheduled: Scheduled) -> None:
        """A step will never be answered: nor are those of its requests that waited for it to drop the answer."""
        for name in scheduled.samples & self.requests.keys():
            request = self.requests[name]
            request.stale = max(0, request.stale - 1)

    def release_deferred(self, step: int) -> None:
        """What only steps up to this one could still read is free now."""
        due = [blocks for number, blocks in self._deferred if number <= step]
        self._deferred = [(number, blocks) for number, blocks in self._deferred if number > step]
        for blocks in due:
            self.pool.give_back(blocks)

    # -- requests --------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.requests[request.name] = request
        self.waiting.append(request)

    def finish(self, name: str) -> None:
        """It has ended, or its client has left."""
        request = self.requests.pop(name)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._give_up_blocks(request)
        self._finished.add(name)

    def preempt(self, request: Request, *, drop: bool) -> None:
        """It starts over from its tokens when there is room. `drop`: also what is on its way is computed anew."""
        self.running.remove(request)
        request.drops_stale = drop or (request.drops_stale and request.stale > 0)
        request.stale += request.placeholders
        request.placeholders = 0
        self._give_up_blocks(request)
        self.waiting.appendleft(request)

    def recompute(self, names: set[str], *, forget: Collection[int]) -> None:
        """Rung 3: these requests start over; the prefix cache forgets these blocks."""
        for block in forget:
            self.pool.forget(block)
        for request in [request for request in reversed(self.running) if request.name in names]:
            self.preempt(request, drop=True)
        for name in names & self.requests.keys():
            if self.requests[name].stale:
                self.requests[name].drops_stale = True

    def tell_again(self, scheduled: Scheduled) -> None:
        """A step that will not run was to tell the workers who has left."""
        self._finished |= scheduled.increment.finished

    def reset_prefix_cache(self) -> None:
        for block, _ in list(self.pool.cached()):
            self.pool.forget(block)

    def _give_up_blocks(self, request: Request) -> None:
        blocks = [block for table in request.tables for block in reversed(table)]
        request.computed, request.tables = 0, [[] for _ in self.setup.block_sizes]
        if self.in_flight and commit_rule.defers_frees(self.setup.batches).choice:
            self._deferred.append((self.last_sent, blocks))
        else:
            self.pool.give_back(blocks)

    # -- looking ---------------------------------------------------------------------------------------

    def cached(self) -> Iterator[CachedBlock]:
        for block, (group, _, _) in self.pool.cached():
            yield CachedBlock(block=block, group=group, slots=self.setup.block_sizes[group])

    def check(self) -> None:
        """Its own bookkeeping: every block is free, or has as many users as hold it."""
        held = [0] * len(self.pool.users)
        for request in self.requests.values():
            for table in request.tables:
                for block in table:
                    held[block] += 1
        for _, blocks in self._deferred:
            for block in blocks:
                held[block] += 1
        assert held == self.pool.users, "blocks and their users disagree"
        assert all(not self.pool.users[block] for block in self.pool.free)
