"""What the engine core keeps of the shadow: plans what a step mirrors, commits it, compacts, and makes room.

Pure: what it works with (keeper, staged records, block pool) is handed in. Not thread-safe: the owner holds a lock, and
logs what is returned as trouble.

    plan(step) ──▶ pieces ──▶ ranks stage them, each leaves its checksums ──▶ commit(step) ──▶ jobs ──▶ keeper
                                                                                ▲                        │
                                 frames wiped and free again ◀── answer ◀───────┴────────────────────────┘
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ghostserve.shadow.keeper_messages import (
    WIPE_FRAMES_MAX,
    Answer,
    EncodeDone,
    EncodeJob,
    Job,
    ScrubJob,
    WipeDone,
    WipeJob,
)
from ghostserve.shadow.manifest import Manifest, Piece
from ghostserve.shadow.scrub import Check
from ghostserve.shadow.staging_keys import ack_key, random_key
from ghostserve.shadow.step_plan import BlockTables, StepIncrement

CATCH_UP_SPARE = 4  # times a block's mirrors: frames that stay free beside those of a catch-up


class Keeper(Protocol):
    """Who does jobs, in order; each is answered once, through `Protection.answer`."""

    def submit(self, message: Job, /) -> None:
        """Take a job. Never blocks, never raises."""


class StagedRecords(Protocol):
    """What ranks left behind per step; see `arena.staging`."""

    def read(self, rank: int, step: int, epoch: int) -> bytes | None:
        """The record of exactly this key and epoch, None if there is none that is whole."""


class Blocks(Protocol):
    """The scheduler's block pool, as far as the shadow asks."""

    def is_live(self, block: int) -> bool:
        """Whether anything may still read this block: a request, or the prefix cache."""

    def is_cached(self, block: int) -> bool:
        """Whether the prefix cache knows it."""

    def cached_only(self) -> Iterator[int]:
        """Blocks no request uses, the next to be reused first."""


