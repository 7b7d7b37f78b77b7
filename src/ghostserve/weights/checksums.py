"""What the bytes of a file were when it was first loaded: a crc32 for every 4 MiB.

They are compared by the threads that read, chunk by chunk, while the disk fills the next one. A file of which nothing is
known is trusted, and its checksums are kept: they find what changes later, by accident, without a new time of change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghostserve.errors import WeightsChecksumError
from ghostserve.native.checksum import crc32

CELL_BYTES = 4 << 20
"""The bytes under one checksum, counted from the start of the file; the last may be shorter."""


class Checksums:
    """Of one file. Threads check different cells at the same time."""

    def __init__(
        self,
        path: Path,
        nbytes: int,
        known: Sequence[int | None] | None = None,
        *,
        kept_in: Path | None = None,
    ) -> None:
        """`known`: one value per cell, None where none is known. `kept_in`: where they come from, for the error."""
        cells = -(-nbytes // CELL_BYTES)
        assert known is None or len(known) == cells
        self.path = path
        self.nbytes = nbytes
        self.values: list[int | None] = [None] * cells if known is None else list(known)
        self.learned = 0
        """How many of them were not known before."""
        self._kept_in = kept_in

    @property
    def complete(self) -> bool:
        """Whether all are known."""
        return None not in self.values

    def check(self, offset: int, data: npt.NDArray[np.uint8]) -> None:
        """Compare the cells that begin at `offset` with what is known of them, or learn it.

        `data` is whole cells. WeightsChecksumError names the first that differs.
        """
        assert offset % CELL_BYTES == 0
        assert data.size % CELL_BYTES == 0 or offset + data.size == self.nbytes
        for begin in range(0, data.size, CELL_BYTES):
            cell = (offset + begin) // CELL_BYTES
            value, known = crc32(data[begin : begin + CELL_BYTES]), self.values[cell]
            if known is None:
                self.values[cell] = value
                self.learned += 1  # approximately: threads may step on each other
            elif known != value:
                raise self._error(cell, value, known)

    def _error(self, cell: int, value: int, known: int) -> WeightsChecksumError:
        begin = cell * CELL_BYTES
        end = min(begin + CELL_BYTES, self.nbytes)
        kept = "" if self._kept_in is None else f"; if you changed it on purpose, remove {self._kept_in}"
        return WeightsChecksumError(
            f"{self.path}: bytes {begin} to {end} are not what they were when the file was first loaded (crc32 {value:08x}, "
            f"then {known:08x}), though its size and time are: the disk or memory is failing, or the file was exchanged; "
            f"download the model again{kept}"
        )
