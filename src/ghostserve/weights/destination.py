"""Where bytes of a file go as they are read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Destination(Protocol):
    """Room for bytes 0 to `nbytes`. Threads use it at the same time, each for bytes of its own."""

    nbytes: int

    def place(self, at: int, nbytes: int) -> Bytes | None:
        """The memory of these bytes, to be read into; None where they have to be `put`."""
        ...

    def put(self, at: int, data: Bytes) -> None:
        """Copy `data`, which is wanted as one piece, to its place."""
        ...


class Memory:
    """One piece of it."""

    def __init__(self, memory: memoryview) -> None:
        """ValueError if it is not writable."""
        self._memory = np.frombuffer(memory, dtype=np.uint8)
        if not self._memory.flags.writeable:
            raise ValueError("the destination is not writable")
        self.nbytes = self._memory.size

    def place(self, at: int, nbytes: int) -> Bytes | None:
        return self._memory[at : at + nbytes]

    def put(self, at: int, data: Bytes) -> None:
        self._memory[at : at + data.size] = data
