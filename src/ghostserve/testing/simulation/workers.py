"""The ranks: KV memory, message queue, the product's step gate, and staging into the arena.

A step on a rank, one stage at a time, so that anything can happen between two of them:

    queued ──gate──▶ BEGUN ──all ranks have begun──▶ computed ──mirrors, checksums──▶ STAGED ──▶ DONE, reply
                       │
                       └── a peer is gone, or it raises: what it wrote so far is torn; PEER_LEFT or FAILED

The collectives of a step keep the ranks together, so what all of them compute is computed once, when the last has come.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from ghostserve.arena.control import ControlPage, StampStatus
from ghostserve.arena.staging import StagingArea
from ghostserve.shadow.commit_rule import StepGate
from ghostserve.shadow.log_progress import LogProgress
from ghostserve.shadow.manifest import Piece
from ghostserve.shadow.staging_keys import ack_key, random_key
from ghostserve.shadow.step_plan import BlockTables, Write
from ghostserve.testing.simulation.contents import SLOT_BYTES, next_token, parts
from ghostserve.testing.simulation.memory import GARBAGE
from ghostserve.testing.simulation.scheduler import Scheduled
from ghostserve.testing.simulation.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A step, as a rank gets it."""

    epoch: int
    step: int
    scheduled: Scheduled
    pieces: tuple[Piece, ...]


class Stage(Enum):
    """How far a rank is with the first message of its queue."""

    QUEUED = "queued"
    BEGUN = "begun"
    COMPUTED = "computed"
    STAGED = "staged"


@dataclass(slots=True)
class WorkerState:
    """What the workers know of requests; equal on all ranks, or at the engine core as of the last accepted step."""

    tables: BlockTables
    tokens: dict[str, list[int]] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)
    random: int = 1  # stands for the random-number states

    def copy(self) -> WorkerState:
        return WorkerState(
            tables=BlockTables(self.tables.block_sizes, self.copied_tables()),
            tokens={name: list(tokens) for name, tokens in self.tokens.items()},
            reached=dict(self.reached),
            random=self.random,
        )

    def copied_tables(self) -> dict[str, list[list[int]]]:
        return {name: [list(ids) for ids in table] for name, table in self.tables.tables.items()}

    def advance(self, scheduled: Scheduled) -> list[Write]:
        """Take on a step, but for what it samples; the slots it writes."""
        increment = scheduled.increment
        for name in increment.finished:
            self.tokens.pop(name, None)
            self.reached.pop(name, None)
        for name, tokens in scheduled.tokens.items():
            self.tokens[name] = list(tokens)
        writes = self.tables.apply(increment)
        for request in increment.requests:
            self.reached[request.request_id] = request.computed + request.scheduled
        self.random = zlib.crc32(struct.pack("<II", self.random, len(scheduled.samples)))
        return writes

    def sampled(self, outputs: dict[str, int]) -> None:
        for name, token in outputs.items():
            self.tokens[name].append(token)


@dataclass(slots=True, eq=False)
class Rank:
    """One process. A replacement is another object."""

    index: int
    kv: bytearray
    alive: bool = True
    hung: bool = False
    hung_alone: bool = False  # not in a collective, so that its peers wait for it
    stopped: bool = (
        False  # hung by a signal, as anybody can see; otherwise it spins, and only its silence tells
    )
    met: int = 0  # collectives begun since the groups were formed
    slow: int = 0  # of so many chances to go on it takes one
    gate: StepGate = field(default_factory=StepGate)
    progress: LogProgress = field(default_factory=LogProgress)
    queue: deque[Message] = field(default_factory=deque)
    stage: Stage = Stage.QUEUED
    raises: int = 0  # so many of the next steps
    fails_to_stage: int = 0  # so many of the next steps
    finished: set[tuple[int, int]] = field(
        default_factory=set
    )  # (epoch, step): what is true, whatever it stamped

    def dies(self) -> None:
        self.alive = False
        self.queue.clear()


