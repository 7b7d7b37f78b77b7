"""The erasure code: shapes and aliasing checked, shards cut into segments, matrices chosen. A backend does the bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Generic

import numpy as np

from ghostserve.codec import matrix
from ghostserve.codec.base import Backend, PieceT, Shard
from ghostserve.codec.field import PRODUCTS, Elements
from ghostserve.errors import CorruptionError, UsageError

SCRATCH_BYTES = 1 << 20  # what `verify` and `locate` compute at once, for each parity


class ErasureCodec(Generic[PieceT]):
    """`Codec` for every n and m that `matrix.check_size` allows, on any backend."""

    def __init__(self, n: int, m: int, backend: Backend[PieceT]) -> None:
        self._matrix = matrix.parity_matrix(n, m)
        self._n, self._m = n, m
        self._backend = backend

    @property
    def n(self) -> int:
        return self._n

    @property
    def m(self) -> int:
        return self._m

    @property
    def backend(self) -> Backend[PieceT]:
        """What computes."""
        return self._backend

    def encode(self, data: Sequence[Shard], parity: Sequence[Shard]) -> None:
        sources = self._take(data, count=self._n, what="data")
        targets = self._take(parity, count=self._m, what="parity")
        self._combine(self._matrix, sources, targets, what="parity")

    def reconstruct(
        self, shards: Sequence[Shard | None], *, lost: Sequence[int], out: Sequence[Shard]
    ) -> None:
        missing = self._missing(shards, lost)
        targets = self._take(out, count=len(lost), what="output")
        present = [index for index in range(self._n + self._m) if index not in missing]
        pieces = self._take([shards[index] for index in present], count=len(present), what="present")
        if not lost:
            return
        chosen = matrix.choose_sources(self._n, present, lost)
        coefficients = matrix.rebuild_matrix(self._n, self._m, chosen, tuple(lost))
        used = np.flatnonzero(coefficients.any(axis=0))  # a lost parity 0 does not need the other parities
        sources = [pieces[present.index(chosen[index])] for index in used]
        self._combine(coefficients[:, used], sources, targets, what="output", untouched=pieces)

    def update(self, index: int, *, old: Shard, new: Shard, parity: Sequence[Shard]) -> None:
        if not 0 <= index < self._n:
            raise UsageError(f"data shard {index} changed, but they are numbered 0 to {self._n - 1}")
        sources = self._take([old, new], count=2, what="old and new")
        targets = self._take(parity, count=self._m, what="parity")
        column = self._matrix[:, index]
        self._combine(np.stack([column, column], axis=1), sources, targets, what="parity", accumulate=True)

    def verify(self, shards: Sequence[Shard]) -> tuple[int, ...]:
        wrong: set[int] = set()
        for _, bad in self._syndromes(shards):
            wrong.update(bad)
        return tuple(self._n + row for row in sorted(wrong))

    def locate(self, shards: Sequence[Shard]) -> int | None:
        if self._m < 2:
            raise UsageError(
                f"{self._m} parity shard tells that something is wrong, not what: at least 2 needed"
            )
        suspects: set[int] | None = None
        for syndromes, bad in self._syndromes(shards):
            if not bad:
                continue
            found = {self._n + bad[0]} if len(bad) == 1 else self._explaining(syndromes)
            suspects = found if suspects is None else suspects & found
            if not suspects:
                raise CorruptionError(f"more than one of the {self._n + self._m} shards is wrong")
        # The columns of an MDS code differ pairwise in every two rows, so one wrong byte leaves one suspect.
        return None if suspects is None else min(suspects)

    # ---- the pieces of a call ----------------------------------------------------------------------------------------

    def _take(self, shards: Sequence[Shard | None], *, count: int, what: str) -> list[list[PieceT]]:
        """The pieces of each shard; UsageError unless there are `count` shards of one length."""
        if len(shards) != count:
            raise UsageError(f"{len(shards)} {what} shards given, {count} needed")
        taken = [self._backend.pieces(shard) for shard in shards]
        lengths = [self._length(pieces) for pieces in taken]
        for index, length in enumerate(lengths):
            if length != lengths[0]:
                raise UsageError(f"{what} shard {index} has {length} bytes, shard 0 has {lengths[0]}")
        return taken

    def _length(self, pieces: Iterable[PieceT]) -> int:
        return sum(self._backend.span(piece)[1] for piece in pieces)

    def _missing(self, shards: Sequence[Shard | None], lost: Sequence[int]) -> set[int]:
        total = self._n + self._m
        if len(shards) != total:
            raise UsageError(f"{len(shards)} shards given, {self._n} data and {self._m} parity needed")
        missing = {index for index, shard in enumerate(shards) if shard is None}
        if len(missing) > self._m:
            raise UsageError(
                f"shards {sorted(missing)} are missing; {self._m} parity shards rebuild at most {self._m}"
            )
        if len(set(lost)) != len(lost) or not set(lost) <= missing:
            raise UsageError(f"shards {list(lost)} to rebuild, but {sorted(missing)} are missing")
        return missing

    def _combine(
        self,
        coefficients: Elements,
        sources: list[list[PieceT]],
        targets: list[list[PieceT]],
        *,
        what: str,
        accumulate: bool = False,
        untouched: list[list[PieceT]] | None = None,
    ) -> None:
        """`untouched`: what no target may overlap, where that is more than the sources."""
        length, wanted = self._length(sources[0]), self._length(targets[0])
        if length != wanted:
            raise UsageError(f"{what} shards have {wanted} bytes, the others {length}")
        for index, pieces in enumerate(targets):
            if not all(map(self._backend.is_writable, pieces)):
                raise UsageError(f"{what} shard {index} is read-only")
        self._check_apart(targets, untouched or sources, what=what)
        segments = cut(self._backend, [*sources, *targets])
        self._backend.combine(
            coefficients,
            [segment[: len(sources)] for segment in segments],
            [segment[len(sources) :] for segment in segments],
            accumulate=accumulate,
        )

    def _check_apart(self, targets: list[list[PieceT]], others: list[list[PieceT]], *, what: str) -> None:
        """UsageError if a target overlaps another target or one of the others."""
        spans = [
            (*self._backend.span(piece), index)
            for index, pieces in enumerate((*targets, *others))
            for piece in pieces
        ]
        spans.sort()
        end, holder = 0, -1
        for start, length, index in spans:
            if start < end and min(index, holder) < len(targets):
                raise UsageError(
                    f"{what} shard {min(index, holder)} overlaps itself or another shard of the call"
                )
            if start + length > end:
                end, holder = start + length, index

    # ---- what does not fit -------------------------------------------------------------------------------------------

    def _syndromes(self, shards: Sequence[Shard]) -> Iterable[tuple[list[PieceT], list[int]]]:
        """What each parity differs by from the one its data would have, and which of these are not zero.

        A part of the length at a time.
        """
        taken = self._take(shards, count=self._n + self._m, what="given")
        like = taken[0][0] if taken[0] else None
        identity = np.eye(self._m, dtype=np.uint8)
        coefficients = np.concatenate([self._matrix, identity], axis=1)
        for segment in cut(self._backend, taken, longest=SCRATCH_BYTES):
            nbytes = self._backend.span(segment[0])[1]
            rows = [self._backend.empty(nbytes, like=like) for _ in range(self._m)]
            self._backend.combine(coefficients, [segment], [rows], accumulate=False)
            zero = self._zero_like(rows[0])
            yield rows, [row for row, piece in enumerate(rows) if self._backend.any_difference(piece, zero)]

    def _explaining(self, syndromes: list[PieceT]) -> set[int]:
        """The data shards whose error alone would give these syndromes: s_r = A[r, j] * s_0 for all r."""
        nbytes = self._backend.span(syndromes[0])[1]
        scratch = self._backend.empty(nbytes, like=syndromes[0])
        found = set()
        for column in range(self._n):
            for row in range(1, self._m):
                factor = PRODUCTS[self._matrix[row, column], 1].reshape(1, 1)
                self._backend.combine(factor, [[syndromes[0]]], [[scratch]], accumulate=False)
                if self._backend.any_difference(scratch, syndromes[row]):
                    break
            else:
                found.add(column)
        return found

    def _zero_like(self, piece: PieceT) -> PieceT:
        zero = self._backend.empty(self._backend.span(piece)[1], like=piece)
        self._backend.combine(np.zeros((1, 1), np.uint8), [[piece]], [[zero]], accumulate=False)
        return zero


def cut(
    backend: Backend[PieceT], shards: Sequence[Sequence[PieceT]], *, longest: int | None = None
) -> list[list[PieceT]]:
    """Segments of equal length across all shards: cut wherever one of them is, and after `longest` bytes."""
    if longest is None and all(len(pieces) == 1 for pieces in shards):
        return [[pieces[0] for pieces in shards]]
    ends = [_ends(backend, pieces) for pieces in shards]
    cuts = {0, *(end for shard in ends for end in shard)}
    if longest is not None:
        cuts |= set(range(0, max(cuts), longest))
    segments = []
    at = [0] * len(shards)
    for start, end in pairwise(sorted(cuts)):
        segment = []
        for index, pieces in enumerate(shards):
            while ends[index][at[index]] <= start:
                at[index] += 1
            piece = pieces[at[index]]
            before = ends[index][at[index]] - backend.span(piece)[1]
            segment.append(piece[start - before : end - before])  # type: ignore[index]
        segments.append(segment)
    return segments


def _ends(backend: Backend[PieceT], pieces: Sequence[PieceT]) -> list[int]:
    ends, end = [], 0
    for piece in pieces:
        end += backend.span(piece)[1]
        ends.append(end)
    return ends
