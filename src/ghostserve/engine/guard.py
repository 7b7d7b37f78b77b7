"""The shadow's side in the engine core: `shadow/protection.py` with what it works on, under one lock.

The keeper's answers come from a thread of their own. Fails open: an error in the shadow is counted and logged, the step
goes on without protection for what it concerned.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ghostserve.arena.control import ControlPage, Counter
from ghostserve.arena.frames import FramePool
from ghostserve.arena.memfd import Segment
from ghostserve.arena.staging import StagingArea
from ghostserve.clock import monotonic_s
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
from ghostserve.engine.shortage import Shortage
from ghostserve.errors import CorruptionError
from ghostserve.events.kinds import Event, ProtectionLost, ProtectionRegained
from ghostserve.shadow.keeper_client import KeeperClient
from ghostserve.shadow.keeper_messages import Answer, Geometry, ScrubDone, WipeDone
from ghostserve.shadow.manifest import BlockState, Manifest, ManifestStatistics, Piece
from ghostserve.shadow.protection import Protection
from ghostserve.shadow.step_plan import BlockTables

logger = logging.getLogger(__name__)

FULL_BELOW = 8  # free frames per rank: what the coming steps take


@dataclass(frozen=True, slots=True)
class PoolBlocks:
    """vLLM's block pool, as `shadow.protection.Blocks`."""

    pool: Any

    def is_live(self, block: int) -> bool:
        known = self.pool.blocks[block]
        return bool(known.ref_cnt > 0 or known.block_hash is not None)

    def is_cached(self, block: int) -> bool:
        return self.pool.blocks[block].block_hash is not None

    def live_count(self) -> int:
        """Blocks that anything may still read."""
        return sum(1 for block in self.pool.blocks if block.ref_cnt > 0 or block.block_hash is not None)

    def cached_only(self) -> Iterator[int]:
        for block in self.pool.free_block_queue.get_all_free_blocks():
            yield block.block_id