@dataclass(slots=True)
class Workers:
    """All ranks, and what their collectives compute."""

    setup: Setup
    page: ControlPage
    staging: StagingArea
    pool: memoryview
    rng: random.Random
    state: WorkerState = field(init=False)
    ranks: list[Rank] = field(init=False)
    outputs: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict)  # (epoch, step) -> sampled
    randoms: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  # (epoch, step) computed -> states after it
    poisoned: int = 0  # a step that raises wherever it is run
    steps_run: int = 0
    seeds: dict[str, int] = field(default_factory=dict)  # of requests

    def __post_init__(self) -> None:
        self.state = WorkerState(tables=BlockTables(self.setup.block_sizes))
        self.ranks = [self.new_rank(index) for index in range(self.setup.ranks)]

    def new_rank(self, index: int) -> Rank:
        memory = (self.setup.blocks + 1) * self.setup.block_bytes
        return Rank(index=index, kv=bytearray([GARBAGE]) * memory)

    def send(self, message: Message) -> None:
        for rank in self.ranks:
            if rank.alive:
                rank.queue.append(message)

    # -- going on --------------------------------------------------------------------------------------

    def advance(self, rank: Rank, now_s: float) -> bool:
        """One stage more, if it can; whether it could."""
        if not rank.alive or rank.hung or not rank.queue:
            return False
        message = rank.queue[0]
        match rank.stage:
            case Stage.QUEUED:
                return self._begin(rank, message, now_s)
            case Stage.BEGUN:
                return self._meet(rank, message, now_s)
            case Stage.COMPUTED:
                self._stage(rank, message)
                self._stamp(rank, message, StampStatus.STAGED, now_s)
                rank.stage = Stage.STAGED
            case Stage.STAGED:
                record = struct.pack("<I", self.randoms[message.epoch, message.step])
                self.staging.write(rank.index, random_key(message.step), message.epoch, record)
                self._stamp(rank, message, StampStatus.DONE, now_s)
                rank.finished.add((message.epoch, message.step))
                rank.queue.popleft()
                rank.stage = Stage.QUEUED
        return True

    def _begin(self, rank: Rank, message: Message, now_s: float) -> bool:
        if rank.gate.refusal(epoch=message.epoch) is not None:
            rank.queue.popleft()
            return True
        self._stamp(rank, message, StampStatus.BEGUN, now_s)
        if rank.raises or message.step == self.poisoned:
            rank.raises = max(0, rank.raises - 1)
            self._fail(rank, message, StampStatus.FAILED, now_s)
            return True
        rank.stage = Stage.BEGUN
        rank.met += 1
        return True

    def _meet(self, rank: Rank, message: Message, now_s: float) -> bool:
        """In the step's collectives: all go on, or a peer is gone, or it waits."""
        identity = (message.epoch, message.step)
        if message.epoch != self.page.epoch:  # it should not run at all: its peers are elsewhere
            self._tear(rank, message)
            self.randoms.setdefault(identity, 0)
            rank.stage = Stage.COMPUTED
            return True
        if not message.scheduled.increment.requests and identity not in self.randoms:
            self._compute(message)  # nothing to run: no collective either
        if identity in self.randoms:
            rank.stage = Stage.COMPUTED
            return True
        if any(not peer.alive or peer.gate.failed_at is not None for peer in self.ranks):
            self._fail(rank, message, StampStatus.PEER_LEFT, now_s)
            return True
        if not all(
            peer.stage is Stage.BEGUN and (peer.queue[0].epoch, peer.queue[0].step) == identity
            for peer in self.ranks
        ):
            return False
        self._compute(message)
        rank.stage = Stage.COMPUTED
        return True

    def _fail(self, rank: Rank, message: Message, status: StampStatus, now_s: float) -> None:
        self._tear(rank, message)
        rank.gate.failed(epoch=message.epoch, step=message.step)
        self._stamp(rank, message, status, now_s)
        rank.queue.popleft()
        rank.stage = Stage.QUEUED

    def _tear(self, rank: Rank, message: Message) -> None:
        """Some of what the step writes is there, in part: some layers have run."""
        tables = BlockTables(self.setup.block_sizes, self.state.copied_tables())
        ranges: list[tuple[int, int, int]]
        try:
            writes = tables.apply(message.scheduled.increment)
            ranges = [(w.block, 0 if w.whole else w.start, w.stop) for w in writes]
        except (KeyError, IndexError):  # a step of another epoch: its requests are not known any more
            ranges = [(piece.block, piece.start, piece.stop) for piece in message.pieces]
        for block, first, last in ranges:
            if self.rng.random() < 0.5:
                start, stop = (self._at(block) + slot * SLOT_BYTES for slot in (first, last))
                rank.kv[start:stop] = self.rng.randbytes(stop - start)

    # -- the model -------------------------------------------------------------------------------------

    def _compute(self, message: Message) -> None:
        """Every rank's KV of the step, and what is sampled: from the KV that is really there."""
        setup, ranks, state = self.setup, self.ranks, self.state
        sizes, count = setup.block_sizes, setup.ranks
        state.advance(message.scheduled)
        for block in message.scheduled.increment.zeroed_blocks:
            at = self._at(block)
            for rank in ranks:
                rank.kv[at : at + setup.block_bytes] = bytes(setup.block_bytes)
        outputs: dict[str, int] = {}
        for request in message.scheduled.increment.requests:
            name = request.request_id
            tables, tokens = state.tables.tables[name], state.tokens[name]
            chain = self._read(tables, request.computed)
            for position in range(request.computed, request.computed + request.scheduled):
                data = parts(tokens[position], chain)
                for group, size in enumerate(sizes):
                    at = self._at(tables[group][position // size]) + position % size * SLOT_BYTES
                    for rank in ranks:
                        part = group * count + rank.index
                        piece = data[part * SLOT_BYTES : (part + 1) * SLOT_BYTES]
                        rank.kv[at : at + SLOT_BYTES] = piece
                        chain[part] = zlib.crc32(piece, chain[part])
            if name in message.scheduled.samples:
                outputs[name] = next_token(chain, self.seeds[name])
        state.sampled(outputs)
        self.outputs[message.epoch, message.step] = outputs
        self.randoms[message.epoch, message.step] = state.random
        self.steps_run += 1

    def _read(self, tables: list[list[int]], computed: int) -> list[int]:
        """The checksum of all KV of a request's first tokens, by part."""
        chain = []
        for size, table in zip(self.setup.block_sizes, tables, strict=True):
            spans = []
            for index in range(-(-computed // size)):
                at = self._at(table[index])
                spans.append((at, at + min(size, computed - index * size) * SLOT_BYTES))
            for rank in self.ranks:
                checksum, kv = 0, rank.kv
                for start, stop in spans:
                    checksum = zlib.crc32(kv[start:stop], checksum)
                chain.append(checksum)
        return chain

    # -- the arena -------------------------------------------------------------------------------------

    def _stage(self, rank: Rank, message: Message) -> None:
        if rank.fails_to_stage:
            rank.fails_to_stage -= 1
            return
        checksums = [self._stage_piece(rank, piece) for piece in message.pieces]
        record = struct.pack(f"<{len(checksums)}I", *checksums)
        self.staging.write(rank.index, ack_key(message.step), message.epoch, record)

    def _stage_piece(self, rank: Rank, piece: Piece) -> int:
        frame = piece.frames[rank.index]
        start, checksum = rank.progress.begin(frame, piece.start)
        first, last = start * SLOT_BYTES, piece.stop * SLOT_BYTES
        at = self._at(piece.block)
        data = rank.kv[at + first : at + last]
        to = frame * self.setup.block_bytes
        self.pool[to + first : to + last] = data
        checksum = zlib.crc32(data, checksum)
        rank.progress.logged(frame, start=start, stop=piece.stop, checksum=checksum)
        return checksum

    def tear_staging(self, rank: Rank) -> None:
        """The rank dies while it stages: some pieces are whole, the next one in part, the record is torn."""
        message = rank.queue[0]
        done = self.rng.randint(0, len(message.pieces))
        for piece in message.pieces[:done]:
            self._stage_piece(rank, piece)
        if done < len(message.pieces):
            piece = message.pieces[done]
            first = piece.frames[rank.index] * self.setup.block_bytes + piece.start * SLOT_BYTES
            count = self.rng.randint(0, (piece.stop - piece.start) * SLOT_BYTES)
            self.pool[first : first + count] = self.rng.randbytes(count)
        else:
            record = self.rng.randbytes(4 * len(message.pieces))
            self.staging.write(rank.index, ack_key(message.step), message.epoch, record)
            self.staging._view[self.staging._offset(rank.index, ack_key(message.step)) + 24] ^= 1

    def _stamp(self, rank: Rank, message: Message, status: StampStatus, now_s: float) -> None:
        self.page.stamp(rank.index, epoch=message.epoch, step=message.step, status=status, now_s=now_s)

    def _at(self, block: int) -> int:
        return block * self.setup.block_bytes
