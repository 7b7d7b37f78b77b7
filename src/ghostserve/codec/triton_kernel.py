"""The GPU kernel: all targets in one pass over the sources, which are given by pointers. Needs Triton to be imported.

Four bytes are multiplied by two at once in a 32-bit word, so there are no tables, and a program's words are read and
written 16 bytes at a time where the pointers allow. The matrix is a compile-time number: one kernel for each
(sources, targets, matrix), with no multiplication left by zero or one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _twice(words):
    """Each byte times two. The shift of signed words drags in bits that the mask removes."""
    return ((words & 0x7F7F7F7F) << 1) ^ (((words >> 7) & 0x01010101) * 0x1D)


@triton.jit
def _twice_bytes(values):
    """The same for one byte in each lane."""
    return ((values & 0x7F) << 1) ^ (((values >> 7) & 1) * 0x1D)


@triton.constexpr_function
def _coefficient(matrix, columns, row, column):
    return (matrix >> (8 * (row * columns + column))) & 0xFF


@triton.constexpr_function
def _highest(matrix, columns, column):
    every = 0
    for row in range(4):
        every |= (matrix >> (8 * (row * columns + column))) & 0xFF
    return every.bit_length()


@triton.jit
def _load(table, index, at, inside, WORDS: tl.constexpr):
    """Lanes `at` of the shard that pointer `index` of the table names, as 32-bit numbers."""
    address = tl.load(table + index)
    if WORDS:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
        return tl.load(pointer + at, mask=inside, other=0)
    return tl.load(address.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _store(table, index, at, inside, value, WORDS: tl.constexpr, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        value ^= _load(table, index, at, inside, WORDS)
    address = tl.load(table + index)
    if WORDS:
        tl.store(tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + at, value, mask=inside)
    else:
        tl.store(address.to(tl.pointer_type(tl.uint8)) + at, value.to(tl.uint8), mask=inside)


@triton.jit
def combine_kernel(
    sources,  # int64 (segments, COLUMNS): addresses
    targets,  # int64 (segments, ROWS)
    lanes,  # int64 (segments,): words or bytes of each segment; words: a multiple of four
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,  # at most 4
    MATRIX: tl.constexpr,  # byte r * COLUMNS + j of this number is the coefficient
    HORNER: tl.constexpr,  # row r holds the powers of 2^r
    WORDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK lanes of one segment."""
    segment = tl.program_id(1)
    length = tl.load(lanes + segment)
    if WORDS:
        length = tl.multiple_of(length, 4)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first >= length:
        return
    at = first + tl.arange(0, BLOCK)
    inside = at < length
    source_table = sources + segment * COLUMNS
    sum0 = tl.zeros((BLOCK,), tl.int32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for step in tl.static_range(COLUMNS):
        x = _load(source_table, COLUMNS - 1 - step, at, inside, WORDS)
        if HORNER:
            sum0 ^= x
            if ROWS > 1:
                sum1 = (_twice(sum1) if WORDS else _twice_bytes(sum1)) ^ x
            if ROWS > 2:
                sum2 = _twice(_twice(sum2)) if WORDS else _twice_bytes(_twice_bytes(sum2))
                sum2 ^= x
        else:
            for bit in tl.static_range(8):
                if (_coefficient(MATRIX, COLUMNS, 0, COLUMNS - 1 - step) >> bit) & 1:
                    sum0 ^= x
                if (_coefficient(MATRIX, COLUMNS, 1, COLUMNS - 1 - step) >> bit) & 1:
                    sum1 ^= x
                if (_coefficient(MATRIX, COLUMNS, 2, COLUMNS - 1 - step) >> bit) & 1:
                    sum2 ^= x
                if (_coefficient(MATRIX, COLUMNS, 3, COLUMNS - 1 - step) >> bit) & 1:
                    sum3 ^= x
                if bit + 1 < _highest(MATRIX, COLUMNS, COLUMNS - 1 - step):
                    x = _twice(x) if WORDS else _twice_bytes(x)
    target_table = targets + segment * ROWS
    _store(target_table, 0, at, inside, sum0, WORDS, ACCUMULATE)
    if ROWS > 1:
        _store(target_table, 1, at, inside, sum1, WORDS, ACCUMULATE)
    if ROWS > 2:
        _store(target_table, 2, at, inside, sum2, WORDS, ACCUMULATE)
    if ROWS > 3:
        _store(target_table, 3, at, inside, sum3, WORDS, ACCUMULATE)
