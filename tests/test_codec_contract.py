"""One contract for every backend: the reference's bytes, for all patterns of loss, shapes, lengths and places."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_backends import Candidate, candidates, random_bytes
from ghostserve.codec.base import Bytes, Codec
from ghostserve.codec.erasure import SCRATCH_BYTES, ErasureCodec
from ghostserve.codec.field import PRODUCTS
from ghostserve.codec.matrix import parity_matrix
from ghostserve.codec.reference import ReferenceBackend
from ghostserve.errors import CorruptionError, UsageError

ALL = candidates()
LENGTHS = [0, 1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1031]
# Around the sizes at which a backend changes what it does: pieces, threads, stores around the cache.
LONG = [(1 << 15) + 9, (1 << 20) - 1, (2 << 20) + 4097, (3 << 20) + 63]


@pytest.fixture(params=ALL, ids=lambda candidate: candidate.label)
def backend(request: pytest.FixtureRequest) -> Candidate:
    return request.param


def reference_parity(data: Sequence[Bytes], m: int) -> list[Bytes]:
    """Straight from the definition, not by way of any of our code but matrix and table."""
    matrix = parity_matrix(len(data), m)
    return [
        functools.reduce(operator.xor, (PRODUCTS[matrix[row, j], shard] for j, shard in enumerate(data)))
        for row in range(m)
    ]


class Stripe:
    """A stripe on one backend; parity starts as garbage."""

    def __init__(self, candidate: Candidate, n: int, m: int, length: int, *seed: int) -> None:
        self.candidate = candidate
        self.codec: Codec = ErasureCodec(n, m, candidate.make())
        made = random_bytes(n + m, length, *seed)
        self.data = [candidate.to(array) for array in made[:n]]
        self.parity = [candidate.to(array) for array in made[n:]]
        self.expected = [array.copy() for array in made[:n]] + reference_parity(made[:n], m)

    @property
    def shards(self) -> list[object]:
        return [*self.data, *self.parity]

    def encode(self) -> Stripe:
        self.codec.encode(self.data, self.parity)
        return self

    def bytes_of(self, array: object) -> bytes:
        return bytes(self.candidate.back(array))

    def check(self) -> None:
        assert [self.bytes_of(shard) for shard in self.shards] == [bytes(shard) for shard in self.expected]

    def garbage(self) -> object:
        return self.candidate.to(np.full(len(self.expected[0]), 0xA5, np.uint8))

    def check_lost(self, lost: Sequence[int], wanted: Sequence[int]) -> None:
        given = [None if index in lost else shard for index, shard in enumerate(self.shards)]
        out = [self.garbage() for _ in wanted]
        self.codec.reconstruct(given, lost=wanted, out=out)
        assert [self.bytes_of(shard) for shard in out] == [bytes(self.expected[index]) for index in wanted]


def patterns(n: int, m: int) -> list[tuple[int, ...]]:
    return [lost for count in range(m + 1) for lost in itertools.combinations(range(n + m), count)]


@pytest.mark.long
@pytest.mark.parametrize("m", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_erasure_pattern(backend: Candidate, m: int) -> None:
    """All of n <= 8, lengths changing from pattern to pattern; and only one of the lost shards wanted."""
    if backend.label == "native-threads":
        pytest.skip("one thread does shards as short as these")
    lengths = itertools.cycle(LENGTHS)
    for n in range(1, 9):
        stripes = {length: Stripe(backend, n, m, length).encode() for length in LENGTHS}
        for lost in patterns(n, m):
            stripe = stripes[next(lengths)]
            stripe.check_lost(lost, lost)
            if len(lost) > 1:
                stripe.check_lost(lost, lost[-1:])


def test_lengths(backend: Candidate) -> None:
    for length in (
        *range(70),
        *range(120, 136),
        191,
        192,
        193,
        255,
        256,
        257,
    ):  # `test_every_length` has the rest
        n, m = [(3, 1), (2, 2), (5, 3), (4, 4)][length % 4]
        check_all(backend, n, m, length)


@pytest.mark.long
@pytest.mark.parametrize("length", LONG)
def test_long_shards(backend: Candidate, length: int) -> None:
    check_all(backend, 3, 3, length)


@pytest.mark.parametrize(("n", "m"), [(4, 3), (3, 4)])
def test_erasure_patterns(backend: Candidate, n: int, m: int) -> None:
    """All of two small codes; `test_every_erasure_pattern` has the rest."""
    stripe = Stripe(backend, n, m, 257).encode()
    for lost in patterns(n, m):
        stripe.check_lost(lost, lost)


@pytest.mark.slow
def test_every_length(backend: Candidate) -> None:
    for length, n, m in itertools.product(range(258), (1, 2, 5), (1, 2, 3, 4)):
        check_all(backend, n, m, length)


def check_all(backend: Candidate, n: int, m: int, length: int) -> None:
    """Encode; then lose m shards, the first ones, and want them in another order."""
    stripe = Stripe(backend, n, m, length).encode()
    stripe.check()
    stripe.check_lost(range(m), range(m - 1, -1, -1))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (9, 5), (20, 9), (255, 3), (252, 4), (240, 16)])
def test_wide_stripes(backend: Candidate, n: int, m: int) -> None:
    stripe = Stripe(backend, n, m, 97).encode()
    stripe.check()
    spread = tuple(np.linspace(0, n + m - 1, m).astype(int).tolist())
    stripe.check_lost(spread, spread)


def test_the_other_parities_do_not_matter(backend: Candidate) -> None:
    """Any n shards suffice, and of those given the first n are read: what the others hold is not looked at."""
    stripe = Stripe(backend, 4, 3, 333).encode()
    out = stripe.garbage()
    wrong = [*stripe.shards[:5], stripe.garbage(), stripe.garbage()]
    stripe.codec.reconstruct([None, *wrong[1:]], lost=[0], out=[out])
    assert stripe.bytes_of(out) == bytes(stripe.expected[0])
    for kept in range(4, 7):
        lost = [1, *(index for index in range(4, 7) if index != kept)]
        stripe.check_lost(lost, [1])


def test_update(backend: Candidate) -> None:
    for n, m, index in [(1, 1, 0), (4, 3, 2), (6, 4, 5)]:
        stripe = Stripe(backend, n, m, 1031).encode()
        new = random_bytes(1, 1031, 77)[0]
        stripe.codec.update(index, old=stripe.data[index], new=backend.to(new), parity=stripe.parity)
        stripe.data[index] = backend.to(new)
        stripe.expected[index] = new
        stripe.expected[n:] = reference_parity(stripe.expected[:n], m)
        stripe.check()


def test_verify_names_the_parities_that_do_not_fit(backend: Candidate) -> None:
    stripe = Stripe(backend, 3, 3, 700).encode()
    assert stripe.codec.verify(stripe.shards) == ()
    for place in (0, 350, 699):
        stripe.parity[1][place] ^= 4
        assert stripe.codec.verify(stripe.shards) == (4,)
        stripe.parity[1][place] ^= 4
    stripe.data[0][5] ^= 1
    assert stripe.codec.verify(stripe.shards) == (3, 4, 5)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (4, 2), (5, 3), (6, 4)])
def test_locate(backend: Candidate, n: int, m: int) -> None:
    stripe = Stripe(backend, n, m, 257).encode()
    assert stripe.codec.locate(stripe.shards) is None
    for wrong in range(n + m):
        places = random_bytes(1, 9, wrong)[0]
        for place in places:
            stripe.shards[wrong][int(place)] ^= int(place) | 1
        assert stripe.codec.locate(stripe.shards) == wrong
        for place in places:
            stripe.shards[wrong][int(place)] ^= int(place) | 1
    assert stripe.codec.locate(stripe.shards) is None


def test_locate_with_two_wrong_shards(backend: Candidate) -> None:
    stripe = Stripe(backend, 4, 3, 100).encode()
    stripe.data[0][10] ^= 1
    stripe.data[2][90] ^= 1  # elsewhere: each place alone would name one
    with pytest.raises(CorruptionError, match="more than one"):
        stripe.codec.locate(stripe.shards)
    stripe.data[2][90] ^= 1
    stripe.parity[1][10] ^= 7  # at the same place
    with pytest.raises(CorruptionError, match="more than one"):
        stripe.codec.locate(stripe.shards)


def test_long_shards_are_checked_piece_by_piece() -> None:
    stripe = Stripe(ALL[2], 2, 2, SCRATCH_BYTES + 77).encode()
    assert stripe.codec.locate(stripe.shards) is None
    stripe.data[1][SCRATCH_BYTES + 5] ^= 1
    stripe.data[1][3] ^= 9
    assert stripe.codec.locate(stripe.shards) == 1
    assert stripe.codec.verify(stripe.shards) == (2, 3)


# ---- scattered shards ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(draw=st.data())
def test_scattered_shards_are_the_same_bytes(draw: st.DataObject) -> None:
    """Shards in pieces, each cut elsewhere and placed at any offset, with the neighbours' bytes untouched."""
    candidate = draw.draw(st.sampled_from(ALL))
    n, m = draw.draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    length = draw.draw(st.integers(0, 700))
    seed = draw.draw(st.integers(0, 1000))
    plain = random_bytes(n, length, seed)
    memory = [np.full(3 * length + 600, 0x5A, np.uint8) for _ in range(n + m)]
    shards, places = [], []
    for index in range(n + m):
        cuts = sorted({0, length, *draw.draw(st.lists(st.integers(0, length), max_size=4))})
        pieces, at = [], 0
        where = []
        for start, stop in itertools.pairwise(cuts):
            at += draw.draw(st.integers(0, 70))
            pieces.append(memory[index][at : at + stop - start])
            where.append((at, start, stop))
            if index < n:
                pieces[-1][:] = plain[index][start:stop]
            at += stop - start
        shards.append([candidate.to(piece) for piece in pieces])
        places.append(where)
    codec = ErasureCodec(n, m, candidate.make())
    untouched = [array.copy() for array in memory]
    codec.encode(shards[:n], shards[n:])
    expected = [*plain, *reference_parity(plain, m)]
    for index in range(n + m):
        for at, start, stop in places[index]:
            untouched[index][at : at + stop - start] = expected[index][start:stop]
    assert all(np.array_equal(memory[i], untouched[i]) for i in range(n + m))
    lost = draw.draw(st.lists(st.integers(0, n + m - 1), max_size=m, unique=True))
    out = [candidate.to(np.zeros(length, np.uint8)) for _ in lost]
    codec.reconstruct([None if i in lost else shard for i, shard in enumerate(shards)], lost=lost, out=out)
    assert [bytes(candidate.back(array)) for array in out] == [bytes(expected[index]) for index in lost]


