"""Reads ranges of a file into memory: several large reads in flight, an in-order watermark, no wait without an end.

    threads      take the next chunk ── read ── compare checksums ── copy (where it could not be read in place) ── done
    the caller   waits; whenever the first chunks without a gap have grown, it is told how many bytes are ready

Reads release the interpreter's lock, so threads are enough to keep a disk busy. Whoever is stuck in the kernel (a network
file system whose server is gone) is left behind: after `stall_s` seconds in which nothing moved the caller gets an error,
and the stuck thread keeps hold of the file and of the memory until the kernel lets it go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghostserve import clock
from ghostserve.errors import WeightsReadError
from ghostserve.weights import huge_pages
from ghostserve.weights.bounded import STALL_S, WAIT_S, answer_within
from ghostserve.weights.checksums import CELL_BYTES, Checksums
from ghostserve.weights.destination import Bytes, Destination, Memory
from ghostserve.weights.model_files import WeightsFile
from ghostserve.weights.ranges import ALIGN_BYTES, CHUNK_BYTES, DEPTH, Chunk, Range, plan
from ghostserve.weights.source import Source

LEAVE_S = 5.0
"""How long threads are waited for after an error, so that as a rule nothing writes to the memory any more."""


@dataclass(slots=True, kw_only=True)
class ReadStats:
    """How it went."""

    wall_s: float = 0.0
    bytes_wanted: int = 0
    bytes_read: int = 0
    """More than wanted: whole blocks, whole checksum cells, gaps not worth going around."""
    bytes_direct: int = 0
    """Of those read, past the page cache."""
    bytes_copied: int = 0
    """Of those wanted, not read in place."""
    reads: int = 0

    def add(self, other: ReadStats) -> None:
        """Take the counts of another one, of the next file or of a thread, in."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def read_ranges(
    path: Path,
    ranges: Sequence[Range],
    into: Destination | memoryview | None,
    *,
    depth: int = DEPTH,
    chunk_bytes: int = CHUNK_BYTES,
    direct: bool | None = None,
    on_ready: Callable[[int], None] | None = None,
    may_begin: Callable[[int, float], bool] | None = None,
    verify: Checksums | None = None,
    expect: WeightsFile | None = None,
    stall_s: float = STALL_S,
) -> ReadStats:
    """Read `ranges` of the file at `path`, ascending and apart, to their places in `into`; then all of it is there.

    `into`: memory should begin at a page, and be private where it need not be shared. Read in place is what lies at the same distance
    from a multiple of 4096 in file and memory, the rest is copied. None: read and check only.
    `on_ready` is called in this thread with how many of the bytes wanted, in order, are there and checked. What it raises
    ends the read.
    `may_begin` is asked in the threads, before they read from a byte of the file on, whether they may; it answers within the seconds
    given. What it raises ends the read.
    `verify`: every cell touched is read as a whole and compared before any of its bytes counts as ready.
    `expect`: the file when its header was read. Without it, it must not change from when it is opened.

    A WeightsError by its kind. After one the content of `into` is undefined, and while a thread hangs in the kernel it
    may still be written to: let go of the memory, do not use it again for something else.
    """
    began = clock.monotonic_s()
    target = Memory(into) if isinstance(into, memoryview) else into
    if target is not None and any(wanted.at + wanted.end - wanted.begin > target.nbytes for wanted in ranges):
        raise ValueError(f"the destination has {target.nbytes} bytes, and a range ends behind it")
    source = answer_within(stall_s, lambda: Source(path, direct=direct), path)
    try:
        nbytes, mtime_ns = (expect or source).nbytes, (expect or source).mtime_ns
        answer_within(stall_s, lambda: source.check_unchanged(nbytes=nbytes, mtime_ns=mtime_ns), path)
        align_bytes = ALIGN_BYTES if verify is None else CELL_BYTES
        chunks = plan(ranges, file_bytes=nbytes, chunk_bytes=chunk_bytes, align_bytes=align_bytes)
        job = _Job(source, chunks, target, verify, may_begin)
        job.run(depth, on_ready, stall_s)
        answer_within(stall_s, lambda: source.check_unchanged(nbytes=nbytes, mtime_ns=mtime_ns), path)
    finally:
        source.leave()
    stats = job.stats
    stats.bytes_wanted = sum(wanted.end - wanted.begin for wanted in ranges)
    stats.wall_s = clock.monotonic_s() - began
    return stats


