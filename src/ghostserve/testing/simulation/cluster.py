"""The engine core of a simulated cluster: sends steps, accepts them, and knows what should be true.

Everything it decides is asked of the product: `Protection` (shadow/protection.py), the commit rule and the gate
(shadow/commit_rule.py). What is true is kept beside it: `held`, what accepted steps wrote into each block.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage
from ghostserve.arena.frames import FramePool
from ghostserve.arena.staging import StagingArea
from ghostserve.shadow import commit_rule
from ghostserve.shadow.keeper_messages import Answer, EncodeJob, Job
from ghostserve.shadow.manifest import Manifest, Piece
from ghostserve.shadow.protection import Protection
from ghostserve.shadow.step_plan import BlockTables, Write
from ghostserve.testing.simulation.contents import SLOT_BYTES, VOCABULARY, Truth
from ghostserve.testing.simulation.keeper import SimulatedKeeper
from ghostserve.testing.simulation.memory import PlainSegment
from ghostserve.testing.simulation.scheduler import Name, Request, Scheduled, Scheduler
from ghostserve.testing.simulation.setup import OUTPUT_TOKENS_MAX, PROMPT_TOKENS_MAX, Setup
from ghostserve.testing.simulation.workers import Message, Rank, Workers, WorkerState
from ghostserve.types import STEPS_IN_FLIGHT_MAX

OUTPUT_RANK = 0  # whose reply the engine core waits for
RECORD_BYTES = 256


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """What a block holds on every rank: slots from position `first` of a request's tokens."""

    truth: Truth
    group: int
    first: int
    slots: int


@dataclass(slots=True, kw_only=True, eq=False)
class OpenStep:
    """A step that was sent and is not accepted; `sent` is less than `scheduled` after rung 3."""

    step: int
    scheduled: Scheduled
    sent: Scheduled
    pieces: tuple[Piece, ...]
    sent_s: float


