"""XOR parity against the definition, for all patterns of loss; and what a codec refuses."""

from __future__ import annotations

import functools
import operator
import random

import numpy as np
import pytest

from ghostserve.codec.base import Bytes, Codec
from ghostserve.codec.xor import XorCodec
from ghostserve.errors import UsageError

LENGTHS = [0, 1, 7, 8, 9, 63, 4096, 131072, 131072 * 2 + 13]


def stripe(n: int, length: int) -> tuple[list[Bytes], Bytes]:
    rng = np.random.default_rng([n, length])
    data = [rng.integers(0, 256, length, dtype=np.uint8) for _ in range(n)]
    return data, rng.integers(0, 256, length, dtype=np.uint8)  # parity starts as garbage


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_every_lost_shard_comes_back(n: int, length: int) -> None:
    codec: Codec = XorCodec(n)
    data, parity = stripe(n, length)
    codec.encode(data, [parity])
    assert bytes(parity) == bytes(functools.reduce(operator.xor, data))
    shards = [*data, parity]
    for lost in range(n + 1):
        given: list[Bytes | None] = [None if index == lost else shard for index, shard in enumerate(shards)]
        out = np.full(length, 0xA5, dtype=np.uint8)
        codec.reconstruct(given, lost=[lost], out=[out])
        assert bytes(out) == bytes(shards[lost])


def test_unaligned_views_and_pieces() -> None:
    data, parity = stripe(2, 1000)
    whole = np.empty(1000, dtype=np.uint8)
    XorCodec(2).encode(data, [whole])
    cut = random.Random(1).randrange(1, 999)
    for piece in (slice(None, cut), slice(cut, None)):
        XorCodec(2).encode([shard[piece] for shard in data], [parity[piece]])
    assert bytes(parity) == bytes(whole)


def test_a_replica_for_one_rank() -> None:
    data, parity = stripe(1, 33)
    XorCodec(1).encode(data, [parity])
    assert bytes(parity) == bytes(data[0])


def test_nothing_lost_is_nothing_to_do() -> None:
    data, parity = stripe(2, 16)
    XorCodec(2).reconstruct([*data, parity], lost=[], out=[])
    XorCodec(2).reconstruct([data[0], None, parity], lost=[], out=[])


def test_refused_codes() -> None:
    with pytest.raises(UsageError, match="0 data shards"):
        XorCodec(0)
    with pytest.raises(UsageError, match="2 parity shards"):
        XorCodec(4, 2)


def test_refused_encodings() -> None:
    codec = XorCodec(2)
    (a, b), parity = stripe(2, 16)
    with pytest.raises(UsageError, match="1 data shards given, 2 needed"):
        codec.encode([a], [parity])
    with pytest.raises(UsageError, match="0 parity shards given, 1 needed"):
        codec.encode([a, b], [])
    with pytest.raises(UsageError, match="data shard 1 has 15 bytes, shard 0 has 16"):
        codec.encode([a, b[:15]], [parity])
    with pytest.raises(UsageError, match="parity shard 0 has 15 bytes, the others 16"):
        codec.encode([a, b], [parity[:15]])
    with pytest.raises(UsageError, match="int64"):
        codec.encode([a, np.zeros(16, dtype=np.int64)], [parity])
    with pytest.raises(UsageError, match="strides"):
        codec.encode([a[::2], b[::2]], [parity[:8]])
    with pytest.raises(UsageError, match="overlaps"):
        codec.encode([a, b], [a])


def test_refused_reconstructions() -> None:
    codec = XorCodec(2)
    (a, b), parity = stripe(2, 16)
    out = np.zeros(16, dtype=np.uint8)
    with pytest.raises(UsageError, match=r"shards \[0, 1\] are missing; XOR rebuilds at most 1"):
        codec.reconstruct([None, None, parity], lost=[0, 1], out=[out, out.copy()])
    with pytest.raises(UsageError, match=r"shards \[0\] to rebuild, but \[1\] are missing"):
        codec.reconstruct([a, None, parity], lost=[0], out=[out])
    with pytest.raises(UsageError, match="2 shards given"):
        codec.reconstruct([a, b], lost=[], out=[])
    with pytest.raises(UsageError, match="0 output shards given, 1 needed"):
        codec.reconstruct([a, None, parity], lost=[1], out=[])
    with pytest.raises(UsageError, match="overlaps"):
        codec.reconstruct([a, None, parity], lost=[1], out=[a])
    with pytest.raises(UsageError, match="output shard 0 has 8 bytes"):
        codec.reconstruct([a, None, parity], lost=[1], out=[out[:8]])
