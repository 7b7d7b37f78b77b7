"""What the disk gives: the same files, read directly, past the page cache, into memory that is already there.

Nothing is done with the bytes, and each buffer is used again and again, so no loader can be expected to be faster. How many reads in
flight are best differs from disk to disk: a few are tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ghostserve.clock import monotonic_s
from ghostserve.errors import CheckFailed
from ghostserve.weights import huge_pages

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """How a disk is asked."""

    in_flight: int
    chunk_bytes: int

    def __str__(self) -> str:
        return f"{self.in_flight} x {self.chunk_bytes // MIB} MiB"


DEPTHS = tuple(
    Depth(in_flight=reads, chunk_bytes=size * MIB)
    for reads, size in ((2, 16), (4, 4), (4, 8), (8, 4), (16, 2))
)


def read_s(paths: Sequence[Path], depth: Depth) -> float:
    """Seconds until every byte of the files was read once, directly. OSError where the file system has no direct reads."""
    with direct_reads(paths, depth) as read:
        began_s = monotonic_s()
        read()
        return monotonic_s() - began_s


@contextmanager
def direct_reads(paths: Sequence[Path], depth: Depth) -> Iterator[Callable[[], None]]:
    """A function that reads every byte of the files once; what it needs is there before it is called."""
    files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    try:
        sizes = [os.fstat(file).st_size for file in files]
        chunks = [
            (file, place)
            for file, size in zip(files, sizes, strict=True)
            for place in range(0, size, depth.chunk_bytes)
        ]
        memory = huge_pages.memory(depth.in_flight * depth.chunk_bytes)
        memory.write(bytes(len(memory)))  # faulted in, before the clock runs
        places = range(0, depth.in_flight * depth.chunk_bytes, depth.chunk_bytes)
        buffers = [memoryview(memory)[place : place + depth.chunk_bytes] for place in places]
        with ThreadPoolExecutor(depth.in_flight) as threads:

            def read() -> None:
                todo = iter(chunks)  # shared: next() holds the interpreter's lock

                def worker(buffer: memoryview) -> int:
                    return sum(os.preadv(file, [buffer], place) for file, place in todo)

                done = sum(threads.map(worker, buffers))
                if done != sum(sizes):
                    raise CheckFailed(
                        f"direct reads returned {done} of {sum(sizes)} bytes: did a file change?"
                    )

            yield read
    finally:
        for file in files:
            os.close(file)