class _Job:
    """The chunks of one file, done by several threads."""

    def __init__(
        self,
        source: Source,
        chunks: Sequence[Chunk],
        target: Destination | None,
        verify: Checksums | None,
        may_begin: Callable[[int, float], bool] | None,
    ) -> None:
        self._source = source
        self._chunks = chunks
        self._target = target
        self._verify = verify
        self._may_begin = may_begin
        self._news = threading.Condition()  # guards what follows
        self._next = 0
        self._open: set[int] = set()
        self._held_back: set[int] = set()  # of those open
        self._done: set[int] = set()
        self._error: BaseException | None = None
        self._stop = False
        self._moves = 0  # but not this: any change will do
        self.stats = ReadStats()

    def run(self, depth: int, on_ready: Callable[[int], None] | None, stall_s: float) -> None:
        """Until all chunks are done, or one failed, or nothing moves."""
        threads: list[threading.Thread] = []
        try:
            threads.extend(map(self._start, range(min(depth, len(self._chunks)))))
            at = 0
            while at < len(self._chunks):
                at = self._wait_for(at, stall_s)
                if on_ready is not None:
                    on_ready(self._chunks[at - 1].ready)
        finally:
            with self._news:
                self._stop = True
            deadline = clock.monotonic_s() + LEAVE_S
            for thread in threads:
                thread.join(max(0.0, deadline - clock.monotonic_s()))
            self._error = None  # its traceback holds this object, and so the destination

    def _start(self, number: int) -> threading.Thread:
        thread = threading.Thread(target=self._work, name=f"ghostserve-read-{number}", daemon=True)
        self._source.enter()
        try:
            thread.start()
        except BaseException:
            self._source.leave()
            raise
        return thread

    def _wait_for(self, at: int, stall_s: float) -> int:
        """How many chunks from the first on are done, once that is more than `at`."""
        idle_s, moves = 0.0, self._moves
        with self._news:
            while self._error is None and at not in self._done:
                if idle_s >= stall_s:
                    offset = self._chunks[min(self._open, default=at)].offset
                    raise WeightsReadError(
                        f"{self._source.path}: nothing was read for {stall_s:g} s, from byte {offset} on; "
                        "check the disk, or the connection to the server of its file system"
                    )
                self._news.wait(min(WAIT_S, stall_s))
                still = moves == self._moves and at not in self._held_back
                idle_s = idle_s + min(WAIT_S, stall_s) if still else 0.0
                moves = self._moves
            if self._error is not None:
                raise self._error
            while at in self._done:
                self._done.remove(at)
                at += 1
            return at

    def _work(self) -> None:
        """A thread: one chunk after the other."""
        stats = ReadStats()
        staging = np.empty(0, dtype=np.uint8)
        try:
            while (number := self._take()) is not None:
                chunk = self._chunks[number]
                if not self._begin(number):
                    return
                place = self._place(chunk)
                if place is not None:
                    self._read(chunk, place, stats)
                else:
                    staging = staging if staging.size else self._make_staging()
                    self._read(chunk, staging[: chunk.nbytes], stats)
                    self._copy(chunk, staging, stats)
                del place  # or it would keep memory that others wait for
                with self._news:
                    self._open.remove(number)
                    self._done.add(number)
                    self._moved(chunk.nbytes)
                    self._news.notify()
        except BaseException as error:
            with self._news:
                self._error = self._error or error
                self._news.notify()
        finally:
            with self._news:
                self.stats.add(stats)
            self._source.leave()

    def _take(self) -> int | None:
        """The number of the next chunk; None if there is none, or it is over."""
        with self._news:
            number = self._next
            if self._stop or self._error is not None or number == len(self._chunks):
                return None
            self._next += 1
            self._open.add(number)
            return number

    def _begin(self, number: int) -> bool:
        """Wait until the chunk may be read; False if it is over."""
        if self._may_begin is None or self._may_begin(self._chunks[number].offset, 0.0):
            return True
        with self._news:
            self._held_back.add(number)
        while not self._stop and self._error is None:
            if self._may_begin(self._chunks[number].offset, WAIT_S):
                with self._news:
                    self._held_back.remove(number)
                    self._moved(1)  # only now does its time begin
                return True
        return False

    def _place(self, chunk: Chunk) -> Bytes | None:
        """Where in the destination the chunk can be read to; None if it has to be copied there."""
        if self._target is None or chunk.whole is None:
            return None
        place = self._target.place(chunk.whole, chunk.nbytes)
        return None if place is None or (self._source.direct and place.ctypes.data % ALIGN_BYTES) else place

    def _read(self, chunk: Chunk, into: Bytes, stats: ReadStats) -> None:
        stats.bytes_direct += self._source.read(chunk.offset, into.data, self._moved)
        if self._verify is not None:
            self._verify.check(chunk.offset, into)
        stats.reads += 1
        stats.bytes_read += chunk.nbytes

    def _make_staging(self) -> Bytes:
        nbytes = max(chunk.nbytes for chunk in self._chunks)
        return np.frombuffer(huge_pages.memory(nbytes), dtype=np.uint8)

    def _copy(self, chunk: Chunk, staging: Bytes, stats: ReadStats) -> None:
        if self._target is None:
            return
        for piece in chunk.pieces:
            self._target.put(piece.target, staging[piece.source : piece.source + piece.nbytes])
            stats.bytes_copied += piece.nbytes

    def _moved(self, nbytes: int) -> None:
        self._moves += nbytes
