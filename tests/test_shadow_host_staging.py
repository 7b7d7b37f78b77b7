"""The native staging call against the plain one: same bytes, same checksums, whatever comes in which order."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch

from ghostserve.errors import CorruptionError
from ghostserve.native.checksum import crc32
from ghostserve.shadow.host_staging import HostStaging, find_runs
from ghostserve.shadow.manifest import Piece
from ghostserve.shadow.mirror import GroupMap, Mirror
from ghostserve.shadow.packed_pieces import PackedPieces, pack_pieces
from test_shadow_mirror import BLOCKS, FRAME_BYTES, FRAMES, SIZE, new_rank

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64]


def native_of(rank: Mirror, frames: np.ndarray, *, number: int = 0) -> HostStaging:
    return HostStaging(
        kv=rank.kv.numpy(),
        groups=rank.groups,
        num_blocks=rank.num_blocks,
        frames=frames,
        frame_bytes=rank.frame_bytes,
        rank=number,
    )


def piece(block: int, start: int, stop: int, *frames: int, group: int = 0) -> Piece:
    return Piece(block=block, group=group, generation=1, start=start, stop=stop, frames=frames)


def both(rank: Mirror, native: HostStaging, *pieces: Piece) -> list[int]:
    """Stage with both; the checksums, which have to be equal."""
    packed = pack_pieces(pieces, ranks=1)
    found = np.frombuffer(native.stage(packed), dtype="<u4").tolist()
    plain = [
        rank.stage(block=p.block, group=p.group, start=p.start, stop=p.stop, frame=p.frames[0])
        for p in pieces
    ]
    assert found == plain
    return plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_pieces(dtype: torch.dtype, seed: int) -> None:
    """Logs that go on, start over, go back by a few steps, and gaps that make all of a log be taken again."""
    choose, rank = random.Random(seed), new_rank(dtype, seed=seed)
    frames = np.zeros(FRAMES * FRAME_BYTES, dtype=np.uint8)
    native = native_of(rank, frames)
    for _ in range(120):
        rank.kv[choose.randrange(len(rank.kv))] ^= 1  # the KV is not the same from step to step
        some = []
        for frame in choose.sample(range(FRAMES), choose.randrange(1, 4)):
            start = choose.randrange(SIZE)
            some.append(piece(choose.randrange(BLOCKS), start, choose.randrange(start + 1, SIZE + 1), frame))
        both(rank, native, *some)
        assert np.array_equal(frames, rank.frames)


def test_a_newcomer_goes_on_where_its_predecessor_ended() -> None:
    rank = new_rank()
    native = native_of(rank, frames := rank.frames.copy())
    (checksum,) = both(rank, native, piece(2, 0, 2, 1))
    newcomer = new_rank(arena=rank.frames)
    again = native_of(newcomer, frames)
    newcomer.seed_progress(frame=1, slots=2, checksum=checksum)
    again.seed(frame=1, slots=2, checksum=checksum)
    before = frames[FRAME_BYTES : FRAME_BYTES + 2 * rank.slot_bytes(0)].copy()
    frames[FRAME_BYTES] ^= 0xFF  # not read again: the checksum goes on from the one it was told
    newcomer.frames[FRAME_BYTES] ^= 0xFF
    both(newcomer, again, piece(2, 2, 4, 1))
    assert frames[FRAME_BYTES] != before[0]


def test_each_rank_takes_its_own_frame() -> None:
    rank = new_rank()
    frames = np.zeros_like(rank.frames)
    native_of(rank, frames, number=1).stage(pack_pieces([piece(0, 0, 4, 3, 5)], ranks=2))
    touched = frames.reshape(FRAMES, -1).any(axis=1)
    assert touched.tolist() == [False, False, False, False, False, True]


@pytest.mark.parametrize(
    "bad",
    [
        piece(BLOCKS, 0, 1, 0),
        piece(0, 0, 1, FRAMES),
        piece(0, 0, SIZE + 1, 0),
        piece(0, 2, 2, 0),
        piece(0, 0, 1, 0, group=1),
    ],
    ids=["block", "frame", "slots", "nothing", "group"],
)
def test_out_of_bounds(bad: Piece) -> None:
    rank = new_rank()
    native = native_of(rank, frames := np.zeros_like(rank.frames))
    with pytest.raises(CorruptionError, match="out of bounds"):
        native.stage(pack_pieces([piece(0, 0, 1, 2), bad], ranks=1))
    assert frames.reshape(FRAMES, -1).any(axis=1).tolist() == [False, False, True, False, False, False]


def test_nothing_to_stage() -> None:
    rank = new_rank()
    assert native_of(rank, rank.frames).stage(PackedPieces(words=b"", ranks=1)) == b""


def test_runs_say_the_same_as_the_slot_map() -> None:
    """A slot map with single words at a distance, and with neighbours, in another order than memory's."""
    rank = new_rank()
    (group,) = rank.groups
    words = group.words.numpy()
    for order in (np.arange(words.shape[1]), np.random.default_rng(1).permutation(words.shape[1])):
        map_words = words[:, order]
        strides = np.where(np.arange(len(order)) % 7 == 0, 100, 200)
        firsts, runs = find_runs(map_words, strides)
        for slot in range(words.shape[0]):
            told = [
                (int(first) + unit * run.step + word, run.stride)
                for first, run in zip(firsts[slot], runs, strict=True)
                for unit in range(run.units)
                for word in range(run.words)
            ]
            assert told == list(zip(map_words[slot].tolist(), strides.tolist(), strict=True))


