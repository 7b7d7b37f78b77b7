"""The field GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11d), the one of RAID-6 and ISA-L.

Addition is XOR. Two generates all 255 elements but zero, so products are sums of logarithms. The whole
multiplication table is 64 KiB and is what "correct" means here: every fast kernel is compared with it.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Elements: TypeAlias = npt.NDArray[np.uint8]
"""Field elements, any shape."""

POLYNOMIAL = 0x11D
ORDER = 255  # of the multiplicative group: 2^255 = 1


def _powers_of_two() -> Elements:
    powers, value = np.zeros(ORDER, np.uint8), 1
    for exponent in range(ORDER):
        powers[exponent] = value
        value = value << 1 ^ (POLYNOMIAL if value & 0x80 else 0)
    return powers


EXP: Elements = _powers_of_two()
"""EXP[i] = 2^i, shape (255,)."""

LOG: npt.NDArray[np.int64] = np.zeros(256, np.int64)
"""LOG[2^i] = i, shape (256,); LOG[0] means nothing."""
LOG[EXP] = np.arange(ORDER)


def multiply(a: Elements | int, b: Elements | int) -> Elements:
    """The product of each pair, with numpy's broadcasting."""
    left, right = np.asarray(a, np.uint8), np.asarray(b, np.uint8)
    product = EXP[(LOG[left] + LOG[right]) % ORDER]
    return np.where((left == 0) | (right == 0), 0, product).astype(np.uint8)


def power(base: int, exponent: int) -> int:
    """base^exponent for base != 0."""
    return int(EXP[LOG[base] * exponent % ORDER])


def inverse(a: Elements | int) -> Elements:
    """1/a of each; ZeroDivisionError if one is zero."""
    values = np.asarray(a, np.uint8)
    if not values.all():
        raise ZeroDivisionError("0 has no inverse in GF(256)")
    return EXP[-LOG[values] % ORDER]


PRODUCTS: Elements = multiply(
    np.arange(256, dtype=np.uint8)[:, None], np.arange(256, dtype=np.uint8)[None, :]
)
"""PRODUCTS[a, b] = a * b, shape (256, 256)."""

for _table in (EXP, LOG, PRODUCTS):
    _table.setflags(write=False)
