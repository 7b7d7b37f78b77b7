"""Copies slots between one rank's KV memory and frames of the arena, as packed logs.

Knows the KV memory as words and the slot map as word offsets; knows nothing of requests, steps or vLLM. All
copies go through one indexed gather (or scatter) per piece, so the same code serves any device: on a device
the gather happens there and one copy crosses the link.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ghostserve.native.checksum import crc32
from ghostserve.shadow.layout import GroupLayout, Layout, words_fingerprint
from ghostserve.shadow.log_progress import LogProgress
from ghostserve.shadow.restore import check_log

_WORD_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMap:
    """Word offsets of one KV group: `words[slot]` for block 0; block b adds `b * stride_words` elementwise.

    Shapes: words [block_size, words_per_slot], stride_words [words_per_slot], both int64 on the KV's device.
    `layers`: names and words per slot, in the order in which a slot's words are; only to name a place.
    """

    words: torch.Tensor
    stride_words: torch.Tensor
    layers: tuple[tuple[str, int], ...] = ()

    @property
    def block_size(self) -> int:
        return self.words.shape[0]

    @property
    def words_per_slot(self) -> int:
        return self.words.shape[1]

    @property
    def named_layers(self) -> tuple[tuple[str, int], ...]:
        """`layers`; all words as one where they are not known."""
        return self.layers or (("unknown", self.words_per_slot),)


class BlockCopier(Protocol):
    """Copies whole blocks faster than by an index; `HostStaging` on a CPU."""

    def gather(self, *, block: int, group: int, slots: int, log: npt.NDArray[np.uint8]) -> None:
        """Live KV of the first `slots` slots into `log`."""
        ...

    def scatter(self, *, block: int, group: int, slots: int, log: npt.NDArray[np.uint8]) -> None:
        """And back."""
        ...


@dataclass(slots=True)
class Mirror:
    """One rank's view: its KV memory, its slot maps and the arena's frames.

    `kv` is the whole KV allocation as a 1-D integer tensor of word size, `frames` the arena pool as a uint8
    array. Neither is owned.
    """

    kv: torch.Tensor
    groups: tuple[GroupMap, ...]
    num_blocks: int
    frames: npt.NDArray[np.uint8]
    frame_bytes: int
    copier: BlockCopier | None = None
    _progress: LogProgress = field(default_factory=LogProgress)

    @staticmethod
    def words_of(storage: torch.UntypedStorage, word_bytes: int, device: torch.device) -> torch.Tensor:
        """The whole storage as words of `word_bytes`."""
        words = torch.empty(0, dtype=_WORD_DTYPES[word_bytes], device=device)
        return words.set_(storage, 0, (storage.nbytes() // word_bytes,), (1,))

    @property
    def word_bytes(self) -> int:
        return self.kv.element_size()

    def slot_bytes(self, group: int) -> int:
        return self.groups[group].words_per_slot * self.word_bytes

    def layout(self) -> Layout:
        """Layout with fingerprint; equal on all ranks, or nothing may be exchanged."""
        return Layout(
            groups=tuple(
                GroupLayout(
                    block_size=group.block_size,
                    slot_bytes=group.words_per_slot * self.word_bytes,
                    fingerprint=words_fingerprint(
                        torch.cat([group.words.reshape(-1), group.stride_words]).cpu().numpy()
                    ),
                )
                for group in self.groups
            ),
            num_blocks=self.num_blocks,
        )

    def stage(self, *, block: int, group: int, start: int, stop: int, frame: int) -> int:
        """Append slots [start, stop) of a block to its log; returns the crc32 of the log's first `stop` slots.

        Writes only that range of the frame, so what was committed before stays whole if we die here.
        """
        size = self.slot_bytes(group)
        first, checksum = self._progress.begin(frame, start)
        target = self._frame(frame)[first * size : stop * size]
        self._gather(block, group, first, stop, target)
        checksum = crc32(target, checksum)
        self._progress.logged(frame, start=first, stop=stop, checksum=checksum)
        return checksum

    def export(self, *, block: int, group: int, frame: int) -> None:
        """Copy a whole block of live KV into a frame (a survivor's share of a decode)."""
        layout = self.groups[group]
        target = self._frame(frame)[: layout.block_size * self.slot_bytes(group)]
        self._gather(block, group, 0, layout.block_size, target)

    def gather(self, *, block: int, group: int, slots: int, target: npt.NDArray[np.uint8]) -> None:
        """Copy the first `slots` slots of live KV into `target`, as long as their packed log."""
        self._gather(block, group, 0, slots, target)

    def adopt(
        self, *, block: int, group: int, slots: int, log: npt.NDArray[np.uint8], checksum: int | None
    ) -> int:
        """Write the first `slots` slots of a packed log into KV memory, if its checksum holds (None: unchecked).

        Returns the bytes written. Raises CorruptionError and writes nothing otherwise.
        """
        nbytes = slots * self.slot_bytes(group)
        if checksum is not None:
            check_log(log[:nbytes], block=block, checksum=checksum)
        if self.copier is not None:
            self.copier.scatter(block=block, group=group, slots=slots, log=log)
            return nbytes
        source = torch.from_numpy(log[:nbytes]).view(self.kv.dtype).to(self.kv.device)
        self.kv.index_copy_(0, self._index(block, group, 0, slots), source)
        return nbytes

    def seed_progress(self, *, frame: int, slots: int, checksum: int) -> None:
        """A newcomer takes over a tail's log where its predecessor left it."""
        self._progress.seed(frame, slots=slots, checksum=checksum)

    def frame(self, frame: int) -> npt.NDArray[np.uint8]:
        """The bytes of one frame, shape [frame_bytes]; a view, valid while the arena is mapped."""
        return self._frame(frame)

    def slots_equal(self, block: int, group: int, slots: int, other: torch.Tensor) -> bool:
        """Whether the first `slots` slots hold the same bits as in `other`, a copy of the whole KV memory."""
        index = self._index(block, group, 0, slots)
        return torch.equal(self.kv[index], other[index])

    def copy_slots(self, block: int, group: int, start: int, stop: int, other: torch.Tensor) -> None:
        """Copy slots [start, stop) into `other`, a copy of the whole KV memory (debugging only)."""
        index = self._index(block, group, start, stop)
        other[index] = self.kv[index].to(other.device)

    def flip_signs(self, *, block: int, group: int, slots: int) -> None:
        """Flip the highest bit of every word of the first `slots` slots; an injected fault."""
        index = self._index(block, group, 0, slots)
        self.kv[index] ^= torch.iinfo(self.kv.dtype).min

    def _frame(self, frame: int) -> npt.NDArray[np.uint8]:
        return self.frames[frame * self.frame_bytes : (frame + 1) * self.frame_bytes]

    def _index(self, block: int, group: int, start: int, stop: int) -> torch.Tensor:
        layout = self.groups[group]
        return (layout.words[start:stop] + block * layout.stride_words).reshape(-1)

    def _gather(self, block: int, group: int, start: int, stop: int, target: npt.NDArray[np.uint8]) -> None:
        if self.copier is not None and start == 0:
            self.copier.gather(block=block, group=group, slots=stop, log=target)
            return
        log = torch.from_numpy(target).view(self.kv.dtype)
        if self.kv.device.type == "cpu":
            torch.index_select(self.kv, 0, self._index(block, group, start, stop), out=log)
        else:
            log.copy_(torch.index_select(self.kv, 0, self._index(block, group, start, stop)))