def test_the_keys_of_a_cpu_are_few_runs() -> None:
    """vLLM's layout: keys by dimension, values by slot. A run for each head's keys, one for its values."""
    (group,) = new_rank().groups
    _, runs = find_runs(group.words.numpy(), group.stride_words.numpy())
    assert len(runs) <= 2 * 2 * 2  # layers, heads, keys and values


def test_groups_of_their_own_maps() -> None:
    rank = new_rank()
    (first,) = rank.groups
    second = GroupMap(words=first.words[:2].flip(1), stride_words=first.stride_words)
    two = Mirror(
        kv=rank.kv, groups=(first, second), num_blocks=BLOCKS, frames=rank.frames, frame_bytes=FRAME_BYTES
    )
    native = native_of(two, frames := np.zeros_like(rank.frames))
    both(two, native, piece(1, 0, 2, 0, group=1), piece(3, 0, 4, 4))
    assert np.array_equal(frames, two.frames)


@pytest.mark.parametrize("seed", range(4))
def test_crc32_is_zlibs(seed: int) -> None:
    """Every length about the sizes at which the way of computing changes, from any start."""
    data = np.random.default_rng(seed).integers(0, 256, 5000, dtype=np.uint8)
    for length in (*range(300), *range(1000, 1100), 4096, 4999):
        for shift in (0, 1):
            start, some = random.Random(length).randrange(1 << 32), data[shift : shift + length]
            assert crc32(some, start) == zlib.crc32(some.tobytes(), start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_blocks_there_and_back(dtype: torch.dtype) -> None:
    """The same bytes as by an index, nothing else is touched, and every slot count."""
    plain, other = new_rank(dtype, seed=1), new_rank(dtype, seed=2)
    native = native_of(other, np.zeros(FRAMES * FRAME_BYTES, dtype=np.uint8))
    other.copier = native
    size = plain.slot_bytes(0)
    for slots in range(1, SIZE + 1):
        block = slots % BLOCKS
        log, again = np.zeros(SIZE * size, dtype=np.uint8), np.zeros(SIZE * size, dtype=np.uint8)
        plain.gather(block=block, group=0, slots=slots, target=log[: slots * size])
        expected = other.kv.clone()
        index = other._index(block, 0, 0, slots)
        expected[index] = plain.kv[index]
        crc = crc32(log[: slots * size])
        assert other.adopt(block=block, group=0, slots=slots, log=log, checksum=crc) == slots * size
        assert torch.equal(other.kv, expected)
        other.gather(block=block, group=0, slots=slots, target=again[: slots * size])
        assert np.array_equal(log, again)


def test_whole_blocks_out_of_bounds() -> None:
    rank = new_rank()
    native = native_of(rank, np.zeros(FRAMES * FRAME_BYTES, dtype=np.uint8))
    log, before = np.ones((SIZE + 1) * rank.slot_bytes(0), dtype=np.uint8), rank.kv.clone()
    for copy in (native.scatter, native.gather):
        with pytest.raises(CorruptionError, match=f"1 slots of block {BLOCKS}, group 0, are out of bounds"):
            copy(block=BLOCKS, group=0, slots=1, log=log)
        with pytest.raises(CorruptionError, match="out of bounds"):
            copy(block=0, group=0, slots=SIZE + 1, log=log)
    assert torch.equal(rank.kv, before)
