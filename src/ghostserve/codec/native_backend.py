"""The C library on numpy arrays: tables made once for each matrix, long shards split over threads.

The library runs without the interpreter's lock. Pointer tables cost about a microsecond a shard; who encodes the
same buffers again and again keeps the call (`prepare`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghostserve.codec.base import Bytes
from ghostserve.codec.field import PRODUCTS, Elements
from ghostserve.codec.host import HostArrays, address
from ghostserve.codec.matrix import POWERS_M_MAX, powers_matrix
from ghostserve.native import Flags256, Native, Path256, load

THREAD_BYTES_MIN = 1 << 20
"""A thread gets at least so much of each shard: handing work over costs 20 to 50 microseconds."""

STREAM_PIECE_BYTES_MIN = 64 << 10
"""Shorter targets are never written around the cache."""

_ALIGNMENT = 4096  # parts of threads begin on pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What gf256.c wants to know of a matrix."""

    rows: int
    columns: int
    nibbles: Elements  # (rows, columns, 32)
    matrices: npt.NDArray[np.uint64]  # (rows, columns)
    flags: Flags256


@functools.lru_cache(maxsize=4096)
def _tables(content: bytes, rows: int, columns: int) -> Tables:
    matrix = np.frombuffer(content, np.uint8).reshape(rows, columns)
    low = np.arange(16, dtype=np.uint8)
    nibbles = np.concatenate(
        [PRODUCTS[matrix[..., None], low], PRODUCTS[matrix[..., None], low << 4]], axis=2
    )
    flags = Flags256(0)
    if (matrix[0] == 1).all():
        flags |= Flags256.FIRST_ROW_XOR
        if rows <= POWERS_M_MAX and np.array_equal(matrix, powers_matrix(columns, rows)):
            flags |= Flags256.POWERS
    return Tables(
        rows=rows,
        columns=columns,
        nibbles=np.ascontiguousarray(nibbles),
        matrices=BIT_MATRICES[matrix],
        flags=flags,
    )


def _bit_matrices() -> npt.NDArray[np.uint64]:
    """Multiplication by each element as the 8x8 bit matrix of GF2P8AFFINEQB: byte 7 - i makes bit i of the product."""
    products = PRODUCTS[:, 1 << np.arange(8)]  # (element, bit of the factor)
    bits = (
        products[:, None, :] >> np.arange(8)[None, :, None] & 1
    )  # (element, bit of the product, bit of the factor)
    rows = (bits << np.arange(8)).sum(axis=2, dtype=np.uint64)
    matrices: npt.NDArray[np.uint64] = (rows << (8 * (7 - np.arange(8))).astype(np.uint64)).sum(
        axis=1, dtype=np.uint64
    )
    return matrices


BIT_MATRICES = _bit_matrices()


def _last_level_cache_bytes() -> int:
    """What the system says of the first processor's largest cache; 32 MiB if it says nothing."""
    sizes = [32 << 20]
    with contextlib.suppress(OSError, ValueError):
        found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in found] or sizes
    return max(sizes)


