"""The state of every protected block. Pure: no bytes, no time, no process.

    UNPROTECTED ──plan──▶ MIRRORED(k slots) ──full──▶ SEALED ──job──▶ CODING ──done──▶ CODED
         ▲                      │                        │               │                │
         └──────────────────────┴── block id reused, rewritten or given up (generation + 1)┘

An entry's frames are its own until it is dropped; a frame named in an open keeper job, or in a piece of a step that
may still run, is handed back only when the job is answered and the piece committed or withdrawn. `planned` runs ahead
of `slots` by the steps that are not accepted yet: only `slots` may ever be restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ghostserve.arena.frames import FramePool
from ghostserve.shadow.step_plan import Write
from ghostserve.types import Decision


class BlockState(Enum):
    """What the shadow holds of a block."""

    MIRRORED = "mirrored"  # n packed logs, still growing
    SEALED = "sealed"  # n whole packed logs; waits for the keeper
    CODING = "coding"  # named in an open keeper job; mirrors still valid
    CODED = "coded"  # m parity frames; survivors are needed to decode


class Source(Enum):
    """Where a lost rank's block can come from."""

    MIRROR = "mirror"
    PARITY = "parity"
    NOTHING = "nothing"  # nothing was written, nothing is needed
    LOST = "lost"  # cannot be rebuilt: recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One gather: slots [start, stop) of `block` go to byte `start * slot_bytes` of frame `frames[rank]`."""

    block: int
    group: int
    generation: int
    start: int
    stop: int
    frames: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Entry:
    """What is known of one protected block."""

    block: int
    group: int
    generation: int
    mirrors: tuple[int, ...]
    state: BlockState = BlockState.MIRRORED
    planned: int = 0
    slots: int = 0
    checksums: tuple[int, ...] = ()  # crc32 per rank over the first `slots` slots of its packed log
    parity: tuple[int, ...] = ()
    parity_checksums: tuple[int, ...] = ()
    job: int | None = None
    open_pieces: int = 0  # of steps that are not accepted yet
    dropped: bool = False  # given up; its frames may still be written or read
    caught_up: bool = False  # copied from live KV: without its mirrors the block still holds data


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stripe for the keeper to encode."""

    job: int
    block: int
    generation: int
    nbytes: int
    mirrors: tuple[int, ...]
    parity: tuple[int, ...]
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestStatistics:
    """Counts of blocks by state, and of frames by use."""

    tail_blocks: int
    sealed_blocks: int  # sealed or coding: not compacted yet
    coded_blocks: int
    unprotected_blocks: int
    mirror_frames: int
    parity_frames: int
    encode_failures: int
    protected_slots: int  # may be restored
    lag_slots: int  # planned in steps that are not accepted yet
    unprotected_slots: int  # written to blocks without an entry


@dataclass(slots=True, kw_only=True)
class Manifest:
    """All entries, keyed by block id. Not thread-safe: the owner holds a lock."""

    ranks: int
    parity_shards: int
    block_sizes: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    pool: FramePool
    compact: bool = True  # False in replica mode: mirrors are kept
    entries: dict[int, Entry] = field(default_factory=dict)
    unprotected: dict[int, tuple[int, int]] = field(default_factory=dict)  # block -> (group, slots written)
    _generations: dict[int, int] = field(default_factory=dict)
    _jobs: dict[int, Entry] = field(default_factory=dict)
    _dropped: dict[tuple[int, int], Entry] = field(
        default_factory=dict
    )  # (block, generation) with open pieces
    _sealed: dict[int, None] = field(default_factory=dict)  # insertion-ordered set of block ids
    _next_job: int = 1
    _to_wipe: list[int] = field(default_factory=list)
    encode_failures: int = 0

    # -- planning a step -------------------------------------------------------------------------------

    def plan(self, write: Write) -> Piece | None:
        """Frames for one write; None if the block stays or becomes unprotected."""
        entry = self.entries.get(write.block)
        extends = entry is not None and entry.state is BlockState.MIRRORED and entry.planned == write.start
        if extends and not write.whole and write.start > 0:
            assert entry is not None
            return self._piece(entry, write.start, write.stop)
        if write.start > 0 and not write.whole and entry is None:
            # A gap: earlier slots were never mirrored. Only a catch-up of the whole block can close it.
            self._mark_unprotected(write.block, write.group, write.stop)
            return None
        # A new generation: first write of a reused block, or a rewrite of what was already covered.
        self.drop(write.block)
        entry = self._allocate(write.block, write.group)
        if entry is None:
            self._generations[write.block] = (
                self._generations.get(write.block, 0) + 1
            )  # another's from here on
            self._mark_unprotected(write.block, write.group, write.stop)
            return None
        return self._piece(entry, 0, write.stop)

    def plan_catch_up(self, block: int) -> Piece | None:
        """Mirror a fully written, unprotected block from live KV inside the coming step."""
        group, _ = self.unprotected[block]
        assert self.is_full(block), f"block {block} is still being written"
        entry = self._allocate(block, group)
        if entry is None:
            return None
        entry.caught_up = True
        return self._piece(entry, 0, self.block_sizes[group])

    def commit(self, pieces: Sequence[Piece], checksums: Sequence[Sequence[int]]) -> None:
        """The step is accepted: `checksums[rank][i]` covers the log of `pieces[i]` up to its `stop`."""
        for index, piece in enumerate(pieces):
            entry = self._close_piece(piece)
            if entry is None:  # given up between plan and commit
                if piece.block in self.unprotected and self._generations[piece.block] == piece.generation:
                    self._mark_unprotected(piece.block, piece.group, piece.stop)
                continue
            entry.slots = piece.stop
            entry.checksums = tuple(of_rank[index] for of_rank in checksums)
            if entry.slots == self.block_sizes[entry.group]:
                entry.state = BlockState.SEALED
                self._sealed[entry.block] = None

    def miss(self, pieces: Iterable[Piece]) -> None:
        """The step was accepted but these were not mirrored: a gap, until a catch-up of the whole block."""
        for piece in pieces:
            if self._close_piece(piece) is not None:
                self.drop(piece.block)
                self._mark_unprotected(piece.block, piece.group, piece.stop)

    def withdraw(self, pieces: Iterable[Piece]) -> None:
        """The step will not run with these pieces: forget what it planned."""
        for piece in pieces:
            entry = self._close_piece(piece)
            if entry is None:
                continue
            if piece.start == 0:
                self.drop(piece.block)
                if entry.caught_up:
                    self._mark_unprotected(entry.block, entry.group, piece.stop)
            else:
                entry.planned = min(entry.planned, piece.start)

    def current(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        """Those whose block was not given up since they were planned. The others must not be run any more."""
        kept = []
        for piece in pieces:
            if self._entry_of(piece) is not None:
                kept.append(piece)
            else:
                self._close_piece(piece)
        return tuple(kept)

    def _entry_of(self, piece: Piece) -> Entry | None:
        """The entry that a piece was planned for, None if it was given up."""
        entry = self.entries.get(piece.block)
        return entry if entry is not None and entry.generation == piece.generation else None

    def _close_piece(self, piece: Piece) -> Entry | None:
        """A piece's step has run, or never will. Its entry, None if that was given up meanwhile."""
        entry = self._entry_of(piece)
        if entry is not None:
            entry.open_pieces -= 1
            return entry
        dropped = self._dropped.get((piece.block, piece.generation))
        if dropped is not None:
            dropped.open_pieces -= 1
            self._retire_if_unused(dropped)
        return None

    # -- compaction ------------------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """The oldest sealed block, with parity frames allocated; None if there is none or no room."""
        if not self.compact:
            return None
        for block in self._sealed:
            entry = self.entries[block]
            parity = self.pool.allocate(self.parity_shards)
            if parity is None:
                return None
            del self._sealed[block]
            entry.state, entry.parity, entry.job = BlockState.CODING, parity, self._next_job
            self._jobs[self._next_job] = entry
            self._next_job += 1
            return Job(
                job=entry.job,
                block=entry.block,
                generation=entry.generation,
                nbytes=self.block_sizes[entry.group] * self.slot_bytes[entry.group],
                mirrors=entry.mirrors,
                parity=parity,
                checksums=entry.checksums,
            )
        return None

    def job_done(self, job: int, *, ok: bool, parity_checksums: Sequence[int]) -> None:
        """The keeper answered. A refusal means that a mirror failed its checksum: the block is given up."""
        entry = self._jobs.pop(job, None)
        if entry is None:
            return
        entry.job = None
        if entry.dropped:
            self._retire_if_unused(entry)
        elif not ok:
            self.encode_failures += 1
            self.drop(entry.block)
            self._mark_unprotected(entry.block, entry.group, self.block_sizes[entry.group])
        else:
            self._retire_frames(entry.mirrors)
            entry.mirrors = ()
            entry.parity_checksums = tuple(parity_checksums)
            entry.state = BlockState.CODED

    # -- giving up -------------------------------------------------------------------------------------

    def drop(self, block: int) -> None:
        """Forget a block: its id was reused, rewritten, or holds nothing any more."""
        self.unprotected.pop(block, None)
        entry = self.entries.pop(block, None)
        if entry is None:
            return
        self._sealed.pop(block, None)
        entry.dropped = True
        self._dropped[block, entry.generation] = entry
        self._retire_if_unused(entry)

    def drop_all(self) -> None:
        """Forget everything: what was written is not known any more, so no block may be believed."""
        for block in [*self.entries, *self.unprotected]:
            self.drop(block)

    def evict(self, victims: Iterator[int], *, frames: int) -> int:
        """Give up the least valuable blocks until `frames` frames are on their way back; returns how many."""
        freed = 0
        for block in victims:
            if freed >= frames:
                break
            entry = self.entries.get(block)
            if entry is None or entry.job is not None or entry.open_pieces:
                continue
            freed += len(entry.mirrors) + len(entry.parity)
            self.drop(block)
            self._mark_unprotected(block, entry.group, entry.slots)
        return freed

    def take_retired(self) -> tuple[int, ...]:
        """Frames to be wiped, each told once; `pool.release` them when they are."""
        frames, self._to_wipe = tuple(self._to_wipe), []
        return frames

    # -- restoring -------------------------------------------------------------------------------------

    def source(self, block: int, *, needed: int, lost: frozenset[int]) -> Decision[Source]:
        """Where the first `needed` slots of a block of the lost ranks can come from."""
        if needed == 0:
            return Decision(choice=Source.NOTHING, reason="no slot was written")
        entry = self.entries.get(block)
        if entry is None:
            return Decision(choice=Source.LOST, reason=f"block {block} is unprotected")
        if entry.slots < needed:
            return Decision(
                choice=Source.LOST, reason=f"block {block}: {entry.slots} of {needed} slots mirrored"
            )
        if entry.state is not BlockState.CODED:
            return Decision(choice=Source.MIRROR, reason=f"block {block} is {entry.state.value}")
        if len(lost) > self.parity_shards:
            return Decision(
                choice=Source.LOST,
                reason=f"block {block}: {len(lost)} ranks lost, {self.parity_shards} parity shards",
            )
        return Decision(choice=Source.PARITY, reason=f"block {block} is coded")

    # -- looking ---------------------------------------------------------------------------------------

    def open_jobs(self) -> int:
        return len(self._jobs)

    def is_full(self, block: int) -> bool:
        """Whether an unprotected block is fully written: then it can be caught up."""
        group, written = self.unprotected[block]
        return written == self.block_sizes[group]

    def statistics(self) -> ManifestStatistics:
        states = [entry.state for entry in self.entries.values()]
        return ManifestStatistics(
            tail_blocks=states.count(BlockState.MIRRORED),
            sealed_blocks=states.count(BlockState.SEALED) + states.count(BlockState.CODING),
            coded_blocks=states.count(BlockState.CODED),
            unprotected_blocks=len(self.unprotected),
            mirror_frames=sum(len(entry.mirrors) for entry in self.entries.values()),
            parity_frames=sum(len(entry.parity) for entry in self.entries.values()),
            encode_failures=self.encode_failures,
            protected_slots=sum(entry.slots for entry in self.entries.values()),
            lag_slots=sum(entry.planned - entry.slots for entry in self.entries.values()),
            unprotected_slots=sum(written for _, written in self.unprotected.values()),
        )

    def check(self) -> None:
        """Invariants, for tests and for idle time."""
        self.pool.check()
        seen: set[int] = set()
        for entry in [*self.entries.values(), *self._dropped.values()]:
            frames = set(entry.mirrors) | set(entry.parity)
            assert not frames & seen, f"block {entry.block} shares frames {sorted(frames & seen)}"
            seen |= frames
            assert entry.slots <= entry.planned <= self.block_sizes[entry.group], entry
            assert entry.open_pieces > 0 if entry.slots < entry.planned else entry.open_pieces >= 0, entry
            assert (entry.state is BlockState.CODED) == (not entry.mirrors), entry
            assert (entry.job is not None) == (entry.state is BlockState.CODING), entry
        assert len(seen) == self.pool.used_count, f"{self.pool.used_count} frames in use, {len(seen)} known"
        assert not self.entries.keys() & self.unprotected.keys()

    # -- private ---------------------------------------------------------------------------------------

    def _allocate(self, block: int, group: int) -> Entry | None:
        # Room for one parity stays free: a pool full of mirrors could never be compacted again.
        reserve = self.parity_shards if self.compact else 0
        frames = self.pool.allocate(self.ranks) if self.pool.free_count >= self.ranks + reserve else None
        if frames is None:
            return None
        generation = self._generations[block] = self._generations.get(block, 0) + 1
        self.unprotected.pop(block, None)
        entry = Entry(block=block, group=group, generation=generation, mirrors=frames)
        self.entries[block] = entry
        return entry

    def _piece(self, entry: Entry, start: int, stop: int) -> Piece:
        entry.planned = stop
        entry.open_pieces += 1
        return Piece(
            block=entry.block,
            group=entry.group,
            generation=entry.generation,
            start=start,
            stop=stop,
            frames=entry.mirrors,
        )

    def _mark_unprotected(self, block: int, group: int, written: int) -> None:
        self.unprotected[block] = (group, written)

    def _retire_if_unused(self, entry: Entry) -> None:
        """The frames of an entry that was given up, once nobody writes or reads them any more."""
        if entry.job is None and entry.open_pieces == 0:
            del self._dropped[entry.block, entry.generation]
            self._retire_frames((*entry.mirrors, *entry.parity))
            entry.mirrors = entry.parity = ()

    def _retire_frames(self, frames: tuple[int, ...]) -> None:
        self.pool.retire(frames)
        self._to_wipe.extend(frames)
