"""How far an entry is filled: a word behind the image that its filler writes and those who follow read.

Everything before it is as it will stay. Nobody asks the holder: while it is gone or hung, filling goes on.
"""

from __future__ import annotations

import mmap

from ghostserve.arena.records import fence
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.types import Closing
from ghostserve.weights.pool_layout import ABANDONED_AT, READY_AT, data_end
from ghostserve.weights.pool_memory import check_trailer

_POLL_S = 0.0005  # a 4 MiB chunk takes a disk some milliseconds


class Watermark(Closing):
    """Of the entry with memory `fd` and `nbytes`; PoolError if it is none. Not for several threads that advance it.

    `writable` for the filler, who must `close` before publishing: memory mapped for writing cannot be sealed.
    """

    def __init__(self, fd: int, nbytes: int, *, writable: bool = False) -> None:
        check_trailer(fd, nbytes)
        self._nbytes = nbytes
        # Private and never written shows what others write, and does not stand in the way of the seals.
        self._map = mmap.mmap(
            fd,
            mmap.PAGESIZE,
            flags=mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
            offset=data_end(nbytes),
        )
        self._words = memoryview(self._map).cast("Q")

    @property
    def ready_bytes(self) -> int:
        """So many bytes from the start are there."""
        ready: int = self._words[READY_AT // 8]
        fence()
        return min(ready, self._nbytes)

    @property
    def abandoned(self) -> bool:
        """The holder has seen the filler go: nothing more comes."""
        return bool(self._words[ABANDONED_AT // 8])

    def advance(self, ready_bytes: int) -> None:
        """All bytes up to here are written and checked. Never goes back."""
        assert self._words[READY_AT // 8] <= ready_bytes <= self._nbytes, (self.ready_bytes, ready_bytes)
        fence()
        self._words[READY_AT // 8] = ready_bytes

    def wait(self, ready_bytes: int, *, timeout_s: float) -> bool:
        """Wait until so much is ready; False if the filler is gone (`abandoned` then says so) or the time is over.

        `timeout_s` begins anew with every advance: it bounds how long a filler may make no progress.
        """
        seen, deadline_s = self.ready_bytes, monotonic_s() + timeout_s
        while seen < ready_bytes:
            if self.abandoned:
                return self.ready_bytes >= ready_bytes
            now_s = monotonic_s()
            if now_s >= deadline_s:
                return False
            sleep_s(_POLL_S)
            ready = self.ready_bytes
            if ready > seen:
                seen, deadline_s = ready, now_s + timeout_s
        return True

    def close(self) -> None:
        """Unmap. May be called again."""
        self._words.release()
        self._map.close()
