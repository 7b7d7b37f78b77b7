"""Memory that is used again as soon as nobody looks at it any more.

New memory is cleared by the kernel, page by page at the first touch, which takes longer than a good disk takes to fill it. Who
loads a model looks at a tensor once and drops it, so a little memory is enough for all of it.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from ghostserve.weights import huge_pages
from ghostserve.weights.destination import Bytes

FREE_MAX_BYTES = 512 << 20
"""What may lie about unused; the oldest goes."""


class Recycler:
    """Hands memory out, and takes it back when the last array over it is gone. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._returned: deque[mmap.mmap] = (
            deque()
        )  # appended to by finalizers, which must not wait for a lock
        self._free: list[mmap.mmap] = []

    def take(self, nbytes: int) -> Bytes:
        """At least so many bytes, whatever is in them, from the beginning of a page on."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            fits = [memory for memory in self._free if len(memory) >= nbytes]
            memory = min(fits, key=len) if fits else None
            if memory is not None:
                self._free.remove(memory)
            while sum(map(len, self._free)) > FREE_MAX_BYTES:
                del self._free[0]
        if memory is None:
            memory = huge_pages.memory(nbytes)
        loan = _Loan(memory)
        weakref.finalize(loan, self._returned.append, memory).atexit = False
        return np.asarray(loan)


class _Loan:
    """Lives as long as an array over the memory."""

    def __init__(self, memory: mmap.mmap) -> None:
        array = np.frombuffer(memory, dtype=np.uint8)
        self.__array_interface__: dict[str, Any] = array.__array_interface__
