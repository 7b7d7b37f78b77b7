"""The native library: found, loaded by ctypes, its functions typed. No CPython API, so one build serves every Python.

`python -m ghostserve.native.build` makes it; scripts/install does so, and wheels carry it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

ABI = 5
"""What ghostserve_abi of gf256.c has to say."""

LIBRARY = Path(__file__).parent / "libghostserve.so"


class Path256(IntEnum):
    """How gf256.c multiplies; the fastest that the processor has is the last it supports in this order."""

    PORTABLE = 0
    AVX2 = 1
    GFNI512 = 2
    NEON = 3


class Flags256(IntFlag):
    """What gf256.c is told about a call."""

    ACCUMULATE = 1
    FIRST_ROW_XOR = 2
    POWERS = 4
    STREAM = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """The loaded library. Its functions are called without the interpreter's lock."""

    library: ctypes.CDLL
    paths: tuple[Path256, ...]
    read_width_bytes: int  # for ghostserve_read

    @property
    def combine(self) -> Callable[..., None]:
        """ghostserve_gf256_combine(path, rows, columns, tables, matrices, segments, sources, targets, lengths, flags).

        All but the counts are addresses. Nothing is checked, not even the path.
        """
        function: Callable[..., None] = self.library.ghostserve_gf256_combine
        return function

    @property
    def read(self) -> Callable[..., int]:
        """ghostserve_read(width, columns, length, sources): read shards and write nothing."""
        function: Callable[..., int] = self.library.ghostserve_read
        return function


def load(library: Path | None = None) -> Native:
    """The library, LIBRARY by default, loaded once. OSError if it is not there, not for this machine, or of another build."""
    return _load(library or LIBRARY)


@functools.cache
def _load(library: Path) -> Native:
    loaded = ctypes.CDLL(str(library))
    try:
        abi = loaded.ghostserve_abi()
        _type_functions(loaded)
    except AttributeError as error:
        raise OSError(f"{library} is of another build: {error}") from None
    if abi != ABI:
        raise OSError(f"{library} is of another build: interface {abi} instead of {ABI}")
    paths = tuple(path for path in Path256 if loaded.ghostserve_gf256_supports(path))
    width = {Path256.GFNI512: 64, Path256.AVX2: 32}.get(paths[-1], 16)
    return Native(library=loaded, paths=paths, read_width_bytes=width)


def _type_functions(loaded: ctypes.CDLL) -> None:
    pointer = ctypes.c_void_p
    loaded.ghostserve_gf256_supports.argtypes = [ctypes.c_int]
    loaded.ghostserve_gf256_supports.restype = ctypes.c_int
    loaded.ghostserve_gf256_combine.argtypes = [
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, pointer, pointer),
        *(ctypes.c_size_t, pointer, pointer, pointer, ctypes.c_uint),
    ]
    loaded.ghostserve_gf256_combine.restype = None
    loaded.ghostserve_read.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t, pointer]
    loaded.ghostserve_read.restype = ctypes.c_uint64
