"""The pieces of a step as words: what crosses to the ranks, and what native/stage.c reads as it is.

block  group  start  stop  frame of rank 0 .. frame of rank n-1      uint32, little-endian; then the next piece
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostserve.shadow.manifest import Piece

HEADER_WORDS = 4
_WORD = np.dtype("<u4")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPieces:
    """Pieces of a step, in order, for `ranks` ranks."""

    words: bytes
    ranks: int

    def __len__(self) -> int:
        return len(self.words) // (_WORD.itemsize * (HEADER_WORDS + self.ranks))

    def of_rank(self, rank: int) -> list[RankPiece]:
        """What they ask of one rank."""
        rows = np.frombuffer(self.words, dtype=_WORD).reshape(-1, HEADER_WORDS + self.ranks)
        return [
            RankPiece(block=block, group=group, start=start, stop=stop, frame=frames[rank])
            for block, group, start, stop, *frames in rows.tolist()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPiece:
    """One gather: slots [start, stop) of `block` go to byte `start * slot_bytes` of `frame`."""

    block: int
    group: int
    start: int
    stop: int
    frame: int


def pack_pieces(pieces: Sequence[Piece], *, ranks: int) -> PackedPieces:
    """As words."""
    words = [
        word
        for piece in pieces
        for word in (piece.block, piece.group, piece.start, piece.stop, *piece.frames)
    ]
    return PackedPieces(words=struct.pack(f"<{len(words)}I", *words), ranks=ranks)
