"""Against other people's codes, where the matrix is the same: ISA-L's generator and pyeclib's parities."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from codec_backends import random_bytes
from ghostserve.codec.field import PRODUCTS
from ghostserve.codec.isal_backend import find_isal
from ghostserve.codec.matrix import parity_matrix, powers_matrix

pyeclib = pytest.importorskip("pyeclib.ec_iface", reason="pyeclib is not installed")


@pytest.fixture(scope="module")
def isal() -> ctypes.CDLL:
    found = find_isal()
    assert found is not None
    return ctypes.CDLL(str(found.library))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (8, 3), (255 - 3, 3), (21, 4)])
def test_isals_matrix_is_ours(isal: ctypes.CDLL, n: int, m: int) -> None:
    generator = np.zeros((n + m, n), np.uint8)
    isal.gf_gen_rs_matrix(ctypes.c_void_p(generator.ctypes.data), n + m, n)
    assert np.array_equal(generator[:n], np.eye(n, dtype=np.uint8))
    assert np.array_equal(generator[n:], powers_matrix(n, m))


def test_isals_products_are_ours(isal: ctypes.CDLL) -> None:
    for a in (0, 1, 2, 3, 29, 128, 255):
        assert [isal.gf_mul(a, b) & 0xFF for b in range(256)] == PRODUCTS[a].tolist()


@pytest.mark.parametrize(("n", "m"), [(4, 1), (4, 2), (10, 3)])
def test_pyeclibs_parities_are_ours(n: int, m: int) -> None:
    """Its fragments are a header of 80 bytes and the shard."""
    driver = pyeclib.ECDriver(k=n, m=m, ec_type="isa_l_rs_vand")
    shards = random_bytes(n, 512)
    fragments = driver.encode(np.concatenate(shards).tobytes())
    matrix = parity_matrix(n, m)
    for row in range(m):
        expected = np.zeros(512, np.uint8)
        for j, shard in enumerate(shards):
            expected ^= PRODUCTS[matrix[row, j], shard]
        assert fragments[n + row][80:] == expected.tobytes()
