"""One weights file that a process reads for itself alone: what it wants of it, a little ahead of what it takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ghostserve.weights.arriving import Arriving
from ghostserve.weights.blocks import Blocks
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.destination import Bytes
from ghostserve.weights.model_files import WeightsFile
from ghostserve.weights.recycled import Recycler

AHEAD_BYTES = 128 << 20
"""Enough to keep a disk busy while a tensor is worked on; as much memory is in use, beside what is being worked on."""


class OwnFile:
    """See `engine.loader_files.FileBytes`."""

    def __init__(
        self,
        file: WeightsFile,
        spans: Sequence[tuple[int, int]],
        recycler: Recycler,
        *,
        direct: bool | None,
        verify: Checksums | None,
    ) -> None:
        """`spans`: the tensors that will be asked for, ascending."""
        self._blocks = Blocks(spans, recycler, nbytes=file.nbytes)
        self.arriving = Arriving(
            file,
            self._blocks.ranges,
            self._blocks,
            direct=direct,
            verify=verify,
            ahead_bytes=AHEAD_BYTES,
        )

    def get(self, begin: int, end: int) -> Bytes:
        if begin == end:
            return np.empty(0, dtype=np.uint8)
        self.arriving.until(end)
        return self._blocks.take(begin, end)

    @property
    def arrived(self) -> bool:
        return self.arriving.arrived

    def wait(self) -> None:
        self.arriving.wait()

    def close(self) -> None:
        self.arriving.close()
