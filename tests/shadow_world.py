"""A model of everything around the manifest, down to the bytes: ranks, arena frames, keeper, and losses.

Slots are one byte, so a block is a few bytes and a frame too. The world knows what every block *should* hold on
every rank (what accepted steps wrote); whatever `Manifest.source` calls restorable must give exactly that.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ghostserve.arena.frames import FramePool
from ghostserve.shadow.manifest import Job, Manifest, Piece, Source
from ghostserve.shadow.step_plan import Write

GARBAGE = 0xEE


@dataclass
class OpenStep:
    """A planned step: its writes with the bytes they put there, per rank, and its pieces."""

    writes: list[tuple[Write, list[bytes]]]
    pieces: list[Piece]


@dataclass
class World:
    """`ranks` ranks with `blocks` blocks in groups of `block_sizes`; block b belongs to group b % groups."""

    rng: random.Random
    ranks: int = 3
    blocks: int = 8
    frames: int = 60
    block_sizes: tuple[int, ...] = (4, 6)
    compact: bool = True
    kind: type[Manifest] = Manifest
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.manifest = self.kind(
            ranks=self.ranks,
            parity_shards=1,
            block_sizes=self.block_sizes,
            slot_bytes=(1,) * len(self.block_sizes),
            pool=FramePool(self.frames),
            compact=self.compact,
        )
        size = max(self.block_sizes)
        self.kv = [[bytearray(size) for _ in range(self.blocks)] for _ in range(self.ranks)]
        self.arena = [bytearray(size) for _ in range(self.frames)]
        self.progress: list[dict[int, dict[int, int]]] = [
            {} for _ in range(self.ranks)
        ]  # frame -> slots -> crc
        self.committed: dict[int, list[bytes]] = {}  # block -> per rank, what accepted steps wrote
        self.jobs: list[Job] = []
        self.wipes: list[tuple[int, ...]] = []

    # -- steps -----------------------------------------------------------------------------------------

    def group(self, block: int) -> int:
        return block % len(self.block_sizes)

    def size(self, block: int) -> int:
        return self.block_sizes[self.group(block)]

    def written(self, block: int) -> int:
        """Slots that accepted steps wrote."""
        return len(self.committed[block][0]) if block in self.committed else 0

    def write(self, block: int, start: int, stop: int, *, whole: bool = False) -> tuple[Write, list[bytes]]:
        """A write of fresh bytes; of the whole prefix if it is a rewrite."""
        first = 0 if whole else start
        data = [self.rng.randbytes(stop - first) for _ in range(self.ranks)]
        return Write(block=block, group=self.group(block), start=start, stop=stop, whole=whole), data

    def plan(self, writes: Sequence[tuple[Write, list[bytes]]], *, catch_up: bool = False) -> OpenStep:
        """Plan a step. A block that is written from its start was given to another use: nobody wants the old.

        `catch_up`: one whole block without protection is copied as it will be after the step.
        """
        pieces = []
        for write, _ in writes:
            if write.start == 0 or write.whole:
                self.committed.pop(write.block, None)
            piece = self.manifest.plan(write)
            if piece is not None:
                pieces.append(piece)
        alive = {*self.committed, *(write.block for write, _ in writes)}
        whole = [
            block for block in self.manifest.unprotected if self.manifest.is_full(block) and block in alive
        ]
        if catch_up and whole and (piece := self.manifest.plan_catch_up(self.rng.choice(whole))) is not None:
            self.seen.add("caught up")
            pieces.append(piece)
        return OpenStep(list(writes), pieces)

    def run(self, step: OpenStep, rank: int) -> None:
        """The model runs on a rank: its KV holds the step's bytes."""
        for write, data in step.writes:
            first = write.stop - len(data[rank])
            self.kv[rank][write.block][first : write.stop] = data[rank]

    def stage(self, step: OpenStep, rank: int, *, pieces: int | None = None) -> list[int]:
        """Mirror the first `pieces` pieces (all if None) on a rank; their checksums, chained as `Mirror` does."""
        checksums = []
        for piece in step.pieces[:pieces]:
            frame = piece.frames[rank]
            known = self.progress[rank].get(frame, {})
            start = piece.start if piece.start in known else 0
            known = known if start else {0: 0}
            data = bytes(self.kv[rank][piece.block][start : piece.stop])
            self.arena[frame][start : piece.stop] = data
            checksum = zlib.crc32(data, known[start])
            kept = {slots: crc for slots, crc in known.items() if slots <= start}
            self.progress[rank][frame] = {**kept, piece.stop: checksum}
            checksums.append(checksum)
        return checksums

    def tear(self, step: OpenStep, rank: int, *, pieces: int) -> None:
        """A rank dies while it mirrors: `pieces` pieces are whole, of the next only a part is there."""
        self.stage(step, rank, pieces=pieces)
        if pieces < len(step.pieces):
            piece = step.pieces[pieces]
            middle = self.rng.randint(piece.start, piece.stop)
            self.arena[piece.frames[rank]][piece.start : middle] = self.rng.randbytes(middle - piece.start)

    def accept(self, step: OpenStep) -> None:
        """Every rank runs and stages; the step is committed, and what it wrote is what should be there."""
        checksums = []
        for rank in range(self.ranks):
            self.run(step, rank)
            checksums.append(self.stage(step, rank))
        self.manifest.commit(step.pieces, checksums)
        for write, data in step.writes:
            before = self.committed.get(write.block, [b""] * self.ranks)
            first = write.stop - len(data[0])
            self.committed[write.block] = [old[:first] + new for old, new in zip(before, data, strict=True)]

    def unstaged(self, step: OpenStep) -> None:
        """The step is accepted, but a rank could not mirror: what the guard does then."""
        for rank in range(self.ranks):
            self.run(step, rank)
        self.manifest.miss(step.pieces)
        for write, data in step.writes:
            before = self.committed.get(write.block, [b""] * self.ranks)
            first = write.stop - len(data[0])
            self.committed[write.block] = [old[:first] + new for old, new in zip(before, data, strict=True)]

    def take_out(self, steps: Sequence[OpenStep], block: int) -> None:
        """The request that writes `block` leaves the steps in flight: it recomputes, and the block is free."""
        for step in steps:
            self.manifest.withdraw(piece for piece in step.pieces if piece.block == block)
            step.pieces = [piece for piece in step.pieces if piece.block != block]
            step.writes = [(write, data) for write, data in step.writes if write.block != block]
        self.forget(block)

    def forget(self, block: int) -> None:
        """Nothing may read this block any more."""
        self.manifest.drop(block)
        self.committed.pop(block, None)

    # -- the keeper ------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Give the keeper what there is to do."""
        while len(self.jobs) < 3 and (job := self.manifest.next_job()) is not None:
            self.jobs.append(job)
        if retired := self.manifest.take_retired():
            self.wipes.append(retired)

    def keeper_encodes(self, *, dies: bool = False) -> None:
        """The keeper does its first job; or dies half way, with rubbish in the parity."""
        job = self.jobs[0]
        mirrors = [bytes(self.arena[frame][: job.nbytes]) for frame in job.mirrors]
        if dies:
            self.arena[job.parity[0]][: job.nbytes] = self.rng.randbytes(job.nbytes)
            return
        del self.jobs[0]
        ok = all(zlib.crc32(m) == checksum for m, checksum in zip(mirrors, job.checksums, strict=True))
        parity = bytearray(job.nbytes)
        for mirror in mirrors:
            parity = bytearray(a ^ b for a, b in zip(parity, mirror, strict=True))
        if ok:
            self.arena[job.parity[0]][: job.nbytes] = parity
        self.seen.add("encoded" if ok else "refused")
        self.manifest.job_done(job.job, ok=ok, parity_checksums=(zlib.crc32(parity),) if ok else ())

    def keeper_wipes(self) -> None:
        frames = self.wipes.pop(0)
        for frame in frames:
            self.arena[frame][:] = bytes(len(self.arena[frame]))
        self.manifest.pool.release(frames)

    # -- a loss ----------------------------------------------------------------------------------------

    def restorable(self, block: int, rank: int, lost: frozenset[int]) -> bytes | None:
        """What a newcomer of `rank` would be given for `block`; None if it has to be recomputed.

        As the engine does it: the log is only believed if its checksum holds.
        """
        needed = self.written(block)
        choice = self.manifest.source(block, needed=needed, lost=lost).choice
        if choice is Source.NOTHING:
            assert needed == 0
            return b""
        if choice is Source.LOST:
            self.seen.add("lost")
            return None
        entry = self.manifest.entries[block]
        if choice is Source.MIRROR:
            log = bytes(self.arena[entry.mirrors[rank]][: entry.slots])
        else:
            log = bytes(self.arena[entry.parity[0]][: entry.slots])
            for other in set(range(self.ranks)) - lost:
                log = bytes(a ^ b for a, b in zip(log, self.kv[other][block], strict=False))
        self.seen.add(choice.value)
        assert zlib.crc32(log) == entry.checksums[rank], f"block {block}: {choice} fails its checksum"
        return log

    def check(self) -> None:
        """The manifest holds together, and whatever it calls restorable is exactly what was committed."""
        self.manifest.check()
        for lost in (*({rank} for rank in range(self.ranks)), set(self.rng.sample(range(self.ranks), 2))):
            for block, should in self.committed.items():
                for rank in lost:
                    log = self.restorable(block, rank, frozenset(lost))
                    if log is not None:
                        prefix = log[: len(should[rank])]
                        assert prefix == should[rank], (
                            f"block {block}, rank {rank}: {prefix!r}, not {should[rank]!r}"
                        )

    def lose(self, rank: int) -> None:
        """A rank's KV is gone, a newcomer takes over: what cannot be rebuilt is forgotten everywhere."""
        rebuilt = {block: self.restorable(block, rank, frozenset({rank})) for block in self.committed}
        self.kv[rank] = [bytearray([GARBAGE]) * len(block) for block in self.kv[rank]]
        self.progress[rank] = {}
        for block, log in rebuilt.items():
            if log is None:
                self.forget(block)
                continue
            self.kv[rank][block][: len(log)] = log
            entry = self.manifest.entries[block]
            if entry.mirrors:
                self.progress[rank][entry.mirrors[rank]] = {entry.slots: entry.checksums[rank]}
        for block in list(self.manifest.unprotected):
            self.forget(block)
