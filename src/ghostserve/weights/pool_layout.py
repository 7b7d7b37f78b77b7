"""Where things lie in the memory of a pool entry. Pure.

    | the image, `nbytes` long |  | trailer |  | meta |
    0                          data_end        meta_begin

The trailer is one page: what the entry is, how far it is filled, and how long the meta is that the filler adds when it
publishes (the table of a rank image). It begins at a multiple of 64 KiB, the largest page that Linux uses anywhere, so
that it can be mapped alone; what lies between has no memory behind it.
"""

from __future__ import annotations

import struct

ALIGNMENT_BYTES = 65536
TRAILER_BYTES = ALIGNMENT_BYTES  # in the file; one page of memory
META_BYTES_MAX = 16 << 20

TRAILER = struct.Struct("<8sQQQQ")  # magic, nbytes, ready bytes, abandoned, meta bytes
MAGIC = b"GSPOOL\0\1"
READY_AT, ABANDONED_AT, META_AT = 16, 24, 32  # within the trailer


def data_end(nbytes: int) -> int:
    """Where the trailer begins."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def meta_begin(nbytes: int) -> int:
    return data_end(nbytes) + TRAILER_BYTES


def total_bytes(nbytes: int, *, meta_bytes: int = 0) -> int:
    """Length of the memory of an entry, which is also what it is charged."""
    return meta_begin(nbytes) + meta_bytes
