"""Which code: the parity matrices, and the coefficients that rebuild what is lost.

A stripe d_0..d_{n-1} has parities p_r = sum_j A[r, j] d_j. The code is maximum-distance-separable (MDS: any m
lost shards can be rebuilt) exactly if every square submatrix of A is regular.

m <= 3   A[r, j] = g^j with g = 1, 2, 4: the P, Q and R of RAID-6 and its extension. MDS for n <= 255, checked
         exhaustively. One more row of powers, g = 8, fails from n = 22 on (rows 0, 1, 3, columns 0, 10, 21).
m >= 4   Cauchy, A[r, j] = 1 / (x_r + y_j) with x_r = r and y_j = 255 - j, each column scaled so that row 0 is
         ones. MDS for all n + m <= 256: every square submatrix of a Cauchy matrix is regular, and scaling a
         column keeps that. (Bloemer et al., "An XOR-Based Erasure-Resilient Coding Scheme", 1995)

Row 0 is ones in both, so parity 0 is the plain XOR. A row does not depend on m within each family.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from ghostserve.codec.field import EXP, ORDER, PRODUCTS, Elements, inverse, multiply
from ghostserve.errors import UsageError

SHARDS_MAX = 256  # n + m of one stripe, the size of the field
POWERS_M_MAX = 3
POWERS_N_MAX = ORDER


def check_size(n: int, m: int) -> None:
    """UsageError unless there is a code with n data and m parity shards."""
    if n < 1 or m < 1:
        raise UsageError(f"{n} data and {m} parity shards: at least 1 of each needed")
    if m <= POWERS_M_MAX and n > POWERS_N_MAX:
        raise UsageError(f"{n} data shards: at most {POWERS_N_MAX} with {m} parity shards")
    if m > POWERS_M_MAX and n + m > SHARDS_MAX:
        raise UsageError(f"{n} data and {m} parity shards: together at most {SHARDS_MAX}")


@functools.lru_cache(maxsize=256)
def parity_matrix(n: int, m: int) -> Elements:
    """A, shape (m, n), read-only. UsageError if there is no such code."""
    check_size(n, m)
    return _frozen(powers_matrix(n, m) if m <= POWERS_M_MAX else cauchy_matrix(n, m))


def powers_matrix(n: int, m: int) -> Elements:
    """Row r holds the powers of 2^r, shape (m, n). MDS only in the range that this module's head names."""
    exponents = np.arange(m)[:, None] * np.arange(n)[None, :]
    powers: Elements = EXP[exponents % ORDER]
    return powers


def cauchy_matrix(n: int, m: int) -> Elements:
    """The scaled Cauchy matrix, shape (m, n)."""
    x, y = np.arange(m, dtype=np.uint8), (255 - np.arange(n)).astype(np.uint8)
    cauchy = inverse(x[:, None] ^ y[None, :])
    return multiply(cauchy, inverse(cauchy[0])[None, :])


@functools.lru_cache(maxsize=4096)
def rebuild_matrix(n: int, m: int, sources: tuple[int, ...], wanted: tuple[int, ...]) -> Elements:
    """Coefficients that make the shards `wanted` of n shards `sources`; shape (len(wanted), n), read-only.

    Shards are numbered 0..n-1 (data), n..n+m-1 (parity). UsageError unless `sources` are n different shards.
    """
    check_size(n, m)
    if (
        len(sources) != n
        or len(set(sources)) != n
        or not all(0 <= shard < n + m for shard in (*sources, *wanted))
    ):
        raise UsageError(
            f"shards {list(sources)} cannot rebuild {list(wanted)}: {n} different ones of {n + m} needed"
        )
    generator = np.concatenate([np.eye(n, dtype=np.uint8), parity_matrix(n, m)])
    inverted = invert(generator[list(sources)])
    assert inverted is not None, f"not MDS: n={n}, m={m}, sources {sources}"
    return _frozen(dot(generator[list(wanted)], inverted))


def choose_sources(n: int, present: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Which n of the shards `present` to read: data first, then the parities with the lowest numbers.

    Low parities are the cheap ones: the first is plain XOR. UsageError if fewer than n are present.
    """
    if len(present) < n:
        raise UsageError(f"{len(present)} shards are present and {n} needed to rebuild {list(wanted)}")
    return tuple(sorted(present)[:n])


def dot(a: Elements, b: Elements) -> Elements:
    """The matrix product over the field."""
    product: Elements = np.bitwise_xor.reduce(PRODUCTS[a[:, :, None], b[None, :, :]], axis=1)
    return product


def invert(matrix: Elements) -> Elements | None:
    """The inverse by Gauss-Jordan elimination, or None if the matrix is singular."""
    size = len(matrix)
    work = np.concatenate([matrix.astype(np.uint8), np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        pivots = np.flatnonzero(work[column:, column])
        if not len(pivots):
            return None
        pivot = column + int(pivots[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = PRODUCTS[inverse(work[column, column]), work[column]]
        others = np.flatnonzero(work[:, column])
        others = others[others != column]
        work[others] ^= PRODUCTS[work[others, column][:, None], work[column][None, :]]
    return work[:, size:].copy()


def _frozen(matrix: Elements) -> Elements:
    matrix.setflags(write=False)
    return matrix
