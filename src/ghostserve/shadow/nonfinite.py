"""NaN and infinity in a packed log, counted by their bits. Pure: bytes in, numbers out.

    float32   s eeeeeeee mmm…   exponent all ones: infinity if m = 0, else NaN      (IEEE 754; bfloat16, float16 alike)
    e5m2      s eeeee mm        the same
    e4m3      s eeee mmm        no infinity; all ones but the sign is NaN           (OCP 8-bit floating point, "FN")

A magnitude is the bits without the sign, and above the largest finite one there is nothing else. So one AND and one
maximum tell that a log is sound, and only one that is not is looked at any closer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """How many elements of a log are no numbers, and how many are infinite."""

    nan: int = 0
    inf: int = 0

    def __bool__(self) -> bool:
        return bool(self.nan or self.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    bits: type[np.unsignedinteger]
    infinity: int  # its magnitude; where there is none, that of NaN
    has_infinity: bool = True

    @property
    def magnitude(self) -> int:
        """Everything but the sign, which is the highest bit."""
        return int(np.iinfo(self.bits).max) >> 1


_FORMATS = {
    "float32": _Format(bits=np.uint32, infinity=0x7F800000),
    "bfloat16": _Format(bits=np.uint16, infinity=0x7F80),
    "float16": _Format(bits=np.uint16, infinity=0x7C00),
    "float8_e5m2": _Format(bits=np.uint8, infinity=0x7C),
    "float8_e4m3fn": _Format(bits=np.uint8, infinity=0x7F, has_infinity=False),
}

ELEMENTS = frozenset(_FORMATS)
"""What KV may consist of to be counted: names as torch has them."""


def count_nonfinite(log: npt.NDArray[np.uint8], element: str) -> NonFinite:
    """NaN and infinity among the elements of `log` (whole ones; what is left over at its end is not looked at).

    An `element` that is not in ELEMENTS has none: integers, or several kinds beside each other.
    """
    known = _FORMATS.get(element)
    if known is None:
        return NonFinite()
    size = np.dtype(known.bits).itemsize
    words = log[: len(log) // size * size].view(known.bits)
    magnitudes = words & known.bits(known.magnitude)
    if not len(magnitudes) or int(magnitudes.max()) < known.infinity:
        return NonFinite()
    bad = int(np.count_nonzero(magnitudes >= known.infinity))
    inf = int(np.count_nonzero(magnitudes == known.infinity)) if known.has_infinity else 0
    return NonFinite(nan=bad - inf, inf=inf)
