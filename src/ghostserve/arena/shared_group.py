"""Sums and copies among processes of one machine over memory that they share: native/collectives.c, by ctypes.

Linux only (futexes, pidfds). Knows addresses and counts, no tensors. The caller brings the memory (`memory_bytes`
of it, zeroed, mapped in every process) and a pidfd for each peer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ghostserve.errors import ProtocolError
from ghostserve.native import load

LANE_BYTES = 64
RANKS_MAX = 64
PROGRESS_WORDS = 3
"""Rounds met since the group was formed, nanoseconds waited for peers in all, 1 while waiting."""


class Dtype(IntEnum):
    """Element types that can be summed."""

    F32 = 0
    F64 = 1
    F16 = 2
    BF16 = 3
    I8 = 4
    U8 = 5
    I16 = 6
    I32 = 7
    I64 = 8


class _Status(IntEnum):
    DONE = 0
    ABORTED = 1
    TIMED_OUT = 2
    REFUSED = 3
    PEER_GONE = 4


class _Group(ctypes.Structure):
    """`struct group` of collectives.c."""

    _fields_ = (
        ("lanes", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("channels", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("progress", ctypes.c_void_p),
        ("pidfds", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("ranks", ctypes.c_uint32),
        ("round", ctypes.c_uint32),
        ("spins", ctypes.c_uint32),
    )


class GroupAbandoned(ProtocolError):
    """A collective ended without a result: a peer is gone, or has left the group, or did not come in time."""


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.ghostserve_all_reduce.argtypes = [pointer, pointer, size, ctypes.c_int]
    library.ghostserve_all_gather.argtypes = [pointer, pointer, pointer, size]
    library.ghostserve_broadcast.argtypes = [pointer, pointer, size, ctypes.c_uint32]
    library.ghostserve_send.argtypes = [pointer, pointer, size, ctypes.c_uint32]
    library.ghostserve_recv.argtypes = [pointer, pointer, size, ctypes.c_uint32]
    library.ghostserve_abort.argtypes = [pointer]
    library.ghostserve_abort.restype = None
    return library


def memory_bytes(ranks: int, slot_bytes: int) -> int:
    """What a group of `ranks` processes with slots of `slot_bytes` (a multiple of 64) needs.

    Of sparse memory: what no message has gone through yet costs nothing.
    """
    return ranks * (LANE_BYTES + 2 * slot_bytes) + ranks * ranks * (2 * LANE_BYTES + slot_bytes)


class SharedGroup:
    """One process's part in a group. Not thread-safe; every rank makes the same calls in the same order.

    A call that raises GroupAbandoned leaves its buffers undefined, and the group is of no use any more.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        *,
        rank: int,
        ranks: int,
        pidfds: Sequence[int],
        slot_bytes: int,
        timeout_s: float,
        progress: npt.NDArray[np.uint64] | None = None,
        spins: int = 2000,
    ) -> None:
        """`pidfds`: one for each rank, negative for those not to watch (oneself). They and `memory` stay the caller's.

        `progress`: PROGRESS_WORDS of memory, shared with whoever watches this rank: see `struct progress`.
        """
        assert slot_bytes > 0
        assert slot_bytes % LANE_BYTES == 0
        assert len(pidfds) == ranks <= RANKS_MAX
        assert memory.size >= memory_bytes(ranks, slot_bytes)
        self._memory: npt.NDArray[np.uint8] | None = memory
        self._library = _typed(load().library)
        self._progress = np.zeros(PROGRESS_WORDS, np.uint64) if progress is None else progress
        assert self._progress.size == PROGRESS_WORDS
        self._progress[0] = self._progress[2] = 0
        self._pidfds = (ctypes.c_int32 * ranks)(*pidfds)
        address = int(memory.__array_interface__["data"][0])
        channels = address + ranks * (LANE_BYTES + 2 * slot_bytes)
        self._group = _Group(
            lanes=address,
            slots=address + ranks * LANE_BYTES,
            channels=channels,
            pieces=channels + ranks * ranks * 2 * LANE_BYTES,
            progress=int(self._progress.__array_interface__["data"][0]),
            pidfds=ctypes.addressof(self._pidfds),
            slot_bytes=slot_bytes,
            timeout_ns=int(timeout_s * 1e9),
            rank=rank,
            ranks=ranks,
            round=0,
            spins=spins,
        )
        self._place = ctypes.addressof(self._group)
        self._ranks, self._timeout_s = ranks, timeout_s

    def all_reduce(self, buffer: int, *, count: int, dtype: Dtype) -> None:
        """Add up `count` elements at the address `buffer`, in place; the order of the ranks, the same bits for all."""
        self._call("all_reduce", buffer, count, dtype)

    def all_gather(self, source: int, target: int, *, nbytes: int) -> None:
        """Every rank's `nbytes` at `source`, in the order of the ranks, to `target`; 0 if this rank does not want them."""
        self._call("all_gather", source, target, nbytes)

    def broadcast(self, buffer: int, *, nbytes: int, source: int) -> None:
        """`nbytes` at `buffer` of rank `source` to everybody's `buffer`."""
        self._call("broadcast", buffer, nbytes, source)

    def send(self, buffer: int, *, nbytes: int, to: int) -> None:
        """`nbytes` at `buffer` to another rank, which calls `recv` for as many. No other rank takes part.

        Returns once they may be overwritten; that they were received is not known.
        """
        self._message("send", buffer, nbytes, to)

    def recv(self, buffer: int, *, nbytes: int, source: int) -> None:
        """The next `nbytes` that another rank sends to this one, to `buffer`."""
        self._message("recv", buffer, nbytes, source)

    def set_timeout(self, timeout_s: float) -> None:
        """Bound every later wait for a peer that lives."""
        self._group.timeout_ns = int(timeout_s * 1e9)
        self._timeout_s = timeout_s

    def abandon(self) -> None:
        """Leave for good: every rank leaves what it waits for, now and from now on. May be called again."""
        if self._memory is not None:
            self._library.ghostserve_abort(self._place)
        self._memory = None

    def _message(self, what: str, buffer: int, nbytes: int, peer: int) -> None:
        assert 0 <= peer < self._ranks
        assert peer != self._group.rank
        self._call(what, buffer, nbytes, peer)

    def _call(self, what: str, *arguments: int) -> None:
        if self._memory is None:
            raise GroupAbandoned(f"{what}: this process has left the group")
        status = getattr(self._library, f"ghostserve_{what}")(self._place, *arguments)
        match status:
            case _Status.DONE:
                return
            case _Status.ABORTED:
                raise GroupAbandoned(f"{what}: a peer has left the group")
            case _Status.PEER_GONE:
                raise GroupAbandoned(f"{what}: the process of a peer has ended")
            case _Status.TIMED_OUT:
                raise GroupAbandoned(f"{what}: a peer did not come within {self._timeout_s:g} s")
        raise AssertionError(f"{what} was refused: {status}")