@dataclass(slots=True)
class Cluster:
    """One server. What happens to it, and when, is decided elsewhere."""

    setup: Setup
    rng: random.Random
    now_s: float = 100.0
    epoch: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    open_steps: list[OpenStep] = field(default_factory=list)
    held: dict[int, Held] = field(default_factory=dict)
    shown: dict[str, list[int]] = field(default_factory=dict)
    truths: dict[str, Truth] = field(default_factory=dict)
    corrupted: set[int] = field(default_factory=set)  # frames with a flipped byte
    log: list[str] | None = None
    page: ControlPage = field(init=False)
    pool: PlainSegment = field(init=False)
    scheduler: Scheduler = field(init=False)
    workers: Workers = field(init=False)
    keeper: SimulatedKeeper = field(init=False)
    protection: Protection = field(init=False)
    view: WorkerState = field(init=False)  # as of the last accepted step
    _step: int = 0
    _messages: deque[Message] = field(default_factory=lambda: deque(maxlen=4))
    _prompts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.setup
        control = PlainSegment(CONTROL_BYTES)
        ControlPage.format(control)
        self.page = ControlPage(control, lane=LANE_ENGINE)
        self.pool = PlainSegment(setup.reserve.stop * setup.block_bytes)
        shape = {"ranks": setup.ranks, "ring": 2 * (STEPS_IN_FLIGHT_MAX + 1), "record_bytes": RECORD_BYTES}
        staging = StagingArea(PlainSegment(StagingArea.required_bytes(**shape)), **shape)
        self.scheduler = Scheduler(setup)
        self.workers = Workers(setup, self.page, staging, self.pool.array.data, self.rng)
        self.keeper = SimulatedKeeper(setup, self.pool, self.page, self.rng, self._on_answer)
        self.protection = Protection(
            manifest=Manifest(
                ranks=setup.ranks,
                parity_shards=setup.parity_shards,
                block_sizes=setup.block_sizes,
                slot_bytes=(SLOT_BYTES,) * len(setup.block_sizes),
                pool=FramePool(setup.frames),
                compact=setup.compact,
            ),
            tables=BlockTables(setup.block_sizes),
            staged=staging,
            keeper=self.keeper,
            jobs_max=setup.jobs_max,
            blocks=self.scheduler.pool,
        )
        self.view = self.workers.state.copy()
        self._prompts = [
            [self.rng.randrange(1, VOCABULARY) for _ in range(self.rng.randint(6, PROMPT_TOKENS_MAX - 4))]
            for _ in range(setup.shared_prompts)
        ]

    def note(self, text: str) -> None:
        """A line of the trace."""
        if self.log is not None:
            self.log.append(f"{self.now_s:9.3f} epoch {self.epoch}: {text}")

    # -- requests --------------------------------------------------------------------------------------

    def arrives(self) -> Request:
        """A request, often with a prompt that others share."""
        number = self.counts["requests"]
        self.counts["requests"] += 1
        name = Name(f"r{number}")
        shared = list(self.rng.choice(self._prompts))
        prompt = shared[: self.rng.randint(2, len(shared))]
        prompt += [self.rng.randrange(1, VOCABULARY) for _ in range(self.rng.randint(0, 4))]
        seed = self.rng.randrange(1 << 16)
        truth = Truth(tokens=list(prompt), seed=seed, parts=self.setup.parts)
        request = Request(
            name=name,
            prompt=len(prompt),
            outputs_max=self.rng.randint(2, OUTPUT_TOKENS_MAX),
            truth=truth,
            tokens=prompt,
            tables=[[] for _ in self.setup.block_sizes],
        )
        self.workers.seeds[name] = seed
        self.truths[name], self.shown[name] = truth, []
        self.scheduler.add(request)
        self.note(f"{name} arrives, {request.prompt} tokens, {request.outputs_max} wanted")
        return request

    def leaves(self) -> None:
        """A client goes away."""
        if self.scheduler.requests:
            name = self.rng.choice(sorted(self.scheduler.requests))
            self.scheduler.finish(name)
            self.counts["aborts"] += 1
            self.note(f"the client of {name} leaves")

    def preempts(self) -> None:
        """The scheduler takes a running request's blocks."""
        if self.scheduler.running:
            request = self.rng.choice(self.scheduler.running)
            self.scheduler.preempt(request, drop=self.rng.random() < 0.5)
            self.counts["preemptions"] += 1
            self.note(f"{request.name} is preempted")

    # -- steps -----------------------------------------------------------------------------------------

    @property
    def may_send(self) -> bool:
        return len(self.open_steps) < self.setup.batches

    def sends(self) -> bool:
        """Schedule a step, plan its protection, send it; whether there was anything to do."""
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return False
        self._step += 1
        pieces = self.protection.plan(scheduled.increment)
        step = OpenStep(
            step=self._step, scheduled=scheduled, sent=scheduled, pieces=pieces, sent_s=self.now_s
        )
        self.open_steps.append(step)
        self.scheduler.last_sent, self.scheduler.in_flight = self._step, len(self.open_steps)
        self.send(step)
        self.counts["steps"] += 1
        if len(self.open_steps) > 1:
            self.counts["steps sent before the last was accepted"] += 1
        if self.log is not None:
            names = [f"{r.request_id}+{r.scheduled}" for r in scheduled.increment.requests]
            self.note(
                f"step {self._step}: {' '.join(names)}; mirrors {[(p.block, p.start, p.stop) for p in pieces]}"
            )
        return True

    def send(self, step: OpenStep) -> None:
        message = Message(epoch=self.epoch, step=step.step, scheduled=step.sent, pieces=step.pieces)
        self._messages.append(message)
        self.workers.send(message)

    def sent_before(self, epoch: int) -> list[Message]:
        """The last steps that were sent in an older epoch."""
        return [message for message in self._messages if message.epoch < epoch]

    def fail(self, failing: set[str]) -> None:
        """No step in flight will run: the oldest one's requests end with an error."""
        for name in failing & self.scheduler.requests.keys():
            self.scheduler.finish(name)
        for step in self.open_steps:
            self.scheduler.unanswered(step.scheduled)
        last, self._step = self.open_steps[-1].step, self.open_steps[0].step - 1
        self.open_steps.clear()
        self.scheduler.in_flight, self.workers.poisoned = 0, 0
        self.scheduler.release_deferred(last)
        self.counts["steps given up"] += 1
        self.counts["requests failed"] += len(failing)

    def accepts(self) -> OpenStep | None:
        """Accept the oldest step, if its reply and all stamps are here; which that was."""
        if not self.open_steps:
            return None
        step, ranks = self.open_steps[0], self.workers.ranks
        identity = (self.epoch, step.step)
        if identity not in ranks[OUTPUT_RANK].finished:
            return None  # no reply
        if not ranks[OUTPUT_RANK].alive and self.rng.random() < 0.5:
            return None  # it was lost with the rank
        waiting = commit_rule.first_unfinished(
            self.page.read_stamp, range(self.setup.ranks), epoch=self.epoch, step=step.step
        )
        if waiting is not None:
            return None
        for rank in ranks:
            if identity not in rank.finished:
                raise Violation(f"step {step.step} is accepted, rank {rank.index} has not finished it")
        outputs = self.workers.outputs.pop(identity)
        del self.open_steps[0]
        self._holds(self.view.advance(step.sent))
        self.view.sampled(outputs)
        self.protection.commit(epoch=self.epoch, step=step.step, pieces=step.pieces)
        self.scheduler.in_flight = len(self.open_steps)
        for request, token in self.scheduler.update(step.step, step.scheduled, outputs):
            self._show(request.name, token)
        self.counts["steps accepted"] += 1
        self.note(f"step {step.step} is accepted")
        return step

    def _show(self, name: str, token: int) -> None:
        shown, truth = self.shown[name], self.truths[name]
        shown.append(token)
        expected = truth.token(truth.prompt + len(shown) - 1)
        if token != expected:
            raise Violation(
                f"{name} is shown {token} as token {len(shown)}; without failures it is {expected}"
            )

    def _holds(self, writes: list[Write]) -> None:
        """What the step wrote is what its blocks hold from now on."""
        for write in writes:
            tables = self.view.tables.tables[write.request_id]
            size = self.setup.block_sizes[write.group]
            index = tables[write.group].index(write.block)
            self.held[write.block] = Held(
                truth=self.truths[write.request_id], group=write.group, first=index * size, slots=write.stop
            )

    # -- the keeper's answers --------------------------------------------------------------------------

    def _on_answer(self, job: Job, answer: Answer) -> None:
        if isinstance(job, EncodeJob):
            self._check_refusal(job, answer)
            self.counts["stripes coded" if answer.ok else "stripes refused"] += 1
        elif answer.ok:
            self.corrupted.difference_update(job.frames)
            self.counts["frames wiped"] += len(job.frames)
        else:
            self.counts["frames withheld"] += len(job.frames)
        self.protection.answer(answer)

    def _check_refusal(self, job: EncodeJob, answer: Answer) -> None:
        """The keeper refuses a stripe only where a byte of it was flipped, or keepers died over it."""
        if answer.ok or self.corrupted & set(job.mirrors) or "keepers were lost" in answer.reason:
            return
        raise Violation(f"the keeper refuses block {job.block}: {answer.reason}, and nothing was corrupted")

    # -- looking ---------------------------------------------------------------------------------------

    def truth_of(self, block: int, rank: int, slots: int) -> bytes:
        """What the first slots of a block must hold on a rank."""
        held = self.held[block]
        return held.truth.kv(held.group * self.setup.ranks + rank, held.first, held.first + slots)

    def frame(self, frame: int, nbytes: int) -> bytes:
        at = frame * self.setup.block_bytes
        return self.pool.array.data[at : at + nbytes].tobytes()

    def rank(self, index: int) -> Rank:
        return self.workers.ranks[index]

    @property
    def hanging(self) -> list[Rank]:
        return [rank for rank in self.workers.ranks if rank.alive and rank.hung]

    def checksum(self) -> int:
        """Stands for the whole state; equal after equal events."""
        state = (self._step, self.epoch, sorted(self.counts.items()), sorted(self.shown.items()))
        return zlib.crc32(repr(state).encode(), zlib.crc32(self.pool.array.data))
