"""Staging on a CPU in one native call per step (native/stage.c): what `Mirror.stage` does piece by piece.

Between two steps other work has emptied the processor's caches, and Python runs several times slower than in a loop:
with eight streams the pieces of a step cost 0.6 ms that way, on every rank, and every stream waits for them.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ghostserve.errors import CorruptionError
from ghostserve.native import load
from ghostserve.shadow.mirror import GroupMap
from ghostserve.shadow.packed_pieces import PackedPieces
from ghostserve.types import STEPS_IN_FLIGHT_MAX

_POINTS = STEPS_IN_FLIGHT_MAX + 1
_LOG = np.dtype([("count", "<u4"), ("points", [("slots", "<u4"), ("crc", "<u4")], (_POINTS,))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`units` times `words` words, `step` words apart, in a block that is `stride` words from the next."""

    units: int
    words: int
    step: int
    stride: int


class _Slots(ctypes.Structure):
    """`struct slots` of stage.c."""

    _fields_ = (
        ("runs", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("run_count", ctypes.c_uint64),
        ("slot_bytes", ctypes.c_uint64),
        ("block_size", ctypes.c_uint64),
    )


class _Mirror(ctypes.Structure):
    """`struct mirror` of stage.c."""

    _fields_ = (
        ("kv", ctypes.c_void_p),
        ("frames", ctypes.c_void_p),
        ("logs", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("frame_bytes", ctypes.c_uint64),
        ("frame_count", ctypes.c_uint64),
        ("block_count", ctypes.c_uint64),
        ("group_count", ctypes.c_uint64),
    )


class HostStaging:
    """One rank's KV memory, slot maps and frames, as the native library sees them. The memory stays its owner's."""

    def __init__(
        self,
        *,
        kv: npt.NDArray[Any],
        groups: tuple[GroupMap, ...],
        num_blocks: int,
        frames: npt.NDArray[np.uint8],
        frame_bytes: int,
        rank: int,
    ) -> None:
        """`kv`: the whole KV allocation, words as in `groups`.

        Raises OSError without the native library, or where it is of another build or byte order.
        """
        library = load().library
        library.ghostserve_log_bytes.restype = ctypes.c_size_t
        if sys.byteorder != "little" or library.ghostserve_log_bytes() != _LOG.itemsize:
            raise OSError("the native library lays its logs out differently")
        self._stage = library.ghostserve_stage
        pointer, u32 = ctypes.c_void_p, ctypes.c_uint32
        self._stage.argtypes = [pointer, pointer, ctypes.c_size_t, u32, u32, pointer]
        self._stage.restype = ctypes.c_size_t
        self._seed = library.ghostserve_seed
        self._seed.argtypes = [pointer, ctypes.c_uint64, u32, u32]
        self._seed.restype = None
        self._gather = self._of_blocks(library.ghostserve_gather)
        self._scatter = self._of_blocks(library.ghostserve_scatter)
        self._rank = rank
        self._slot_bytes = [group.words_per_slot * kv.itemsize for group in groups]
        self._logs = np.zeros(len(frames) // frame_bytes, dtype=_LOG)
        self._kept: list[Any] = [kv, frames]
        slots = (_Slots * len(groups))(*(self._slots(group, kv.itemsize) for group in groups))
        self._kept.append(slots)
        self._mirror = _Mirror(
            kv=kv.ctypes.data,
            frames=frames.ctypes.data,
            logs=self._logs.ctypes.data,
            groups=ctypes.addressof(slots),
            frame_bytes=frame_bytes,
            frame_count=len(self._logs),
            block_count=num_blocks,
            group_count=len(groups),
        )
        self._place = ctypes.addressof(self._mirror)

    def stage(self, pieces: PackedPieces) -> bytes:
        """Append every piece to its log. Returns the crc32 of each log so far, uint32, little-endian.

        Raises CorruptionError for a piece that lies outside of the KV memory or the frames; the ones before it are done.
        """
        count = len(pieces)
        checksums = bytearray(4 * count)
        if count:
            place = (ctypes.c_char * len(checksums)).from_buffer(checksums)
            done = self._stage(self._place, pieces.words, count, pieces.ranks, self._rank, place)
            if done != count:
                raise CorruptionError(f"{pieces.of_rank(self._rank)[done]} is out of bounds")
        return bytes(checksums)

    def seed(self, *, frame: int, slots: int, checksum: int) -> None:
        """A newcomer takes over a tail's log where its predecessor left it."""
        assert frame < len(self._logs)
        self._seed(self._place, frame, slots, checksum)

    def gather(self, *, block: int, group: int, slots: int, log: npt.NDArray[np.uint8]) -> None:
        """Copy the first `slots` slots of live KV into `log`, a packed log of at least that length."""
        self._copy(self._gather, block, group, slots, log)

    def scatter(self, *, block: int, group: int, slots: int, log: npt.NDArray[np.uint8]) -> None:
        """Write the first `slots` slots of a packed log into KV memory; nobody has checked them here."""
        self._copy(self._scatter, block, group, slots, log)

    def _copy(self, function: Any, block: int, group: int, slots: int, log: npt.NDArray[np.uint8]) -> None:
        assert log.flags.c_contiguous
        assert log.nbytes >= slots * self._slot_bytes[group]
        if not function(self._place, block, group, slots, log.ctypes.data):
            raise CorruptionError(f"{slots} slots of block {block}, group {group}, are out of bounds")

    @staticmethod
    def _of_blocks(function: Any) -> Any:
        u32 = ctypes.c_uint32
        function.argtypes = [ctypes.c_void_p, u32, u32, u32, ctypes.c_void_p]
        function.restype = ctypes.c_int
        return function

    def _slots(self, group: GroupMap, word_bytes: int) -> _Slots:
        firsts, runs = find_runs(group.words.numpy(), group.stride_words.numpy())
        offsets = np.ascontiguousarray(firsts * word_bytes, dtype=np.int64)
        described = np.array(
            [
                (run.units, run.words * word_bytes, run.step * word_bytes, run.stride * word_bytes)
                for run in runs
            ],
            dtype=np.int64,
        )
        self._kept.extend((offsets, described))
        return _Slots(
            runs=described.ctypes.data,
            offsets=offsets.ctypes.data,
            run_count=len(runs),
            slot_bytes=group.words_per_slot * word_bytes,
            block_size=group.block_size,
        )


def find_runs(
    words: npt.NDArray[np.int64], strides: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], list[Run]]:
    """A slot map ([slots, words per slot], and its strides from block to block) as runs that are the same in all slots.

    Words side by side make a unit, equal units at equal distances make a run. Returns where the runs begin in each
    slot, [slots, runs], and the runs.
    """
    apart = (np.diff(words, axis=1) != 1).any(axis=0) | (np.diff(strides) != 0)
    starts = np.flatnonzero(np.concatenate([[True], apart]))
    lengths = np.diff(np.append(starts, words.shape[1]))
    units = words[:, starts]
    steps = np.diff(units, axis=1)
    even = (steps == steps[:1]).all(axis=0) & (np.diff(lengths) == 0) & (np.diff(strides[starts]) == 0)
    firsts: list[int] = []
    runs: list[Run] = []
    for unit, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        step = int(steps[0, unit - 1]) if unit else 0
        if unit and even[unit - 1] and (runs[-1].units == 1 or runs[-1].step == step):
            runs[-1] = replace(runs[-1], units=runs[-1].units + 1, step=step)
        else:
            firsts.append(unit)
            runs.append(Run(units=1, words=length, step=0, stride=int(strides[start])))
    return units[:, firsts], runs