@dataclass(slots=True)
class Guard:
    """Owns the protection and its lock; borrows the arena and the scheduler's block pool."""

    page: ControlPage
    segments: dict[str, Segment]
    address: str
    limits: GuardLimits
    ranks: int
    lock: threading.RLock = field(default_factory=threading.RLock)
    protection: Protection | None = None
    geometry: ArenaGeometry | None = None
    on_scrubbed: Callable[[ScrubDone], object] | None = None  # called under the lock
    _blocks: PoolBlocks | None = None
    _staging: StagingArea | None = None
    _keeper: KeeperClient | None = None
    _drought: Drought = field(default_factory=Drought)
    _shortage: Shortage = field(default_factory=Shortage)

    @property
    def manifest(self) -> Manifest | None:
        """None until the arena is cut up."""
        return None if self.protection is None else self.protection.manifest

    # -- start -----------------------------------------------------------------------------------------

    def attach(self, block_pool: Any) -> None:
        """There is a scheduler: its block pool says which blocks are of use."""
        self._blocks = PoolBlocks(block_pool)
        if self.protection is not None:
            self.protection.blocks = self._blocks

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
        self.page.set(Counter.FRAMES_TOTAL, count.frames)
        self.page.set(Counter.HOST_NEEDED_BYTES, count.needed_bytes)
        self.page.set(Counter.FRAME_BYTES, first.frame_bytes)
        self._keeper = KeeperClient(self.address, self._on_answer)
        self._keeper.submit(
            Geometry(
                frame_bytes=first.frame_bytes,
                frames=self.geometry.frames,
                ranks=self.ranks,
                parity_shards=self.limits.parity_shards,
                element=first.element,
            )
        )
        self.protection = Protection(
            manifest=Manifest(
                ranks=self.ranks,
                parity_shards=self.limits.parity_shards,
                block_sizes=first.block_sizes,
                slot_bytes=first.slot_bytes,
                pool=FramePool(count.frames),
                compact=self.limits.compact,
            ),
            tables=BlockTables(first.block_sizes),
            staged=self._staging,
            keeper=self._keeper,
            jobs_max=JOBS_IN_FLIGHT_MAX,
            blocks=self._blocks,
        )
        return self.geometry

    # -- every step ------------------------------------------------------------------------------------

    def plan(self, scheduler_output: Any) -> tuple[Piece, ...]:
        """What the coming step is to mirror. Never raises."""
        if self.protection is None:
            return ()
        try:
            with self.lock:
                self._drought.step(self.page, self.protection.manifest.pool)
                return self.protection.plan(increment_of(scheduler_output))
        except Exception as error:
            logger.exception("the shadow could not plan a step: protection is off until nothing is served")
            self.page.events.tell(ProtectionLost(reason=f"a step could not be planned: {error}"))
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)
            with self.lock:
                self.protection.give_up()
            return ()

    def commit(self, *, epoch: int, step: int, pieces: tuple[Piece, ...]) -> None:
        """A step was accepted: what it mirrored may now be restored. Never raises."""
        self.page.add(Counter.STEPS_TOTAL)
        if self.protection is None:
            return
        try:
            with self.lock:
                self.protection.commit(epoch=epoch, step=step, pieces=pieces)
        except Exception:
            logger.exception("the shadow could not commit step %d", step)
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)

    def withdraw(self, pieces: tuple[Piece, ...], blocks: Iterable[int]) -> None:
        """A step will not run: forget what it planned, and the blocks that it was to write."""
        if self.protection is not None:
            with self.lock:
                self.protection.withdraw(pieces, blocks)

    def without_blocks(self, pieces: tuple[Piece, ...], blocks: Iterable[int]) -> tuple[Piece, ...]:
        """What a step still mirrors that is sent again without what writes `blocks`."""
        if self.protection is None:
            return ()
        with self.lock:
            return self.protection.without_blocks(pieces, blocks)

    # -- the keeper's answers --------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While blocks are restored the keeper's answers wait: they would free mirrors that are being read."""
        assert self.protection is not None
        with self.lock:
            self.protection.hold()
        try:
            yield
        finally:
            with self.lock:
                for trouble in self.protection.release():
                    logger.error("%s", trouble)

    def _on_answer(self, answer: Answer) -> None:
        """The keeper is done with a job; called from its client's thread."""
        with self.lock:
            if isinstance(answer, ScrubDone):
                if self.on_scrubbed is not None:
                    self.on_scrubbed(answer)
                return
            assert self.protection is not None
            trouble = self.protection.answer(answer)
        if trouble is not None:
            logger.error("%s", trouble)
            if isinstance(answer, WipeDone):
                self.page.add(Counter.SHADOW_ERRORS_TOTAL)

    # -- a rebuild's frames ----------------------------------------------------------------------------

    def latest_cached_first(self) -> list[int]:
        """Blocks that no request uses, those used last first."""
        return [] if self._blocks is None else list(self._blocks.cached_only())[::-1]

    def export_frames(self) -> range:
        """Frames for survivors' exports, for REBUILD_BLOCKS blocks at a time: behind the manifest's."""
        assert self.protection is not None
        first = self.protection.manifest.pool.frames
        return range(first, first + reserve_frames(self.ranks))

    def wipe_exports(self) -> None:
        """What survivors exported is users' text: it goes as soon as it was used."""
        assert self.geometry is not None
        size, frames = self.geometry.frame_bytes, self.export_frames()
        self.segments["pool"].punch(frames.start * size, len(frames) * size)

    # -- idle time -------------------------------------------------------------------------------------

    def start_again(self) -> None:
        """No request is open: protection that was given up for an error begins anew."""
        if self.protection is not None:
            with self.lock:
                if self.protection.start_again():
                    logger.warning("the shadow protects again what comes from here on")
                    self.page.events.tell(ProtectionRegained())

    def sweep(self) -> None:
        """Give up every block that nothing may read any more; for idle time."""
        if self.protection is not None:
            with self.lock:
                self.protection.sweep()

    # -- looking ---------------------------------------------------------------------------------------

    def random_record(self, prefer: list[int]) -> bytes | None:
        """The random states after the last accepted step, from any rank's record; they are equal on all."""
        if self.protection is None:
            return None
        found = self.protection.random_records(prefer)
        _, step = self.protection.accepted
        if len(set(found)) > 1:
            logger.error("ranks hold different random states after step %d", step)
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)
        if not found:
            logger.error("no rank's random states after step %d are known: what is sampled may change", step)
            self.page.add(Counter.SHADOW_ERRORS_TOTAL)
        return found[0] if found else None

    def memory_bound(self, tails: int) -> MemoryBound | None:
        """The bound and what is used, in bytes of frames. `tails`: blocks being written by requests."""
        if self.manifest is None or self.geometry is None or self._blocks is None:
            return None
        with self.lock:
            live = sum(
                1
                for entry in self.manifest.entries.values()
                if entry.state is not BlockState.MIRRORED and self._blocks.is_live(entry.block)
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
            news = self._look_for_shortage(statistics)
        if news is not None:
            self.page.events.tell(news)
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
        page.set(Counter.PROTECTED_TOKENS, statistics.protected_slots)
        page.set(Counter.SHADOW_LAG_TOKENS, statistics.lag_slots)
        page.set(Counter.UNPROTECTED_TOKENS, self._unprotected_tokens(statistics))
        budgeted = (self.segments[name] for name in ("control", "staging", "pool"))
        page.set(Counter.HOST_USED_BYTES, sum(segment.allocated_bytes() for segment in budgeted))
        nbytes = sum(entry.slots * self.manifest.slot_bytes[entry.group] for entry in entries)
        page.set(Counter.KV_BYTES_PROTECTED, nbytes * self.ranks)

    def _look_for_shortage(self, statistics: ManifestStatistics) -> Event | None:
        """Under the lock. Where protection was given up for an error that was told."""
        assert self.protection is not None
        if self.protection.tables is None:
            return None
        return self._shortage.look(
            monotonic_s(),
            unprotected_blocks=statistics.unprotected_blocks,
            memory_is_full=self.protection.manifest.pool.free_count < FULL_BELOW * self.ranks,
        )

    def _unprotected_tokens(self, statistics: ManifestStatistics) -> int:
        """Once protection was given up nothing is written down any more: then every block that is in use counts, as full."""
        assert self.protection is not None
        if self.protection.tables is None and self._blocks is not None:
            return self._blocks.live_count() * self.protection.manifest.block_sizes[0]
        return statistics.unprotected_slots

    def close(self) -> None:
        """Stop talking to the keeper; bounded."""
        if self._keeper is not None:
            self._keeper.close()
