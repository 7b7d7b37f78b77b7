"""A rank's side of the shadow: stages what a step wrote, and restores what a predecessor lost.

Fails open: an error here marks the step's pieces as not staged; the step itself goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import struct
from collections import deque
from typing import Any

import numpy as np
import torch

from ghostserve.arena.control import ControlPage, Counter, Fault, FaultAction, FaultPoint, Switch
from ghostserve.arena.memfd import Segment
from ghostserve.arena.staging import StagingArea
from ghostserve.codec.base import Bytes, Codec
from ghostserve.codec.choose import host_codec
from ghostserve.engine.messages import ArenaGeometry, RankLayout, RestoreReport
from ghostserve.engine.probe import element_of, kv_storage, probe
from ghostserve.engine.rank_scrub import RankScrub
from ghostserve.errors import CorruptionError
from ghostserve.shadow.host_staging import HostStaging
from ghostserve.shadow.mirror import Mirror
from ghostserve.shadow.packed_pieces import PackedPieces
from ghostserve.shadow.restore import BlockRestore, rebuild_log
from ghostserve.shadow.staging_keys import ack_key, random_key

logger = logging.getLogger(__name__)

RECENT_STEPS = 32  # whose pieces are remembered; a reference each


class RankShadow:
    """Owns nothing but views: the KV memory is vLLM's, the arena outlives us."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        runner: Any,
        kv_cache_config: Any,
        layers: dict[str, Any],
        page: ControlPage,
        segments: dict[str, Segment],
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._page = page
        self._segments = segments
        self._kv, self._groups = probe(runner, kv_cache_config, layers)
        self._num_blocks = kv_cache_config.num_blocks
        self._kv_bytes = kv_storage(runner).nbytes()
        self._element = element_of(runner, runner.vllm_config.cache_config.cache_dtype)
        self._mirror: Mirror | None = None
        self._staging: StagingArea | None = None
        self._host: HostStaging | None = None  # on a CPU, with the native library
        self._codec: Codec | None = None
        self._debug_started = False
        self._recent: deque[PackedPieces] = deque(maxlen=RECENT_STEPS)  # for faults
        self.scrub: RankScrub | None = None  # once the arena is mapped

    def layout(self) -> RankLayout:
        """What the engine core compares between ranks and cuts the arena by."""
        layout = self._unmapped().layout()
        return RankLayout(
            rank=self._rank,
            pid=os.getpid(),
            fingerprint=layout.fingerprint,
            frame_bytes=layout.frame_bytes,
            block_sizes=tuple(group.block_size for group in layout.groups),
            slot_bytes=tuple(group.slot_bytes for group in layout.groups),
            kv_bytes=self._kv_bytes,
            num_blocks=self._num_blocks,
            element=self._element,
        )

    def map_arena(self, geometry: ArenaGeometry) -> None:
        """The arena has been sized: map it. Refuses a layout that is not this rank's."""
        if self.layout().fingerprint != geometry.layout_fingerprint:
            raise CorruptionError(
                f"rank {self._rank}: KV layout {self.layout().fingerprint} is not the arena's "
                f"{geometry.layout_fingerprint}"
            )
        for segment in self._segments.values():
            segment.refresh()
        self._mirror = self._unmapped()
        self._mirror.frames = self._segments["pool"].array
        self._mirror.frame_bytes = geometry.frame_bytes
        self._host = self._mirror.copier = self._host_staging(geometry)
        self._codec = host_codec(self._ranks, geometry.parity_shards)
        self.scrub = RankScrub(rank=self._rank, mirror=self._mirror, decode=self._decode)
        self._staging = StagingArea(
            self._segments["staging"],
            ranks=self._ranks,
            ring=geometry.staging_ring,
            record_bytes=geometry.staging_record_bytes,
        )

    def _host_staging(self, geometry: ArenaGeometry) -> HostStaging | None:
        if self._kv.device.type != "cpu":
            return None
        try:
            return HostStaging(
                kv=self._kv.numpy(),
                groups=self._groups,
                num_blocks=self._num_blocks,
                frames=self._segments["pool"].array,
                frame_bytes=geometry.frame_bytes,
                rank=self._rank,
            )
        except (OSError, AttributeError) as error:  # the library is missing, or of another build
            logger.warning("steps are staged piece by piece, which is slower: %s", error)
            return None

    def _unmapped(self) -> Mirror:
        return Mirror(
            kv=self._kv,
            groups=self._groups,
            num_blocks=self._num_blocks,
            frames=np.empty(0, dtype=np.uint8),
            frame_bytes=0,
        )

    # -- every step ------------------------------------------------------------------------------------

    def stage(self, *, epoch: int, step: int, pieces: PackedPieces) -> None:
        """Mirror the slots a step wrote and record their checksums. Never raises."""
        if self._mirror is None or self._staging is None:
            return
        try:
            checksums = self.stage_now(pieces)
            self._recent.append(pieces)
            if self._page.get_switch(Switch.DEBUG_COPY):
                self._debug_copy(pieces)
            self._staging.write(self._rank, ack_key(step), epoch, checksums)
        except Exception:
            logger.exception("rank %d: step %d could not be mirrored", self._rank, step)
            self._page.add(Counter.SHADOW_ERRORS_TOTAL, 1)

    def stage_now(self, pieces: PackedPieces) -> bytes:
        """Mirror these pieces from live KV; the crc32 of each log so far, uint32, little-endian."""
        return self._host.stage(pieces) if self._host is not None else self._stage_each(pieces)

    def _stage_each(self, pieces: PackedPieces) -> bytes:
        assert self._mirror is not None
        checksums = [
            self._mirror.stage(
                block=piece.block, group=piece.group, start=piece.start, stop=piece.stop, frame=piece.frame
            )
            for piece in pieces.of_rank(self._rank)
        ]
        return struct.pack(f"<{len(checksums)}I", *checksums)

    def record_random_state(self, *, epoch: int, step: int, record: bytes) -> None:
        """Keep the random states after a step where they outlive this process. Never raises."""
        if self._staging is None:
            return
        try:
            self._staging.write(self._rank, random_key(step), epoch, record)
        except Exception:
            logger.exception("rank %d: random state of step %d not kept", self._rank, step)
            self._page.add(Counter.SHADOW_ERRORS_TOTAL, 1)

    # -- after a loss ----------------------------------------------------------------------------------

    def export(self, items: list[BlockRestore]) -> None:
        """A survivor: copy live blocks into the frames named for this rank."""
        assert self._mirror is not None
        for item in items:
            if self._rank in item.survivors:
                self._mirror.export(block=item.block, group=item.group, frame=item.survivors[self._rank])

    def adopt(self, items: list[BlockRestore]) -> RestoreReport:
        """A newcomer: write every block back into KV memory, checksum first."""
        mirror = self._mirror
        assert mirror is not None
        mirrors = parities = rebuilt = 0
        refused: list[int] = []
        for item in items:
            log = mirror.frame(item.frame) if item.frame is not None else self._decode(mirror, item)
            checksum = None if self._page.get_switch(Switch.SKIP_CHECKSUM) else item.checksum
            try:
                rebuilt += mirror.adopt(
                    block=item.block, group=item.group, slots=item.slots, log=log, checksum=checksum
                )
            except CorruptionError as error:
                logger.error("rank %d refuses to restore: %s", self._rank, error)
                self._page.add(Counter.CHECKSUM_REFUSALS_TOTAL, 1)
                refused.append(item.block)
                continue
            if item.frame is None:
                parities += 1
            else:
                mirrors += 1
                seed = mirror.seed_progress if self._host is None else self._host.seed
                seed(frame=item.frame, slots=item.slots, checksum=item.checksum)
        self._page.add(Counter.KV_BLOCKS_FROM_MIRRORS_TOTAL, mirrors)
        self._page.add(Counter.KV_BLOCKS_FROM_PARITY_TOTAL, parities)
        self._page.add(Counter.KV_BYTES_REBUILT_TOTAL, rebuilt)
        return RestoreReport(
            blocks_from_mirrors=mirrors,
            blocks_from_parity=parities,
            bytes_rebuilt=rebuilt,
            refused=tuple(refused),
            different_blocks=self._debug_compare(items, refused),
        )

    def _decode(self, mirror: Mirror, item: BlockRestore) -> Bytes:
        """This rank's packed log of a coded block, from the survivors' exports and the parity; not checked yet."""
        assert self._codec is not None
        nbytes = item.slots * mirror.slot_bytes(item.group)
        rebuilt = rebuild_log(
            self._codec,
            rank=self._rank,
            data=[
                mirror.frame(item.survivors[rank])[:nbytes] if rank in item.survivors else None
                for rank in range(self._ranks)
            ],
            parity=[mirror.frame(frame)[:nbytes] for frame in item.parity],
            parity_checksums=item.parity_checksums,
            checksum=None if self._page.get_switch(Switch.SKIP_CHECKSUM) else item.checksum,
        )
        if rebuilt.left_out:
            logger.warning(
                "block %d: %d of %d parity shards are wrong and left out",
                item.block,
                rebuilt.left_out,
                len(item.parity),
            )
            self._page.add(Counter.CHECKSUM_REFUSALS_TOTAL, rebuilt.left_out)
        return rebuilt.log

    # -- faults and proof ------------------------------------------------------------------------------

    def corrupt(self, fault: Fault, pieces: PackedPieces) -> None:
        """An injected fault: flip bits of what this step wrote, in its mirror or in live KV.

        It strikes the first block that the step made whole, or else the first one that it wrote to.
        """
        mirror = self._mirror
        if mirror is None:
            return
        written = pieces.of_rank(self._rank)
        piece = next((p for p in written if p.stop == mirror.groups[p.group].block_size), written[0])
        if fault.action is FaultAction.CORRUPT_MIRROR:
            mirror.frame(piece.frame)[piece.start * mirror.slot_bytes(piece.group)] ^= 0xFF
        elif fault.action is FaultAction.CORRUPT_KV:
            mirror.flip_signs(block=piece.block, group=piece.group, slots=piece.stop)
            logger.warning(
                "rank %d: injected, %d slots of block %d are corrupt", self._rank, piece.stop, piece.block
            )
            if fault.argument:
                os.kill(os.getpid(), signal.SIGKILL)

    def corrupt_kv(self, slot: int) -> dict[str, Any] | None:
        """Flip a bit of live KV in a block that became whole not long ago; an injected fault. Says where, if there is one."""
        assert self.scrub is not None
        assert self._mirror is not None
        sizes = [group.block_size for group in self._mirror.groups]
        whole = [
            [piece for piece in pieces.of_rank(self._rank) if piece.stop == sizes[piece.group]]
            for pieces in reversed(self._recent)
        ]
        most = max(whole, key=len, default=[])  # a chunk of a prompt, the last one
        if not most:
            return None
        block, group = most[0].block, most[0].group
        return {"block": block, "layer": self.scrub.flip(block=block, group=group, slot=slot)}

    def corrupt_tail(self) -> dict[str, Any] | None:
        """Flip a byte in the mirror of what the last step wrote, unless that made a block whole; an injected fault."""
        assert self._mirror is not None
        last = self._recent[-1] if self._recent else None
        if not last or last.of_rank(self._rank)[0].stop == self._mirror.groups[0].block_size:
            return None
        self.corrupt(Fault(point=FaultPoint.STAGED, rank=self._rank, action=FaultAction.CORRUPT_MIRROR), last)
        return {"block": last.of_rank(self._rank)[0].block}

    def _debug_view(self) -> torch.Tensor:
        """This rank's part of the debug segment, as words like the KV memory."""
        start = self._rank * self._kv_bytes
        region = self._segments["debug"].array[start : start + self._kv_bytes]
        return torch.from_numpy(region).view(self._kv.dtype)

    def _debug_copy(self, pieces: PackedPieces) -> None:
        copy = self._debug_view()
        if not self._debug_started:
            copy.copy_(self._kv)
            self._debug_started = True
        mirror = self._mirror
        assert mirror is not None
        for piece in pieces.of_rank(self._rank):
            mirror.copy_slots(piece.block, piece.group, piece.start, piece.stop, copy)

    def _debug_compare(self, items: list[BlockRestore], refused: list[int]) -> tuple[int, ...]:
        """Blocks whose written slots differ, bit for bit, from what the predecessor held."""
        if not self._page.get_switch(Switch.DEBUG_COPY):
            return ()
        mirror, copy = self._mirror, self._debug_view()
        assert mirror is not None
        self._debug_started = True
        compared = [item for item in items if item.block not in refused]
        different = tuple(
            item.block
            for item in compared
            if not mirror.slots_equal(item.block, item.group, item.slots, copy)
        )
        self._page.add(Counter.BLOCKS_COMPARED_TOTAL, len(compared))
        self._page.add(Counter.BLOCKS_DIFFERENT_TOTAL, len(different))
        return different
