"""Private memory in pages as large as can be had.

A direct read has to name every stretch of memory that it fills, and the kernel cuts it where it has named too many: into scattered
small pages a disk may give half of what it gives into large ones (`bench/weights_reader.py` has the figures).
"""

from __future__ import annotations

import contextlib
import mmap

PAGE_BYTES = 2 << 20
PRIVATE = (
    mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
)  # Python's default is shared memory, whose pages cost twice as much to get


def memory(nbytes: int) -> mmap.mmap:
    """At least so many bytes, zeros; whole large pages. Only what is written to takes memory, a page at a time."""
    found = mmap.mmap(-1, -(-nbytes // PAGE_BYTES) * PAGE_BYTES, flags=PRIVATE)
    with contextlib.suppress(OSError):  # a kernel without them
        found.madvise(mmap.MADV_HUGEPAGE)
    return found
