"""Where a token's bytes lie inside a KV block. Pure: numbers in, numbers out.

A block of one KV group on one rank holds `block_size` token slots of every layer of the group. A slot is
not a byte range: on CPU the K half is stored transposed, so one token is 130 and more scattered runs. The
slot map says, for each slot, which words of the block belong to it. It is found by probing: all slots of a
scratch block are written through the layer's own KV write, once with ones everywhere and once per bit of the
slot number, and the bit planes read back give the slot of every word.

    plane "all":  1 1 1 1 …   words that belong to some slot
    plane bit 0:  0 1 0 1 …   words of odd slots
    plane bit 1:  0 0 1 1 …                            slot = Σ bit_k · 2^k

A *packed log* is a block's bytes reordered slot by slot: [slot 0 | slot 1 | … ], each `slot_bytes` long. It is
the only form kept in the arena and the only form that is coded, so the arena never needs the slot map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ghostserve.errors import UnsupportedError

FRAME_ALIGNMENT_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLayout:
    """One KV group on one rank: `block_size` slots of `slot_bytes` each (all layers together)."""

    block_size: int
    slot_bytes: int
    fingerprint: str

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All KV groups of one rank. Two ranks may exchange packed logs only if their layouts are equal."""

    groups: tuple[GroupLayout, ...]
    num_blocks: int

    @property
    def frame_bytes(self) -> int:
        """Bytes of an arena frame: room for the packed log of a whole block of any group."""
        largest = max(group.block_bytes for group in self.groups)
        return -(-largest // FRAME_ALIGNMENT_BYTES) * FRAME_ALIGNMENT_BYTES

    @property
    def fingerprint(self) -> str:
        parts = [f"{g.block_size}:{g.slot_bytes}:{g.fingerprint}" for g in self.groups]
        return hashlib.sha256("|".join([*parts, str(self.num_blocks)]).encode()).hexdigest()[:32]


def probe_bits(block_size: int) -> int:
    """How many bit planes tell `block_size` slots apart."""
    return max(1, (block_size - 1).bit_length())


def probe_values(block_size: int, plane: int | None) -> npt.NDArray[np.float32]:
    """What to write into each slot for one plane (`None`: the "all" plane). Shape [block_size], 0.0 or 1.0."""
    if plane is None:
        return np.ones(block_size, dtype=np.float32)
    return ((np.arange(block_size) >> plane) & 1).astype(np.float32)


def slot_words(
    used: npt.NDArray[np.bool_], planes: Sequence[npt.NDArray[np.bool_]], *, block_size: int
) -> npt.NDArray[np.int64]:
    """Word offsets of every slot, from what the probe read back.

    `used` and each of `planes` have one element per word of the page. Returns [block_size, words_per_slot],
    ascending within a slot. Raises UnsupportedError if the slots do not own equally many words: then the
    layout is none of ours and nothing of it may be mirrored.
    """
    slots = np.zeros(used.shape, dtype=np.int64)
    for bit, plane in enumerate(planes):
        slots |= plane.astype(np.int64) << bit
    words = np.flatnonzero(used)
    order = np.argsort(slots[words], kind="stable")
    counts = np.bincount(slots[words], minlength=block_size)
    if len(counts) != block_size or counts.min() != counts.max() or counts[0] == 0:
        raise UnsupportedError(
            f"the KV layout has slots of unequal size ({counts.min()} to {counts.max()} words over "
            f"{len(counts)} slots of {block_size}); run with --protection none"
        )
    return words[order].reshape(block_size, -1)


def words_fingerprint(words: npt.NDArray[np.int64]) -> str:
    """Identity of a slot map; equal on two ranks exactly if their packed logs mean the same."""
    return hashlib.sha256(np.ascontiguousarray(words).tobytes() + str(words.shape).encode()).hexdigest()[:32]
