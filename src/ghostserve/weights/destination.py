"""Where bytes of a file go as they are read."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ghostserve.errors import PoolError

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


class SharedFile:
    """A file in memory, from its beginning on.

    Written to, not mapped: the kernel gives new pages to who writes whole ones in half the time it takes to give them cleared, one
    fault at a time, to who maps them (`bench/weights_reader.py` has the figures).
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd, self.nbytes = fd, nbytes

    def place(self, at: int, nbytes: int) -> Bytes | None:
        return None

    def put(self, at: int, data: Bytes) -> None:
        """PoolError if there is no more memory."""
        done = 0
        try:
            while done < data.size:
                done += os.pwrite(self._fd, data[done:].data, at + done)
        except OSError as error:
            raise PoolError(f"the pool's memory cannot be written to: {error.strerror}") from error