STREAM_BYTES_MIN = max(8 << 20, _last_level_cache_bytes() // 2)
"""Sources and targets together, from where targets are written around the cache: they would not stay in it."""


class NativeBackend(HostArrays):
    """`Backend` by gf256.c. OSError without the library, ValueError for a path that this processor lacks."""

    def __init__(self, *, path: Path256 | None = None, threads: int | None = 1) -> None:
        """`path`: the fastest by default. `threads`: at most so many for a call, None for all CPUs of this process.

        A backend with several threads is not to be used in a forked child: they are not there.
        """
        self._native: Native = load()
        self._path = self._native.paths[-1] if path is None else path
        if self._path not in self._native.paths:
            raise ValueError(f"this processor or build has no {self._path.name}")
        self._threads = _cpus() if threads is None else threads
        self._pool = ThreadPoolExecutor(self._threads, "gf256") if self._threads > 1 else None

    @property
    def name(self) -> str:
        """See `Backend.name`."""
        return f"native ({self._path.name.lower()})"

    def combine(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[Bytes]],
        targets: Sequence[Sequence[Bytes]],
        *,
        accumulate: bool,
    ) -> None:
        """See `Backend.combine`."""
        self.prepare(matrix, sources, targets, accumulate=accumulate)()

    def prepare(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[Bytes]],
        targets: Sequence[Sequence[Bytes]],
        *,
        accumulate: bool = False,
    ) -> Callable[[], None]:
        """`combine`, to be called as often as wanted: the pointer tables are made once. It keeps the arrays alive."""
        if not sources:
            return lambda: None
        rows, columns = matrix.shape
        tables = _tables(matrix.tobytes(), rows, columns)
        pointers = _Pointers(
            sources=np.array([[address(piece) for piece in segment] for segment in sources], np.uint64),
            targets=np.array([[address(piece) for piece in segment] for segment in targets], np.uint64),
            lengths=np.array([segment[0].size for segment in sources], np.uint64),
        )
        flags = tables.flags
        if accumulate:
            flags |= Flags256.ACCUMULATE
        elif _should_stream(pointers.lengths, rows=rows, columns=columns):
            flags |= Flags256.STREAM
        arrays = (sources, targets)
        calls = [self._prepared(tables, part, flags, arrays) for part in pointers.split(self._threads)]
        return calls[0] if len(calls) == 1 else functools.partial(self._together, calls)

    def _prepared(
        self, tables: Tables, part: _Pointers, flags: Flags256, arrays: object
    ) -> Callable[[], None]:
        """The library's function with its arguments; what these point to lives as long."""
        call = functools.partial(
            self._native.combine,
            int(self._path),
            tables.rows,
            tables.columns,
            address(tables.nibbles),
            tables.matrices.ctypes.data,
            len(part.lengths),
            part.sources.ctypes.data,
            part.targets.ctypes.data,
            part.lengths.ctypes.data,
            int(flags),
        )
        vars(call)["alive"] = (tables, part, arrays)
        return call

    def _together(self, calls: Sequence[Callable[[], None]]) -> None:
        assert self._pool is not None
        others = [self._pool.submit(call) for call in calls[1:]]
        try:
            calls[0]()
        finally:
            wait(others)  # also when interrupted: they write to the caller's arrays
        for other in others:
            other.result()


def _cpus() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _should_stream(lengths: npt.NDArray[np.uint64], *, rows: int, columns: int) -> bool:
    """Whether writing around the cache pays: the targets would not stay in it, and few of them are made of many sources.

    With about as many targets as sources it loses, up to fivefold where their addresses are alike modulo 4096.
    """
    few = rows <= 4 and columns >= 2 * rows + 2
    long = (rows + columns) * int(lengths.sum()) >= STREAM_BYTES_MIN
    return few and long and int(lengths.min()) >= STREAM_PIECE_BYTES_MIN


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pointers:
    """Addresses of all segments: sources (segments, columns), targets (segments, rows), lengths (segments,)."""

    sources: npt.NDArray[np.uint64]
    targets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]

    def split(self, parts_max: int) -> list[_Pointers]:
        """Parts of about equal length, most of them no shorter than THREAD_BYTES_MIN for each shard."""
        total = int(self.lengths.sum())
        parts = min(parts_max, total // THREAD_BYTES_MIN)
        if parts <= 1:
            return [self]
        share = -(-total // (parts * _ALIGNMENT)) * _ALIGNMENT
        ends = np.cumsum(self.lengths.astype(np.int64))
        begins = ends - self.lengths.astype(np.int64)
        return [self._between(start, start + share, begins, ends) for start in range(0, total, share)]

    def _between(
        self, start: int, stop: int, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> _Pointers:
        """The bytes from `start` to `stop`, counted over all segments."""
        inside = np.flatnonzero((ends > start) & (begins < stop))
        first = np.maximum(begins[inside], start)
        skip = (first - begins[inside]).astype(np.uint64)[:, None]
        return _Pointers(
            sources=self.sources[inside] + skip,
            targets=self.targets[inside] + skip,
            lengths=(np.minimum(ends[inside], stop) - first).astype(np.uint64),
        )
