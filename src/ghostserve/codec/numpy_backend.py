"""numpy alone: 64-bit words, Horner over the bits of the coefficients. What is left when the library is missing.

About a fiftieth of the library's speed with two parities and more; plain XOR is at half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ghostserve.codec.base import Bytes
from ghostserve.codec.field import POLYNOMIAL, PRODUCTS, Elements
from ghostserve.codec.host import HostArrays

_Words: TypeAlias = npt.NDArray[np.uint64]

_WORD_BYTES = 8
_PIECE_BYTES = 1 << 15  # scratch and targets of a piece stay in the L2 cache
_LOW_BITS = np.uint64(0x7F7F7F7F7F7F7F7F)
_HIGH_BITS = np.uint64(0x8080808080808080)
_REDUCE = np.uint64(POLYNOMIAL & 0xFF)
_ONE, _SEVEN = np.uint64(1), np.uint64(7)


class NumpyBackend(HostArrays):
    """`Backend` with numpy."""

    name = "numpy"

    def combine(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[Bytes]],
        targets: Sequence[Sequence[Bytes]],
        *,
        accumulate: bool,
    ) -> None:
        """See `Backend.combine`."""
        for segment_sources, segment_targets in zip(sources, targets, strict=True):
            whole = segment_targets[0].size // _WORD_BYTES * _WORD_BYTES
            for start in range(0, whole, _PIECE_BYTES):
                part = slice(start, min(start + _PIECE_BYTES, whole))
                words = [source[part].view(np.uint64) for source in segment_sources]
                for row, target in zip(matrix, segment_targets, strict=True):
                    _row(row, words, target[part].view(np.uint64), accumulate=accumulate)
            for row, target in zip(matrix, segment_targets, strict=True):
                _tail(row, segment_sources, target, start=whole, accumulate=accumulate)


def _row(row: Elements, sources: Sequence[_Words], target: _Words, *, accumulate: bool) -> None:
    """One target, by Horner's rule over the coefficients' bits: 2 (2 (sum of bit 7) + sum of bit 6) + ..."""
    top = int(np.bitwise_or.reduce(row)).bit_length()
    if top <= 1:  # zeros and ones: plain XOR, straight into the target
        terms = [source for coefficient, source in zip(row, sources, strict=True) if coefficient]
        if not accumulate:
            target[:] = terms.pop(0) if terms else 0
        for term in terms:
            np.bitwise_xor(target, term, out=target)
        return
    total, carry = np.zeros_like(target), np.empty_like(target)
    for bit in reversed(range(top)):
        if bit != top - 1:
            _double(total, carry)
        for coefficient, source in zip(row, sources, strict=True):
            if coefficient >> bit & 1:
                np.bitwise_xor(total, source, out=total)
    if accumulate:
        np.bitwise_xor(target, total, out=target)
    else:
        target[:] = total


def _double(words: _Words, carry: _Words) -> None:
    """Each byte times two, in place."""
    np.bitwise_and(words, _HIGH_BITS, out=carry)
    np.right_shift(carry, _SEVEN, out=carry)
    np.multiply(carry, _REDUCE, out=carry)  # a carry times 0x1d stays within its byte
    np.bitwise_and(words, _LOW_BITS, out=words)
    np.left_shift(words, _ONE, out=words)
    np.bitwise_xor(words, carry, out=words)


def _tail(row: Elements, sources: Sequence[Bytes], target: Bytes, *, start: int, accumulate: bool) -> None:
    if start == target.size:
        return
    if not accumulate:
        target[start:] = 0
    for coefficient, source in zip(row, sources, strict=True):
        target[start:] ^= PRODUCTS[coefficient, source[start:]]