def test_any_type_and_stride(backend: Candidate) -> None:
    """Strided rows of 16-bit numbers, as in a KV cache, against the same bytes in one piece."""
    cache = np.arange(5 * 40, dtype=np.uint16).reshape(5, 40)
    rows = np.ascontiguousarray(cache[1:4, 8:24])
    other = random_bytes(1, rows.nbytes)[0]
    strided, packed = np.zeros(rows.nbytes, np.uint8), np.zeros(rows.nbytes, np.uint8)
    codec = ErasureCodec(2, 1, backend.make())
    codec.encode([backend.to(cache)[1:4, 8:24], backend.to(other)], [backend.to(strided)])
    codec.encode([backend.to(rows), backend.to(other)], [backend.to(packed)])
    assert bytes(strided) == bytes(packed) == bytes(rows.reshape(-1).view(np.uint8) ^ other)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals_name_the_value_and_write_nothing(backend: Candidate) -> None:
    stripe = Stripe(backend, 3, 2, 64).encode()
    codec, data, parity = stripe.codec, stripe.data, stripe.parity
    short = backend.to(np.zeros(63, np.uint8))
    out = backend.to(np.zeros(64, np.uint8))
    gaps = backend.to(np.zeros((8, 16), np.uint8))[:, ::2]
    cases = [
        (lambda: codec.encode(data[:2], parity), "2 data shards given, 3 needed"),
        (lambda: codec.encode(data, [*parity, out]), "3 parity shards given, 2 needed"),
        (lambda: codec.encode([data[0], data[1], short], parity), "shard 2 has 63 bytes, shard 0 has 64"),
        (lambda: codec.encode(data, [short, short]), "parity shards have 63 bytes, the others 64"),
        (lambda: codec.encode(data, [parity[0], data[1]]), "parity shard 1 overlaps"),
        (lambda: codec.encode(data, [parity[0], parity[0]]), "parity shard 0 overlaps"),
        (lambda: codec.encode([gaps, *data[1:]], parity), "innermost dimension must be contiguous"),
        (lambda: codec.encode(["text", *data[1:]], parity), "not str"),
        (lambda: codec.encode([None, *data[1:]], parity), "not NoneType"),
        (
            lambda: codec.reconstruct([*data, *parity][:4], lost=[], out=[]),
            "4 shards given, 3 data and 2 parity",
        ),
        (
            lambda: codec.reconstruct([None, None, None, *parity], lost=[0], out=[out]),
            r"\[0, 1, 2\] are missing; 2",
        ),
        (lambda: codec.reconstruct([*data, *parity], lost=[0], out=[out]), r"\[0\] to rebuild, but \[\]"),
        (
            lambda: codec.reconstruct([None, *data[1:], *parity], lost=[0, 0], out=[out, out]),
            r"\[0, 0\] to rebuild",
        ),
        (
            lambda: codec.reconstruct([None, *data[1:], *parity], lost=[0], out=[]),
            "0 output shards given, 1 needed",
        ),
        (
            lambda: codec.reconstruct([None, *data[1:], *parity], lost=[0], out=[parity[1]]),
            "output shard 0 overlaps",
        ),
        (lambda: codec.reconstruct([None, *data[1:], *parity], lost=[0], out=[short]), "63 bytes"),
        (lambda: codec.update(3, old=data[0], new=out, parity=parity), "data shard 3 changed"),
        (lambda: codec.update(0, old=data[0], new=short, parity=parity), "63 bytes"),
        (lambda: codec.update(0, old=data[0], new=parity[1], parity=parity), "parity shard 1 overlaps"),
        (lambda: codec.verify(data), "3 given shards given, 5 needed"),
        (lambda: ErasureCodec(3, 1, backend.make()).locate([*data, parity[0]]), "at least 2 needed"),
    ]
    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()
    stripe.check()
    assert not stripe.candidate.back(out).any()


