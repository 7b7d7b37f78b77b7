"""Intel's ISA-L, where it is installed: the yardstick, and a backend for who prefers it.

Found as a system library (`libisal.so.2`) or inside the `pyeclib` wheel. Version 2.31 and later use GFNI; its tables
depend on the processor and are never kept beyond the process. One call takes less than 2 GiB of each shard.

Reference: https://github.com/intel/isa-l, include/erasure_code.h
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostserve.codec.base import Bytes
from ghostserve.codec.field import Elements
from ghostserve.codec.host import HostArrays, address

_CALL_BYTES_MAX = 1 << 30
_TABLE_BYTES = 32  # of one coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class Isal:
    """An installed ISA-L. Versions before 2.31 do not use GFNI."""

    origin: str  # "pyeclib" or "system"
    library: Path
    version: str  # "" if it does not say

    def __str__(self) -> str:
        return f"{self.version or 'unknown version'} ({self.origin})"


@functools.cache
def find_isal() -> Isal | None:
    """The one in the wheel before the system's, which is often older; None if there is none."""
    spec = importlib.util.find_spec("pyeclib")
    if spec is not None and spec.origin is not None:
        for library in sorted(Path(spec.origin).parents[1].glob("pyeclib.libs/libisal*.so*")):
            said = re.search(rb"isa-l-(\d+\.\d+\.\d+)", library.read_bytes())  # of its debug information
            return Isal(origin="pyeclib", library=library, version=said[1].decode() if said else "")
    name = ctypes.util.find_library("isal")
    for directory in map(Path, ("/usr/lib", "/usr/lib64", "/usr/local/lib")) if name else ():
        for library in sorted(directory.rglob(str(name))):
            said_of_name = re.search(r"\.so\.2\.0\.(\d+)$", library.resolve().name)
            return Isal(
                origin="system", library=library, version=f"2.{said_of_name[1]}" if said_of_name else ""
            )
    return None


@functools.cache
def _load(library: Path, level: str) -> tuple[Any, Any]:
    """ec_init_tables and ec_encode_data; `level` ("avx2") takes that path instead of what ISA-L would choose."""
    loaded = ctypes.CDLL(str(library))
    number, pointer = ctypes.c_int, ctypes.c_void_p
    try:
        init = loaded["ec_init_tables_base" if level else "ec_init_tables"]
        encode = loaded[f"ec_encode_data_{level}" if level else "ec_encode_data"]
    except AttributeError as error:
        raise OSError(f"this ISA-L has no path {level!r} of its own to call: {error}") from None
    init.argtypes = [number, number, pointer, pointer]
    encode.argtypes = [number, number, number, pointer, pointer, pointer]
    init.restype = encode.restype = None
    return init, encode


class IsalBackend(HostArrays):
    """`Backend` by ec_encode_data. OSError if ISA-L is not installed, or has no such `level`."""

    def __init__(self, *, level: str = "") -> None:
        found = find_isal()
        if found is None:
            raise OSError("ISA-L is not installed: pip install pyeclib, or libisal2 of the distribution")
        self._label = f"isal {found}{f' {level}' if level else ''}"
        self._init, self._encode = _load(found.library, level)
        self._tables = functools.lru_cache(maxsize=256)(self._make_tables)

    @property
    def name(self) -> str:
        """See `Backend.name`."""
        return self._label

    def combine(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[Bytes]],
        targets: Sequence[Sequence[Bytes]],
        *,
        accumulate: bool,
    ) -> None:
        """See `Backend.combine`."""
        for segment_sources, segment_targets in zip(sources, targets, strict=True):
            made = [np.empty_like(target) for target in segment_targets] if accumulate else segment_targets
            for start in range(0, segment_sources[0].size, _CALL_BYTES_MAX):
                part = slice(start, start + _CALL_BYTES_MAX)
                self.prepare(
                    matrix, [source[part] for source in segment_sources], [target[part] for target in made]
                )()
            if accumulate:
                for target, value in zip(segment_targets, made, strict=True):
                    np.bitwise_xor(target, value, out=target)

    def prepare(
        self, matrix: Elements, sources: Sequence[Bytes], targets: Sequence[Bytes]
    ) -> Callable[[], None]:
        """One call of ec_encode_data, to be made as often as wanted; the arrays must outlive it."""
        rows, columns = matrix.shape
        tables = self._tables(matrix.tobytes(), rows, columns)
        data = np.array([address(source) for source in sources], np.uint64)
        out = np.array([address(target) for target in targets], np.uint64)
        length, function = sources[0].size, self._encode
        places = (address(tables), data.ctypes.data, out.ctypes.data)

        def call(alive: object = (tables, data, out, sources, targets)) -> None:
            function(length, columns, rows, *places)

        return call

    def _make_tables(self, content: bytes, rows: int, columns: int) -> Elements:
        matrix = np.frombuffer(content, np.uint8).copy()
        tables = np.zeros(rows * columns * _TABLE_BYTES, np.uint8)
        self._init(columns, rows, address(matrix), address(tables))
        return tables
