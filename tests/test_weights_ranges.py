"""The plan of reads: every byte wanted arrives once, from large aligned reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostserve.weights import ranges as module
from ghostserve.weights.ranges import ALIGN_BYTES, CHUNK_BYTES, Chunk, Piece, Range, packed, plan

MIB = 1 << 20
CONTENT = bytes(byte % 251 for byte in range(60_000))


def test_a_whole_file_is_read_in_place() -> None:
    chunks = plan([Range(0, 20 * MIB + 5, 0)], file_bytes=20 * MIB + 5)
    assert chunks == (
        Chunk(0, 8 * MIB, (Piece(0, 0, 8 * MIB),), 8 * MIB),
        Chunk(8 * MIB, 8 * MIB, (Piece(0, 8 * MIB, 8 * MIB),), 16 * MIB),
        Chunk(16 * MIB, 4 * MIB + 5, (Piece(0, 16 * MIB, 4 * MIB + 5),), 20 * MIB + 5),
    )
    assert [chunk.whole for chunk in chunks] == [0, 8 * MIB, 16 * MIB]


def test_tiny_tensors_share_a_read_and_far_ones_do_not() -> None:
    near = plan(packed([(100, 108), (4200, 4300), (90_000, 90_001)]), file_bytes=10 * MIB)
    assert [(chunk.offset, chunk.nbytes) for chunk in near] == [(0, 90_112)]
    assert near[0].pieces == (Piece(100, 0, 8), Piece(4200, 8, 100), Piece(90_000, 108, 1))
    assert near[0].whole is None
    far = plan(packed([(100, 108), (MIB, MIB + 1)]), file_bytes=10 * MIB)
    assert [(chunk.offset, chunk.nbytes) for chunk in far] == [(0, 4096), (MIB, 4096)]
    assert [chunk.ready for chunk in far] == [8, 9]


def test_nothing_wanted_is_nothing_read() -> None:
    assert plan([], file_bytes=100) == ()
    assert plan([Range(5, 5, 0), Range(100, 100, 0)], file_bytes=100) == ()


def test_chunks_hold_whole_cells() -> None:
    chunks = plan([Range(5, 9 * MIB, 0)], file_bytes=30 * MIB, chunk_bytes=MIB, align_bytes=4 * MIB)
    assert [(chunk.offset, chunk.nbytes) for chunk in chunks] == [(0, 4 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, 4 * MIB)]  # fmt: skip


@pytest.mark.parametrize(
    "wanted",
    [
        [Range(0, 101, 0)],
        [Range(-1, 5, 0)],
        [Range(0, 5, -1)],
        [Range(9, 5, 0)],
        [Range(0, 10, 0), Range(9, 12, 10)],
        [Range(50, 60, 0), Range(0, 10, 10)],
    ],
)
def test_what_cannot_be_read_is_refused(wanted: list[Range]) -> None:
    with pytest.raises(ValueError, match="not ascending, or not in the file"):
        plan(wanted, file_bytes=100)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_every_byte_wanted_arrives_once(data: st.DataObject) -> None:
    file_bytes = data.draw(st.integers(1, 60_000))
    cuts = sorted(data.draw(st.lists(st.integers(0, file_bytes), min_size=2, max_size=12)))
    wanted = packed(
        (begin, end) for begin, end in zip(cuts[::2], cuts[1::2], strict=False) if data.draw(st.booleans())
    )
    align = data.draw(st.sampled_from([1, 512, 4096, 16_384]))
    chunk_bytes = data.draw(st.integers(1000, 50_000))
    chunks = plan(wanted, file_bytes=file_bytes, chunk_bytes=chunk_bytes, align_bytes=align)
    content = CONTENT[:file_bytes]
    total = sum(range_.end - range_.begin for range_ in wanted)
    got, times = bytearray(total), np.zeros(total, dtype=np.uint8)
    at = ready = 0
    for chunk in chunks:
        assert chunk.offset >= at
        at = chunk.offset + chunk.nbytes
        assert chunk.offset % align == 0
        assert chunk.nbytes % align == 0 or at == file_bytes
        assert 0 < chunk.nbytes < chunk_bytes + align
        for piece in chunk.pieces:
            assert piece.source + piece.nbytes <= chunk.nbytes
            begin = chunk.offset + piece.source
            got[piece.target : piece.target + piece.nbytes] = content[begin : begin + piece.nbytes]
            times[piece.target : piece.target + piece.nbytes] += 1
            ready += piece.nbytes
        assert chunk.ready == ready
    assert (times == 1).all()
    assert bytes(got) == b"".join(content[range_.begin : range_.end] for range_ in wanted)


def test_chunks_begin_where_checksums_do() -> None:
    assert CHUNK_BYTES % (4 * MIB) == 0
    assert CHUNK_BYTES % ALIGN_BYTES == module.GAP_BYTES % ALIGN_BYTES == 0