@dataclass(slots=True, kw_only=True)
class Protection:
    """One engine core's. `blocks` is None until there is a scheduler."""

    manifest: Manifest
    tables: BlockTables | None  # None: given up, nothing is planned until `start_again`
    staged: StagedRecords
    keeper: Keeper
    jobs_max: int  # encode jobs in flight
    blocks: Blocks | None = None
    accepted: tuple[int, int] = (0, 0)  # (epoch, step) of the last accepted step
    _next_wipe: int = 1
    _wipes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _held: list[Answer] | None = None
    _leaving: set[int] = field(
        default_factory=set
    )  # blocks of finished requests that a step in flight still uses

    # -- every step ------------------------------------------------------------------------------------

    def plan(self, increment: StepIncrement) -> tuple[Piece, ...]:
        """What the coming step is to mirror."""
        manifest, tables = self.manifest, self.tables
        if tables is None:
            return ()
        leaving, self._leaving = self._leaving, set()
        self._drop_dead([leaving])
        for request_id in increment.finished:
            self._drop_dead(tables.tables.get(request_id, ()))
        writes = tables.apply(increment)
        self._make_room(len(writes))
        pieces = [piece for write in writes if (piece := manifest.plan(write)) is not None]
        pieces.extend(self._catch_up())
        return tuple(pieces)

    def commit(self, *, epoch: int, step: int, pieces: Sequence[Piece]) -> None:
        """A step was accepted: what it mirrored may now be restored."""
        self.accepted = (epoch, step)
        checksums = self._read_checksums(epoch, step, len(pieces))
        if checksums is None:
            self.manifest.miss(pieces)
        else:
            self.manifest.commit(pieces, checksums)
        self.compact()

    def give_up(self) -> None:
        """What a step overwrites is not known: nothing that is mirrored may be believed from now on."""
        self.tables = None
        self.manifest.drop_all()

    def start_again(self) -> bool:
        """No request is open, so that whatever comes is known from its beginning. Whether it had been given up."""
        if self.tables is not None:
            return False
        self.tables = BlockTables(self.manifest.block_sizes)
        self._leaving.clear()
        return True

    def withdraw(self, pieces: Iterable[Piece], blocks: Iterable[int]) -> None:
        """A step will not run: forget what it planned, and the blocks that it was to write, protected or not.

        A block that is left marked as fully written would be caught up from KV that nobody wrote.
        """
        self.manifest.withdraw(pieces)
        for block in blocks:
            self.manifest.drop(block)

    def without_blocks(self, pieces: Iterable[Piece], blocks: Iterable[int]) -> tuple[Piece, ...]:
        """What a step still mirrors that is sent again without what writes `blocks`: those are given up.

        Frames of blocks that were given up since may be another's, so their pieces go, too.
        """
        gone, known = frozenset(blocks), tuple(pieces)
        self.withdraw((piece for piece in known if piece.block in gone), gone)
        return self.manifest.current(piece for piece in known if piece.block not in gone)

    def _read_checksums(self, epoch: int, step: int, pieces: int) -> list[tuple[int, ...]] | None:
        """Per rank, the crc32 of each piece; None if a rank could not stage."""
        checksums = []
        for rank in range(self.manifest.ranks):
            record = self.staged.read(rank, ack_key(step), epoch)
            if record is None or len(record) != 4 * pieces:
                return None
            checksums.append(struct.unpack(f"<{pieces}I", record))
        return checksums

    def _make_room(self, writes: int) -> None:
        """Keep frames ahead of need: blocks that only the prefix cache still wants go first."""
        pool = self.manifest.pool
        needed = self.manifest.ranks * (writes + 2)
        on_the_way = pool.free_count + pool.retired_count
        if on_the_way < needed and self.blocks is not None:
            self.manifest.evict(self.blocks.cached_only(), frames=needed - on_the_way)
            self._wipe()

    def _catch_up(self) -> list[Piece]:
        """At most one block per step that lost its protection gets it back from live KV."""
        manifest = self.manifest
        spare = manifest.pool.free_count - CATCH_UP_SPARE * manifest.ranks
        if spare < manifest.ranks or self.blocks is None:
            return []
        for block in manifest.unprotected:
            if manifest.is_full(block) and self.blocks.is_live(block):
                piece = manifest.plan_catch_up(block)
                return [] if piece is None else [piece]
        return []

    # -- compaction ------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Give the keeper what there is to encode and to wipe."""
        manifest = self.manifest
        while manifest.open_jobs() < self.jobs_max and (job := manifest.next_job()) is not None:
            self.keeper.submit(
                EncodeJob(
                    job=2 * job.job,
                    block=job.block,
                    generation=job.generation,
                    mirrors=job.mirrors,
                    parity=job.parity,
                    nbytes=job.nbytes,
                    checksums=job.checksums,
                )
            )
        self._wipe()

    def _wipe(self) -> None:
        """Ask for the retired frames to be wiped; they come back free."""
        frames = self.manifest.take_retired()
        for first in range(0, len(frames), WIPE_FRAMES_MAX):
            job, self._next_wipe = 2 * self._next_wipe + 1, self._next_wipe + 1
            self._wipes[job] = frames[first : first + WIPE_FRAMES_MAX]
            self.keeper.submit(WipeJob(job=job, frames=self._wipes[job]))

    def scrub(self, checks: Iterable[Check]) -> int:
        """Have the keeper compare frames with their checksums, as its ScrubDone will tell; the job's number."""
        known = tuple(checks)
        job, self._next_wipe = 2 * self._next_wipe + 1, self._next_wipe + 1
        self.keeper.submit(
            ScrubJob(
                job=job,
                frames=tuple(frame for check in known for frame in check.frames),
                nbytes=tuple(check.nbytes for check in known for _ in check.frames),
                checksums=tuple(checksum for check in known for checksum in check.checksums),
            )
        )
        return job

    def hold(self) -> None:
        """Blocks are being restored: the keeper's answers wait, they would free mirrors that are being read."""
        self._held = []

    def release(self) -> list[str]:
        """The restore is over. Returns the trouble that the answers meanwhile told of."""
        answers, self._held = self._held, None
        return [trouble for answer in answers or () if (trouble := self.answer(answer)) is not None]

    def answer(self, answer: Answer) -> str | None:
        """The keeper is done with a job. Returns what went wrong, in words; None: nothing."""
        if self._held is not None:
            self._held.append(answer)
            return None
        trouble = None
        if isinstance(answer, WipeDone):
            frames = self._wipes.pop(answer.job, ())
            if answer.ok:
                self.manifest.pool.release(frames)
            else:  # they may still hold users' text: never reused unwiped
                trouble = f"{len(frames)} frames could not be wiped and are withheld: {answer.reason}"
        elif isinstance(answer, EncodeDone):
            self.manifest.job_done(answer.job // 2, ok=answer.ok, parity_checksums=answer.parity_checksums)
            if not answer.ok:
                trouble = f"the keeper refused a stripe: {answer.reason}"
        self.compact()
        return trouble

    # -- what is alive ---------------------------------------------------------------------------------

    def _drop_dead(self, table: Iterable[Iterable[int]]) -> None:
        if self.blocks is None:
            return
        manifest = self.manifest
        for blocks in table:
            for block in blocks:
                if block not in manifest.entries and block not in manifest.unprotected:
                    continue
                if not self.blocks.is_live(block):
                    manifest.drop(block)
                elif not self.blocks.is_cached(block):
                    self._leaving.add(block)

    def sweep(self) -> None:
        """Give up every block that nothing may read any more; for idle time."""
        if self.blocks is None or self._held is not None:
            return
        for block in [*self.manifest.entries, *self.manifest.unprotected]:
            if not self.blocks.is_live(block):
                self.manifest.drop(block)
        self.compact()

    # -- looking ---------------------------------------------------------------------------------------

    def random_records(self, prefer: Iterable[int]) -> list[bytes]:
        """The random states after the last accepted step, of the ranks that left them; they should be equal."""
        epoch, step = self.accepted
        records = (self.staged.read(rank, random_key(step), epoch) for rank in prefer)
        return [record for record in records if record is not None]

    def check(self) -> None:
        """Invariants, for tests and for idle time."""
        self.manifest.check()
        pool = self.manifest.pool
        wiping = sum(map(len, self._wipes.values()))
        assert wiping <= pool.retired_count, f"{wiping} frames being wiped, {pool.retired_count} retired"
