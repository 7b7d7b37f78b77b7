"""What a lost rank is given back, block by block: which blocks, from where, and whether to believe the bytes.

`decide` and `restores` are what the engine core does, `rebuild_log` what the newcomer does. Knows neither KV memory nor
processes; bytes are packed logs, as arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ghostserve.codec.base import Bytes, Codec
from ghostserve.errors import CorruptionError
from ghostserve.native.checksum import crc32
from ghostserve.shadow.manifest import Manifest, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRestore:
    """How a lost rank gets one block back.

    From a mirror: `frame` is its packed log. From parity: `frame` is None, `parity` the parity frames and
    `survivors` the frames into which each surviving rank exports its live block.
    `checksum` covers the log of the lost rank up to `slots`, `parity_checksums` the parity frames of a full block.
    """

    block: int
    group: int
    slots: int
    checksum: int
    frame: int | None
    parity: tuple[int, ...] = ()
    parity_checksums: tuple[int, ...] = ()
    survivors: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """Blocks to restore, and why each of the others cannot be."""

    restored: tuple[int, ...]
    lost: dict[int, str]


def decide(
    manifest: Manifest | None, needed: Mapping[int, int], *, lost: frozenset[int], forced: bool = False
) -> RestorePlan:
    """For every needed block (-> written slots). `forced`: recompute whatever could be rebuilt."""
    restored: list[int] = []
    unrestorable: dict[int, str] = {}
    for block, slots in needed.items():
        if forced or manifest is None:
            unrestorable[block] = "recompute is forced"
            continue
        decision = manifest.source(block, needed=slots, lost=lost)
        if decision.choice is Source.LOST:
            unrestorable[block] = decision.reason
        elif decision.choice is not Source.NOTHING:
            restored.append(block)
    return RestorePlan(restored=tuple(restored), lost=unrestorable)


def restores(
    manifest: Manifest, blocks: Iterable[int], *, rank: int, survivors: Sequence[int], reserve: range
) -> list[BlockRestore]:
    """What the newcomer of `rank` gets for these blocks; survivors export into frames of `reserve`, in order.

    An entry that is being coded still has its mirrors, and keeps them until the restore is over (`Protection.hold`).
    """
    found = []
    for index, block in enumerate(blocks):
        entry = manifest.entries[block]
        if entry.mirrors:
            source = BlockRestore(
                block=block,
                group=entry.group,
                slots=entry.slots,
                checksum=entry.checksums[rank],
                frame=entry.mirrors[rank],
            )
        else:
            first = reserve.start + index * (manifest.ranks - 1)
            frames = range(first, first + len(survivors))
            assert frames.stop <= reserve.stop, f"{index + 1} blocks at a time, {len(reserve)} frames"
            source = BlockRestore(
                block=block,
                group=entry.group,
                slots=entry.slots,
                checksum=entry.checksums[rank],
                frame=None,
                parity=entry.parity,
                parity_checksums=entry.parity_checksums,
                survivors=dict(zip(survivors, frames, strict=True)),
            )
        found.append(source)
    return found


def check_log(log: Bytes, *, block: int, checksum: int) -> None:
    """CorruptionError unless the bytes have this crc32."""
    if (found := crc32(log)) != checksum:
        raise CorruptionError(f"block {block}: crc32 {found:08x} is not the recorded {checksum:08x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """A packed log from a stripe; `left_out` parities differed from their own checksums."""

    log: Bytes
    left_out: int = 0


def rebuild_log(
    codec: Codec,
    *,
    rank: int,
    data: Sequence[Bytes | None],
    parity: Sequence[Bytes],
    parity_checksums: Sequence[int],
    checksum: int | None,
) -> Rebuilt:
    """The packed log of `rank` of a coded block, from the survivors' exports (None: lost) and the parity.

    If it comes out wrong (`checksum`; None: not looked at), parities that differ from their own checksums are left out,
    as long as enough others are left. Whether the result is right is for the caller to check.
    """
    nbytes = next(shard.size for shard in (*data, *parity) if shard is not None)
    log = np.empty(nbytes, dtype=np.uint8)
    codec.reconstruct([*data, *parity], lost=[rank], out=[log])
    if checksum is None or crc32(log) == checksum:
        return Rebuilt(log=log)
    sound = [
        shard if crc32(shard) == expected else None
        for shard, expected in zip(parity, parity_checksums, strict=True)
    ]
    wrong, lost = (sum(shard is None for shard in some) for some in (sound, data))
    if not 0 < wrong <= len(parity) - lost:
        return Rebuilt(log=log)
    codec.reconstruct([*data, *sound], lost=[rank], out=[log])
    return Rebuilt(log=log, left_out=wrong)
