"""What an erasure code over byte shards is, and what a backend has to do. Knows no KV, no arena and no process.

A stripe is n data shards and m parity shards of equal length in bytes. Shards are numbered 0..n-1 (data),
n..n+m-1 (parity). The codes are systematic: data shards are stored as they are.

A shard is one array, or a sequence of arrays that follow one another (scattered: one per block and layer, say).
Arrays have any type and are taken as the bytes they consist of; only their innermost dimension must be
contiguous, so a strided view of a KV cache is a shard as it is. Pieces of different shards may be cut at
different places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ghostserve.codec.field import Elements

Bytes: TypeAlias = npt.NDArray[np.uint8]
"""uint8, one dimension, contiguous."""

Shard: TypeAlias = Any
"""An array of the backend's library (numpy or torch), or a sequence of such arrays."""

PieceT = TypeVar("PieceT")
"""A contiguous run of bytes as the backend's library shows it: one-dimensional uint8."""


class Backend(Protocol[PieceT]):
    """Matrix times shards over GF(2^8), and how to look at the arrays it works on.

    One contract test runs over every backend, and each must give the reference's bytes. Calls keep no state that
    a caller sees and may run in several threads on different targets.
    """

    @property
    def name(self) -> str:
        """What a user calls it, with the path that was chosen: `native (avx2)`."""

    def pieces(self, shard: Shard) -> list[PieceT]:
        """The shard's contiguous runs, in order, empty ones left out; they share its memory.

        UsageError if it is no array of this backend's library, or if its innermost dimension has gaps.
        """

    def is_writable(self, piece: PieceT) -> bool:
        """Whether it may be a target."""

    def span(self, piece: PieceT) -> tuple[int, int]:
        """Address and length in bytes."""

    def empty(self, nbytes: int, *, like: PieceT | None) -> PieceT:
        """New memory, not initialised, where `like` lies."""

    def any_difference(self, left: PieceT, right: PieceT) -> bool:
        """Whether two pieces of equal length differ."""

    def combine(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[PieceT]],
        targets: Sequence[Sequence[PieceT]],
        *,
        accumulate: bool,
    ) -> None:
        """targets[s][r] = sum_j matrix[r, j] * sources[s][j] for every segment s; added to what is there if `accumulate`.

        Checked by the caller: matrix has shape (rows, columns), both at least 1; each segment has that many
        targets and sources, all of one length; no target overlaps another or a source. On an error what the
        targets hold is undefined. A device backend queues the work on the current stream and does not wait.
        """


class Codec(Protocol):
    """An erasure code. Calls keep no state and may run in several threads on different shards.

    Each byte of parity depends only on the bytes at the same place of the data, so a stripe may be encoded or
    reconstructed in pieces. Shards of zero bytes are allowed. Every method raises UsageError, before it writes
    anything, if number, type or length of the shards is wrong, if an output is read-only, or if it overlaps itself or another
    shard of the call.
    Not checked: what the shards contain (that needs checksums, which are the caller's), and that no other
    thread writes to them meanwhile. If the backend fails midway, what outputs hold is undefined.
    """

    @property
    def n(self) -> int:
        """Data shards of a stripe."""

    @property
    def m(self) -> int:
        """Parity shards of a stripe, which is also how many lost shards can be rebuilt."""

    def encode(self, data: Sequence[Shard], parity: Sequence[Shard]) -> None:
        """Fill the m shards `parity` from the n shards `data`; what `parity` held is overwritten."""

    def reconstruct(
        self, shards: Sequence[Shard | None], *, lost: Sequence[int], out: Sequence[Shard]
    ) -> None:
        """Rebuild the shards numbered `lost` into `out`, in that order.

        `shards` are all n + m, None for the missing ones and for those not to be used; `lost` names missing
        ones, data or parity, not necessarily all. UsageError if that is not so, or if more than m are missing.
        """

    def update(self, index: int, *, old: Shard, new: Shard, parity: Sequence[Shard]) -> None:
        """Bring the m shards `parity` up to date after data shard `index` changed from `old` to `new`.

        `old` and `new` may share memory with each other, not with `parity`.
        """

    def verify(self, shards: Sequence[Shard]) -> tuple[int, ...]:
        """Which parities do not belong to the data, as shard numbers; empty if all n + m shards fit."""

    def locate(self, shards: Sequence[Shard]) -> int | None:
        """Which single one of all n + m shards is wrong, wherever in it; None if all fit. Needs m >= 2.

        CorruptionError if no single wrong shard explains the bytes. If more than m - 1 shards are wrong at the
        same place, the answer can be a shard that is right: m parities cannot tell.
        """
