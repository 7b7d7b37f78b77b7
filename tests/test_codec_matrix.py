"""The field and the matrices: the proof obligations of docs/codec.md, exhaustively where that is possible."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from ghostserve.codec.field import EXP, ORDER, PRODUCTS, Elements, inverse, multiply, power
from ghostserve.codec.matrix import (
    cauchy_matrix,
    check_size,
    choose_sources,
    dot,
    invert,
    parity_matrix,
    powers_matrix,
    rebuild_matrix,
)
from ghostserve.errors import UsageError


def by_hand(a: int, b: int) -> int:
    """Multiplication of polynomials modulo 0x11d, bit by bit: no table."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << (bit - 8)
    return product


def test_the_product_table_is_multiplication_modulo_0x11d() -> None:
    assert PRODUCTS.tolist() == [[by_hand(a, b) for b in range(256)] for a in range(256)]


def test_two_generates_the_field() -> None:
    assert sorted(EXP.tolist()) == list(range(1, 256))
    assert power(2, ORDER) == 1
    assert power(4, 3) == by_hand(by_hand(4, 4), 4)
    assert (multiply(np.arange(1, 256), inverse(np.arange(1, 256))) == 1).all()
    with pytest.raises(ZeroDivisionError):
        inverse(0)


# ---- MDS -------------------------------------------------------------------------------------------------------------


def determinants(rows: Elements, columns: npt.NDArray[np.intp]) -> Elements:
    """Of all square submatrices with these k rows; `columns` has shape (count, k)."""
    if len(rows) == 1:
        return rows[0][columns[:, 0]]
    total = np.zeros(len(columns), np.uint8)
    for index in range(len(rows)):
        minor = determinants(rows[1:], np.delete(columns, index, axis=1))
        total ^= PRODUCTS[rows[0][columns[:, index]], minor]
    return total


def first_singular(matrix: Elements) -> int | None:
    """How many columns the smallest singular square submatrix needs; None if all are regular: the code is MDS."""
    m, n = matrix.shape
    worst: int | None = None
    for size in range(1, m + 1):
        columns = np.array(list(itertools.combinations(range(n), size)), np.intp).reshape(-1, size)
        for rows in itertools.combinations(range(m), size):
            singular = np.flatnonzero(determinants(matrix[list(rows)], columns) == 0)
            if len(singular):
                needs = int(columns[singular].max(axis=1).min()) + 1
                worst = needs if worst is None else min(worst, needs)
    return worst


@pytest.mark.parametrize("m", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_powers_are_mds_up_to_255(m: int) -> None:
    assert first_singular(parity_matrix(255, m)) is None  # submatrices for smaller n are among these


def test_powers_fail_beyond() -> None:
    """Negative control, and the wrong choice that is easily made: a fourth row of powers."""
    assert first_singular(powers_matrix(256, 2)) == 256
    assert first_singular(powers_matrix(21, 4)) is None
    assert first_singular(powers_matrix(24, 4)) == 22
    assert invert(powers_matrix(22, 4)[[0, 1, 3]][:, [0, 10, 21]]) is None
    assert first_singular(parity_matrix(24, 4)) is None, "so four parities use another matrix"


@pytest.mark.long
@pytest.mark.parametrize(("n", "m"), [(60, 4), (16, 5), (12, 8), (252, 2), (252, 3)])
def test_all_cauchy_minors(n: int, m: int) -> None:
    assert first_singular(cauchy_matrix(n, m)) is None


@pytest.mark.parametrize(("n", "m"), [(24, 4), (10, 5)])
def test_cauchy_minors(n: int, m: int) -> None:
    assert first_singular(cauchy_matrix(n, m)) is None


def test_cauchy_is_mds_by_construction() -> None:
    """A Cauchy matrix's minors are products of (x_i + x_j), (y_i + y_j) and 1/(x_i + y_j): regular if all x and y differ."""
    for m in range(4, 256):
        n = 256 - m  # smaller n take a part of these columns
        x, y = set(range(m)), {255 - column for column in range(n)}
        assert len(x | y) == 256
        unscaled = inverse(
            np.arange(m, dtype=np.uint8)[:, None] ^ (255 - np.arange(n)).astype(np.uint8)[None, :]
        )
        assert np.array_equal(cauchy_matrix(n, m), PRODUCTS[unscaled, inverse(unscaled[0])[None, :]])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (8, 1), (8, 2), (255, 3), (8, 4), (252, 4), (1, 255)])
def test_parity_0_is_xor_and_rows_do_not_depend_on_m(n: int, m: int) -> None:
    matrix = parity_matrix(n, m)
    assert matrix.shape == (m, n)
    assert (matrix[0] == 1).all()
    assert matrix.all(), "every parity depends on every shard"
    if m not in (1, 4):
        assert np.array_equal(parity_matrix(n, m - 1), matrix[: m - 1])


@pytest.mark.parametrize(
    ("n", "m", "named"),
    [
        (0, 1, "0 data"),
        (2, 0, "0 parity"),
        (256, 1, "256 data"),
        (256, 3, "255"),
        (253, 4, "256"),
        (-1, 2, "-1"),
    ],
)
def test_sizes_without_a_code(n: int, m: int, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        check_size(n, m)


# ---- rebuilding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 3), (4, 2), (5, 4), (3, 6)])
def test_any_n_shards_give_all(n: int, m: int) -> None:
    generator = np.concatenate([np.eye(n, dtype=np.uint8), parity_matrix(n, m)])
    for sources in itertools.combinations(range(n + m), n):
        everything = rebuild_matrix(n, m, sources, tuple(range(n + m)))
        assert np.array_equal(dot(everything, generator[list(sources)]), generator)


def test_what_cannot_be_rebuilt() -> None:
    for sources in [(0, 1), (0, 1, 1), (0, 1, 5)]:
        with pytest.raises(UsageError, match="cannot rebuild"):
            rebuild_matrix(3, 2, sources, (2,))
    with pytest.raises(UsageError, match="2 shards are present and 3 needed"):
        choose_sources(3, [0, 4], [1])
    assert choose_sources(3, [4, 0, 3, 2], [1]) == (0, 2, 3)


def test_inversion() -> None:
    assert invert(np.zeros((2, 2), np.uint8)) is None
    rng = np.random.default_rng(1)
    for size in (1, 2, 7):
        matrix = rng.integers(0, 256, (size, size), dtype=np.uint8)
        inverted = invert(matrix)
        assert inverted is not None
        assert np.array_equal(dot(inverted, matrix), np.eye(size, dtype=np.uint8))
