"""A rank's side of the scrub: compares its live KV with checksums, and puts single blocks right in place.

Called between steps only, so the KV it reads is what the last accepted step left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ghostserve.codec.base import Bytes
from ghostserve.engine.messages import RepairReport
from ghostserve.native.checksum import crc32
from ghostserve.shadow.mirror import Mirror
from ghostserve.shadow.restore import BlockRestore
from ghostserve.shadow.scrub import Check, difference


@dataclass(frozen=True, slots=True, kw_only=True)
class RankScrub:
    """Borrows the rank's mirror. `decode` gives this rank's log of a coded block; what it gives is not checked."""

    rank: int
    mirror: Mirror
    decode: Callable[[Mirror, BlockRestore], Bytes]

    def wrong(self, checks: Sequence[Check]) -> tuple[int, ...]:
        """The places in `checks` of blocks whose live KV on this rank differs from its checksum."""
        return tuple(
            place for place, check in enumerate(checks) if self._live_crc(check) != check.checksums[self.rank]
        )

    def repair(self, item: BlockRestore) -> RepairReport:
        """Overwrite the live KV of a block with what has its checksum; nothing is written if that cannot be had."""
        nbytes = item.slots * self.mirror.slot_bytes(item.group)
        log = self.decode(self.mirror, item) if item.frame is None else self.mirror.frame(item.frame)
        right = log[:nbytes].copy()  # of a frame: what was compared is what is written
        found = crc32(right)
        if found != item.checksum:
            what = "decoded from the others and parity" if item.frame is None else "its mirror"
            return RepairReport(
                ok=False, reason=f"{what} has crc32 {found:08x}, not the recorded {item.checksum:08x}"
            )
        live = self._gather(item.block, item.group, item.slots)
        self.mirror.adopt(
            block=item.block, group=item.group, slots=item.slots, log=right, checksum=item.checksum
        )
        if crc32(self._gather(item.block, item.group, item.slots)) != item.checksum:
            return RepairReport(ok=False, reason="the KV memory does not keep what is written to it")
        return self._report(live, right, item.group)

    def restore_mirror(self, check: Check) -> RepairReport:
        """Overwrite this rank's mirror of a block with live KV, if that has the checksum of the mirror."""
        live = self._gather(check.block, check.group, check.slots)
        found, recorded = crc32(live), check.checksums[self.rank]
        if found != recorded:
            return RepairReport(
                ok=False, reason=f"live KV has crc32 {found:08x}, too, not the recorded {recorded:08x}"
            )
        frame = self.mirror.frame(check.frames[self.rank])[: len(live)]
        before = frame.copy()
        frame[:] = live
        return self._report(before, live, check.group)

    def flip(self, *, block: int, group: int, slot: int) -> str:
        """Flip a bit of the exponent in every word of live KV that the last layer has in a slot: an injected fault.

        Returns the layer's name.
        """
        layout, word_bytes = self.mirror.groups[group], self.mirror.word_bytes
        name, words = layout.named_layers[-1]
        log = self._gather(block, group, layout.block_size)
        stop = (slot + 1) * self.mirror.slot_bytes(group)
        log[stop - words * word_bytes : stop].reshape(-1, word_bytes)[:, -1] ^= (
            0x40  # little-endian: the high byte
        )
        self.mirror.adopt(block=block, group=group, slots=layout.block_size, log=log, checksum=None)
        return name

    def _report(self, wrong: Bytes, right: Bytes, group: int) -> RepairReport:
        mirror = self.mirror
        place = difference(
            wrong, right, word_bytes=mirror.word_bytes, layers=mirror.groups[group].named_layers
        )
        return RepairReport(ok=True, layers=place.layers, slots=place.slots)

    def _live_crc(self, check: Check) -> int:
        return crc32(self._gather(check.block, check.group, check.slots))

    def _gather(self, block: int, group: int, slots: int) -> Bytes:
        log = np.empty(slots * self.mirror.slot_bytes(group), dtype=np.uint8)
        self.mirror.gather(block=block, group=group, slots=slots, target=log)
        return log