@pytest.mark.parametrize("m", [1, 2])
def test_read_only_outputs_are_refused(m: int) -> None:
    for candidate in ALL:
        if candidate.label == "torch":
            continue  # torch has none
        codec = ErasureCodec(2, m, candidate.make())
        constant = [np.frombuffer(bytes(64), np.uint8) for _ in range(m)]
        with pytest.raises(UsageError, match="parity shard 0 is read-only"):
            codec.encode(random_bytes(2, 64), constant)
        assert not constant[0].any()
        codec.encode(constant[:1] * 2, random_bytes(m, 64))  # as a source it is welcome


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=3, max_size=3))
def test_overlap_is_what_numpy_says(places: list[tuple[int, int]]) -> None:
    """Targets against sources and each other, down to one byte and to neighbours that only touch."""
    memory = np.zeros(64, np.uint8)
    length = max(length for _, length in places)
    source, first, second = (memory[start : start + length] for start, _ in places)
    overlap = any(np.shares_memory(a, b) for a, b in ((source, first), (source, second), (first, second)))
    codec = ErasureCodec(1, 2, ReferenceBackend())
    if overlap:
        with pytest.raises(UsageError, match="overlaps"):
            codec.encode([source], [first, second])
    else:
        codec.encode([source], [first, second])


def test_nothing_lost_is_nothing_to_do(backend: Candidate) -> None:
    stripe = Stripe(backend, 2, 1, 16).encode()
    stripe.codec.reconstruct(stripe.shards, lost=[], out=[])
    stripe.codec.reconstruct([stripe.data[0], None, stripe.parity[0]], lost=[], out=[])


def test_the_contract_finds_a_wrong_backend() -> None:
    """Negative control: one wrong coefficient in one path."""

    class Wrong(ReferenceBackend):
        def combine(self, matrix, sources, targets, *, accumulate):  # type: ignore[no-untyped-def]
            changed = matrix.copy()
            changed[-1, -1] ^= 1
            super().combine(changed, sources, targets, accumulate=accumulate)

    with pytest.raises(AssertionError):
        Stripe(Candidate("wrong", Wrong), 3, 2, 40).encode().check()
