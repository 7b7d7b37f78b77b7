"""The shadow's side in the engine core: plans what a step mirrors, commits it, and says what can be restored.

One lock guards everything here; the keeper's answers come from a thread of their own. Fails open: an error in
the shadow is counted and logged, the step goes on without protection for what it concerned.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ghostserve.arena.control import ControlPage, Counter
from ghostserve.arena.frames import FramePool
from ghostserve.arena.memfd import Segment
from ghostserve.arena.staging import StagingArea
from ghostserve.engine.budget import (
    JOBS_IN_FLIGHT_MAX,
    STAGING_RING,
    GuardLimits,
    MemoryBound,
    count_frames,
    reserve_frames,
)
from ghostserve.engine.drought import Drought
from ghostserve.engine.messages import ArenaGeometry, RankLayout
from ghostserve.engine.request_state import increment_of
from ghostserve.engine.staging_keys import ack_key, random_key
from ghostserve.errors import CorruptionError
from ghostserve.shadow.keeper_client import KeeperClient
from ghostserve.shadow.keeper_messages import (
    WIPE_FRAMES_MAX,
    Answer,
    EncodeJob,
    Geometry,
    WipeDone,
    WipeJob,
)
from ghostserve.shadow.manifest import BlockState, Manifest, Piece
from ghostserve.shadow.step_plan import BlockTables

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Guard:
    """Owns the manifest and the frame pool; borrows the arena and the scheduler's block pool."""

    page: ControlPage
    segments: dict[str, Segment]
    address: str
    limits: GuardLimits
    ranks: int
    lock: threading.RLock = field(default_factory=threading.RLock)
    manifest: Manifest | None = None
    tables: BlockTables | None = None
    geometry: ArenaGeometry | None = None
    block_pool: Any = None
    accepted: tuple[int, int] = (0, 0)  # (epoch, step) of the last accepted step
    _staging: StagingArea | None = None
    _keeper: KeeperClient | None = None
    _next_wipe: int = 1
    _wipes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _held: list[Answer] | None = None
    _drought: Drought = field(default_factory=Drought)
    _leaving: set[int] = field(
        default_factory=set
    )  # blocks of finished requests that a step in flight still uses

    # -- start -----------------------------------------------------------------------------------------

    def configure(self, layouts: list[RankLayout]) -> ArenaGeometry:
        """Cut up the arena. Raises CorruptionError if the ranks' layouts differ, UsageError if nothing fits."""
        first = layouts[0]
        for layout in layouts:
            if layout.fingerprint != first.fingerprint:
                raise CorruptionError(
                    f"rank {layout.rank} lays out its KV differently from rank {first.rank}: "
                    f"{layout.fingerprint} and {first.fingerprint}"
                )
        record_bytes = self.limits.staging_record_bytes
        count = count_frames(self.limits, first, ranks=self.ranks)
        if count.frames < count.wanted:
            logger.warning(
                "--host-memory holds %d of the %d frames that full protection needs; the least valuable "
                "blocks will be unprotected",
                count.frames,
                count.wanted,
            )
        self.geometry = ArenaGeometry(
            frame_bytes=first.frame_bytes,
            frames=count.frames + count.reserve,
            staging_ring=STAGING_RING,
            staging_record_bytes=record_bytes,
            layout_fingerprint=first.fingerprint,
            parity_shards=self.limits.parity_shards,
        )
        shape = {"ranks": self.ranks, "ring": STAGING_RING, "record_bytes": record_bytes}
        self.segments["staging"].resize(StagingArea.required_bytes(**shape))
        self.segments["pool"].resize(self.geometry.frames * first.frame_bytes)
        self.segments["debug"].resize(self.ranks * first.kv_bytes)
        self._staging = StagingArea(self.segments["staging"], **shape)
        self.manifest = Manifest(
            ranks=self.ranks,
            parity_shards=self.limits.parity_shards,
            block_sizes=first.block_sizes,
            slot_bytes=first.slot_bytes,
            pool=FramePool(count.frames),
            compact=self.limits.compact,
        )
        self.tables = BlockTables(first.block_sizes)
        self.page.set(Counter.FRAMES_TOTAL, count.frames)
        self.page.set(Counter.FRAME_BYTES, first.frame_bytes)
        self._keeper = KeeperClient(self.address, self._on_answer)
        self._keeper.submit(
            Geometry(
                frame_bytes=first.frame_bytes,
                frames=self.geometry.frames,
                ranks=self.ranks,
                parity_shards=self.limits.parity_shards,
            )
        )
        return self.geometry

    # -- every step ------------------------------------------------------------------------------------

    def plan(self, scheduler_output: Any) -> tuple[Piece, ...]:
        """What the coming step is to mirror. Never raises."""
        if self.manifest is None or self.tables is None:
            return ()
        try:
            with self.lock:
                return self._plan(self.manifest, self.tables, scheduler_output)
        except Exception:
            # What the step overwrites is not known, so nothing that is mirrored may be believed from now on.
            logger.exception("the shadow could not plan a step: protection is off")
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)
            with self.lock:
                self.tables = None
                self.manifest.drop_all()
            return ()

    def _plan(self, manifest: Manifest, tables: BlockTables, scheduler_output: Any) -> tuple[Piece, ...]:
        self._drought.step(self.page, manifest.pool)
        increment = increment_of(scheduler_output)
        leaving, self._leaving = self._leaving, set()
        self._drop_dead(manifest, [leaving])
        for request_id in increment.finished:
            self._drop_dead(manifest, tables.tables.get(request_id, ()))
        writes = tables.apply(increment)
        self._make_room(manifest, len(writes))
        pieces = [piece for write in writes if (piece := manifest.plan(write)) is not None]
        pieces.extend(self._catch_up(manifest))
        return tuple(pieces)

    def commit(self, *, epoch: int, step: int, pieces: tuple[Piece, ...]) -> None:
        """A step was accepted: what it mirrored may now be restored. Never raises."""
        self.accepted = (epoch, step)
        self.page.add(Counter.STEPS_TOTAL)
        if self.manifest is None or self._staging is None:
            return
        try:
            with self.lock:
                checksums = self._read_checksums(epoch, step, len(pieces))
                if checksums is None:
                    self.manifest.miss(pieces)
                else:
                    self.manifest.commit(pieces, checksums)
                self._compact(self.manifest)
        except Exception:
            logger.exception("the shadow could not commit step %d", step)
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)

    def withdraw(self, pieces: tuple[Piece, ...]) -> None:
        """A step will not run: forget what it planned."""
        if self.manifest is not None:
            with self.lock:
                self.manifest.withdraw(pieces)

    def current(self, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        """What a step that is sent again may still mirror: frames of blocks given up may be another's."""
        if self.manifest is None:
            return ()
        with self.lock:
            return self.manifest.current(pieces)

    def _read_checksums(self, epoch: int, step: int, pieces: int) -> list[tuple[int, ...]] | None:
        """Per rank, the crc32 of each piece; None if a rank could not stage."""
        assert self._staging is not None
        checksums = []
        for rank in range(self.ranks):
            record = self._staging.read(rank, ack_key(step), epoch)
            if record is None or len(record) != 4 * pieces:
                return None
            checksums.append(struct.unpack(f"<{pieces}I", record))
        return checksums

    def _make_room(self, manifest: Manifest, writes: int) -> None:
        """Keep frames ahead of need: blocks that only the prefix cache still wants go first."""
        needed = self.ranks * (writes + 2)
        on_the_way = manifest.pool.free_count + manifest.pool.retired_count
        if on_the_way < needed and self.block_pool is not None:
            manifest.evict(self._cached_only(), frames=needed - on_the_way)
            self._wipe(manifest)

    def _cached_only(self) -> Iterator[int]:
        """Blocks no request uses, the next to be reused first."""
        for block in self.block_pool.free_block_queue.get_all_free_blocks():
            yield block.block_id

    def _catch_up(self, manifest: Manifest) -> list[Piece]:
        """At most one block per step that lost its protection gets it back from live KV."""
        spare = manifest.pool.free_count - 4 * self.ranks
        if spare < self.ranks or self.block_pool is None:
            return []
        for block, (_, full) in manifest.unprotected.items():
            if full and self._live(block):
                piece = manifest.plan_catch_up(block)
                return [] if piece is None else [piece]
        return []

    # -- compaction ------------------------------------------------------------------------------------

    def _compact(self, manifest: Manifest) -> None:
        keeper = self._keeper
        if keeper is None:
            return
        while manifest.open_jobs() < JOBS_IN_FLIGHT_MAX and (job := manifest.next_job()) is not None:
            keeper.submit(
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
        self._wipe(manifest)

    def _wipe(self, manifest: Manifest) -> None:
        """Ask for the retired frames to be wiped; they come back free."""
        if self._keeper is None:
            return
        frames = manifest.take_retired()
        for first in range(0, len(frames), WIPE_FRAMES_MAX):
            job, self._next_wipe = 2 * self._next_wipe + 1, self._next_wipe + 1
            self._wipes[job] = frames[first : first + WIPE_FRAMES_MAX]
            self._keeper.submit(WipeJob(job=job, frames=self._wipes[job]))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While blocks are restored the keeper's answers wait: they would free mirrors that are being read."""
        with self.lock:
            self._held = []
        try:
            yield
        finally:
            with self.lock:
                answers, self._held = self._held, None
            for answer in answers or ():
                self._on_answer(answer)

    def _on_answer(self, answer: Answer) -> None:
        """The keeper is done with a job; called from its client's thread."""
        with self.lock:
            if self._held is not None:
                self._held.append(answer)
                return
            manifest = self.manifest
            assert manifest is not None
            if isinstance(answer, WipeDone):
                frames = self._wipes.pop(answer.job, ())
                if answer.ok:
                    manifest.pool.release(frames)
                else:  # they may still hold users' text: never reused unwiped
                    logger.error(
                        "%d frames could not be wiped and are withheld: %s", len(frames), answer.reason
                    )
                    self.page.add(Counter.SHADOW_ERRORS_TOTAL)
            else:
                manifest.job_done(answer.job // 2, ok=answer.ok, parity_checksums=answer.parity_checksums)
                if not answer.ok:
                    logger.error("the keeper refused a stripe: %s", answer.reason)
            self._compact(manifest)

    # -- a rebuild's frames ----------------------------------------------------------------------------

    def export_frames(self, index: int) -> tuple[int, ...]:
        """Frames for the survivors' exports of the `index`-th block of a batch, below REBUILD_BLOCKS."""
        assert self.manifest is not None
        first = self.manifest.pool.frames + index * (self.ranks - 1)
        return tuple(range(first, first + self.ranks - 1))

    def wipe_exports(self) -> None:
        """What survivors exported is users' text: it goes as soon as it was used."""
        assert self.manifest is not None
        assert self.geometry is not None
        size = self.geometry.frame_bytes
        self.segments["pool"].punch(self.manifest.pool.frames * size, reserve_frames(self.ranks) * size)

    # -- what is alive ---------------------------------------------------------------------------------

    def _live(self, block: int) -> bool:
        """Whether anything may still read this block: a request, or the prefix cache."""
        known = self.block_pool.blocks[block]
        return bool(known.ref_cnt > 0 or known.block_hash is not None)

    def _drop_dead(self, manifest: Manifest, table: Any) -> None:
        if self.block_pool is None:
            return
        for blocks in table:
            for block in blocks:
                if block not in manifest.entries and block not in manifest.unprotected:
                    continue
                if not self._live(block):
                    manifest.drop(block)
                elif self.block_pool.blocks[block].block_hash is None:
                    self._leaving.add(block)

    def sweep(self) -> None:
        """Give up every block that nothing may read any more; for idle time."""
        if self.manifest is None or self.block_pool is None:
            return
        with self.lock:
            if self._held is not None:
                return
            for block in [*self.manifest.entries, *self.manifest.unprotected]:
                if not self._live(block):
                    self.manifest.drop(block)
            self._compact(self.manifest)

    # -- looking ---------------------------------------------------------------------------------------

    def random_record(self, prefer: list[int]) -> bytes | None:
        """The random states after the last accepted step, from any rank's record; they are equal on all."""
        if self._staging is None:
            return None
        epoch, step = self.accepted
        records = [self._staging.read(rank, random_key(step), epoch) for rank in prefer]
        found = [record for record in records if record is not None]
        if len(set(found)) > 1:
            logger.error("ranks hold different random states after step %d", step)
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)
        if not found:
            logger.error("no rank's random states after step %d are known: what is sampled may change", step)
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)
        return found[0] if found else None

    def memory_bound(self, tails: int) -> MemoryBound | None:
        """The bound and what is used, in bytes of frames. `tails`: blocks being written by requests."""
        if self.manifest is None or self.geometry is None or self.block_pool is None:
            return None
        with self.lock:
            live = sum(
                1
                for entry in self.manifest.entries.values()
                if entry.state is not BlockState.MIRRORED and self._live(entry.block)
            )
            frames = self.limits.parity_shards * live + self.ranks * (tails + self.limits.backlog_blocks)
            size = self.geometry.frame_bytes
            used = self.manifest.pool.used_count * size
        return MemoryBound(
            sealed_live_blocks=live, tail_blocks=tails, bound_bytes=frames * size, used_bytes=used
        )

    def publish(self) -> None:
        """Write the shadow's numbers to the control page."""
        if self.manifest is None or self.geometry is None:
            return
        with self.lock:
            statistics = self.manifest.statistics()
            entries = list(self.manifest.entries.values())
            used = self.manifest.pool.used_count
        size = self.geometry.frame_bytes
        page = self.page
        page.set(Counter.BLOCKS_MIRRORED, statistics.tail_blocks)
        page.set(Counter.BLOCKS_SEALED, statistics.sealed_blocks)
        page.set(Counter.BLOCKS_CODED, statistics.coded_blocks)
        page.set(Counter.BLOCKS_UNPROTECTED, statistics.unprotected_blocks)
        page.set(Counter.FRAMES_USED, used)
        page.set(Counter.PARITY_BYTES, statistics.parity_frames * size)
        page.set(Counter.MIRROR_BYTES, statistics.mirror_frames * size)
        page.set(Counter.ENCODE_BACKLOG, statistics.sealed_blocks)
        slots = sum(entry.slots for entry in entries)
        page.set(Counter.PROTECTED_TOKENS, slots)
        nbytes = sum(entry.slots * self.manifest.slot_bytes[entry.group] for entry in entries)
        page.set(Counter.KV_BYTES_PROTECTED, nbytes * self.ranks)

    def close(self) -> None:
        """Stop talking to the keeper; bounded."""
        if self._keeper is not None:
            self._keeper.close()
