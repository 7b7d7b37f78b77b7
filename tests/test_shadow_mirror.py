"""Bytes between KV memory and the arena: nothing is changed, nothing else is touched, nothing wrong is believed."""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ghostserve.errors import CorruptionError
from ghostserve.shadow.mirror import GroupMap, Mirror
from ghostserve.types import STEPS_IN_FLIGHT_MAX

BLOCKS, SIZE, HEADS, HEAD = 5, 4, 2, 8
FRAMES, FRAME_BYTES = 6, 4096
LAYERS = 2


@dataclass
class Memory:
    """One rank's KV as vLLM's CPU backend lays it out: per block and layer K as [head][dim][slot], V as [head][slot][dim]."""

    cache: torch.Tensor  # [blocks, layers, 2, heads * SIZE * HEAD]

    def k(self, block: int, layer: int) -> torch.Tensor:
        return self.cache[block, layer, 0].view(HEADS, HEAD, SIZE).permute(2, 0, 1)

    def v(self, block: int, layer: int) -> torch.Tensor:
        return self.cache[block, layer, 1].view(HEADS, SIZE, HEAD).permute(1, 0, 2)

    def slot(self, block: int, slot: int) -> torch.Tensor:
        """Everything a token has in a block."""
        parts = [half(block, layer)[slot].reshape(-1) for layer in range(LAYERS) for half in (self.k, self.v)]
        return torch.cat(parts)


def slot_map() -> GroupMap:
    """The words of each slot of block 0, in ascending order, as the probe would find them."""
    words = torch.arange(LAYERS * 2 * HEADS * SIZE * HEAD)
    numbers = Memory(words.view(1, LAYERS, 2, -1))
    found = torch.stack([numbers.slot(0, slot).sort().values for slot in range(SIZE)])
    return GroupMap(words=found, stride_words=torch.full((found.shape[1],), len(words)))


def new_rank(dtype: torch.dtype = torch.float32, *, arena: np.ndarray | None = None, seed: int = 0) -> Mirror:
    """A rank with random KV, and its view of the arena."""
    torch.manual_seed(seed)
    cache = torch.randn(BLOCKS, LAYERS, 2, HEADS * SIZE * HEAD).to(dtype)
    arena = np.zeros(FRAMES * FRAME_BYTES, dtype=np.uint8) if arena is None else arena
    return Mirror(
        kv=Mirror.words_of(cache.untyped_storage(), dtype.itemsize, cache.device),
        groups=(slot_map(),),
        num_blocks=BLOCKS,
        frames=arena,
        frame_bytes=FRAME_BYTES,
    )


def memory(rank: Mirror, dtype: torch.dtype = torch.float32) -> Memory:
    return Memory(rank.kv.view(dtype).view(BLOCKS, LAYERS, 2, -1))


def stage(rank: Mirror, block: int, start: int, stop: int, *, frame: int = 0) -> int:
    return rank.stage(block=block, group=0, start=start, stop=stop, frame=frame)


def adopt(rank: Mirror, block: int, slots: int, *, frame: int, checksum: int | None) -> int:
    return rank.adopt(block=block, group=0, slots=slots, log=rank.frame(frame), checksum=checksum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_log_holds_the_tokens_one_after_the_other(dtype: torch.dtype) -> None:
    rank = new_rank(dtype)
    assert rank.word_bytes == dtype.itemsize
    size = LAYERS * 2 * HEADS * HEAD * dtype.itemsize
    assert rank.slot_bytes(0) == size
    stage(rank, 3, 0, SIZE)
    for slot in range(SIZE):
        log = torch.from_numpy(rank.frame(0)[slot * size : (slot + 1) * size].copy()).view(dtype)
        want = memory(rank, dtype).slot(3, slot)
        assert log.view(torch.uint8).sort().values.equal(want.contiguous().view(torch.uint8).sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", range(1, SIZE + 1))
def test_what_is_adopted_is_what_was_staged_and_nothing_else_changes(dtype: torch.dtype, slots: int) -> None:
    old = new_rank(dtype)
    checksum = stage(old, 2, 0, slots, frame=4)
    newcomer = new_rank(dtype, arena=old.frames, seed=1)
    before = newcomer.kv.clone()
    assert adopt(newcomer, 2, slots, frame=4, checksum=checksum) == slots * old.slot_bytes(0)
    for block in range(BLOCKS):
        for slot in range(SIZE):
            restored = block == 2 and slot < slots
            source = old.kv if restored else before
            want = Memory(source.view(dtype).view(BLOCKS, LAYERS, 2, -1)).slot(block, slot)
            assert memory(newcomer, dtype).slot(block, slot).equal(want), (block, slot)


def test_odd_bit_patterns_survive() -> None:
    """NaNs with payloads, minus zero, denormals: bytes are bytes."""
    rank = new_rank()
    patterns = torch.tensor([0x7FC00001, 0x7F800001, 1, -(2**31)], dtype=torch.int32)
    rank.kv[: BLOCKS * 256] = patterns.repeat(BLOCKS * 256 // 4)
    before = rank.kv.clone()
    checksum = stage(rank, 1, 0, SIZE)
    rank.kv.zero_()
    adopt(rank, 1, SIZE, frame=0, checksum=checksum)
    assert rank.slots_equal(1, 0, SIZE, before)


def test_checksums_chain_over_the_steps() -> None:
    rank = new_rank()
    for stop in range(1, SIZE + 1):
        checksum = stage(rank, 1, stop - 1, stop)
        assert checksum == zlib.crc32(rank.frame(0)[: stop * rank.slot_bytes(0)].tobytes())


@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 4], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_a_log_does_not_depend_on_how_it_was_cut(cuts: list[int]) -> None:
    rank = new_rank()
    for start, stop in itertools.pairwise(cuts):
        checksum = stage(rank, 1, start, stop)
    other = new_rank()
    assert checksum == stage(other, 1, 0, SIZE)
    assert rank.frame(0).tobytes() == other.frame(0).tobytes()


def test_staging_touches_only_its_range_of_its_frame() -> None:
    rank = new_rank()
    rank.frames[:] = 0xEE
    stage(rank, 1, 0, 1, frame=2)
    rank.frame(2)[: rank.slot_bytes(0)] = 0xEE  # what a committed prefix would look like
    stage(rank, 1, 1, 3, frame=2)
    size = rank.slot_bytes(0)
    rank.frame(2)[size : 3 * size] = 0xEE
    assert (rank.frames == 0xEE).all()


def test_a_step_is_staged_again_from_the_same_start() -> None:
    """After a failed step: KV of the retry may differ from that of the first try, the log follows it."""
    rank = new_rank()
    first = stage(rank, 1, 0, 2)
    torn = stage(rank, 1, 2, 3)
    rank.kv.add_(1)
    again = stage(rank, 1, 2, 3)
    assert again != torn
    assert again == zlib.crc32(rank.frame(0)[: 3 * rank.slot_bytes(0)].tobytes())
    assert first == zlib.crc32(rank.frame(0)[: 2 * rank.slot_bytes(0)].tobytes()), (
        "what was committed stays whole"
    )


def test_a_survivor_that_had_not_staged_goes_on_where_it_was() -> None:
    rank = new_rank()
    stage(rank, 1, 0, 1)
    stage(rank, 1, 1, 2)
    assert stage(rank, 1, 2, 3) == zlib.crc32(rank.frame(0)[: 3 * rank.slot_bytes(0)].tobytes())


def test_a_log_is_not_continued_from_a_point_nobody_knows() -> None:
    """It is taken from live KV as a whole: never a checksum over bytes of another."""
    rank = new_rank()
    stage(rank, 1, 0, 1)
    stage(rank, 1, 1, 3)
    whole = new_rank()
    expected = stage(whole, 1, 0, 4)
    assert stage(rank, 1, 2, 4) == expected
    assert stage(rank, 1, 3, 4, frame=5) == expected
    for frame in (0, 5):
        assert np.array_equal(rank.frame(frame), whole.frame(0))


def test_steps_in_flight_are_staged_again_from_where_the_first_began() -> None:
    rank = new_rank()
    stage(rank, 1, 0, 1)
    once = [stage(rank, 1, start, start + 1) for start in range(1, 1 + STEPS_IN_FLIGHT_MAX)]
    again = [stage(rank, 1, start, start + 1) for start in range(1, 1 + STEPS_IN_FLIGHT_MAX)]
    assert once == again


def test_a_frame_that_is_used_again_starts_from_nothing() -> None:
    rank = new_rank()
    stage(rank, 1, 0, 3)
    checksum = stage(rank, 2, 0, 1)
    assert checksum == zlib.crc32(rank.frame(0)[: rank.slot_bytes(0)].tobytes())
    assert stage(rank, 1, 3, 4) == stage(new_rank(), 1, 0, 4)


def test_a_newcomer_continues_the_log_of_its_predecessor() -> None:
    old = new_rank()
    checksum = stage(old, 1, 0, 2)
    newcomer = new_rank(arena=old.frames, seed=1)
    adopt(newcomer, 1, 2, frame=0, checksum=checksum)
    newcomer.seed_progress(frame=0, slots=2, checksum=checksum)
    after = stage(newcomer, 1, 2, 3)
    assert after == zlib.crc32(newcomer.frame(0)[: 3 * newcomer.slot_bytes(0)].tobytes())
    third = new_rank(arena=old.frames, seed=2)
    adopt(third, 1, 3, frame=0, checksum=after)
    assert third.slots_equal(1, 0, 3, newcomer.kv)


@pytest.mark.parametrize("seed", range(10))
def test_corruption_is_refused_and_nothing_is_written(seed: int) -> None:
    rng = random.Random(seed)
    old = new_rank()
    slots = rng.randint(1, SIZE)
    checksum = stage(old, 1, 0, slots)
    old.frame(0)[rng.randrange(slots * old.slot_bytes(0))] ^= 1 << rng.randrange(8)
    newcomer = new_rank(arena=old.frames, seed=1)
    before = newcomer.kv.clone()
    with pytest.raises(CorruptionError, match="block 1"):
        adopt(newcomer, 1, slots, frame=0, checksum=checksum)
    assert newcomer.kv.equal(before)


def test_bytes_behind_the_log_do_not_matter() -> None:
    old = new_rank()
    checksum = stage(old, 1, 0, 2)
    old.frame(0)[2 * old.slot_bytes(0) :] = 0xFF
    assert adopt(old, 1, 2, frame=0, checksum=checksum) > 0


def test_without_a_checksum_nothing_is_checked() -> None:
    """The negative control: with the check off, corruption gets through."""
    old = new_rank()
    stage(old, 1, 0, SIZE)
    before = old.kv.clone()
    old.frame(0)[0] ^= 1
    adopt(old, 1, SIZE, frame=0, checksum=None)
    assert not old.slots_equal(1, 0, SIZE, before)


def test_an_export_is_a_whole_log() -> None:
    rank = new_rank()
    stage(rank, 2, 0, SIZE, frame=0)
    rank.export(block=2, group=0, frame=1)
    assert rank.frame(0).tobytes() == rank.frame(1).tobytes()


def test_parity_of_two_ranks_gives_either_back() -> None:
    a, b = new_rank(seed=1), new_rank(seed=2)
    checksums = [stage(rank, 2, 0, SIZE) for rank in (a, b)]
    parity = a.frame(0) ^ b.frame(0)
    b.export(block=2, group=0, frame=1)
    newcomer = new_rank(seed=3)
    newcomer.adopt(block=2, group=0, slots=SIZE, log=parity ^ b.frame(1), checksum=checksums[0])
    assert newcomer.slots_equal(2, 0, SIZE, a.kv)
    assert not newcomer.slots_equal(1, 0, SIZE, a.kv)


def test_the_debug_copy_tells_slots_that_differ() -> None:
    rank = new_rank()
    copy = torch.zeros_like(rank.kv)
    rank.copy_slots(1, 0, 1, 3, copy)
    assert torch.count_nonzero(copy) <= 2 * rank.slot_bytes(0) // rank.word_bytes
    rank.copy_slots(1, 0, 0, 1, copy)
    assert rank.slots_equal(1, 0, 3, copy)
    assert not rank.slots_equal(1, 0, SIZE, copy)


def test_groups_have_layouts_of_their_own() -> None:
    rank = new_rank()
    small = GroupMap(words=slot_map().words[:, :10].contiguous(), stride_words=slot_map().stride_words[:10])
    two = Mirror(
        kv=rank.kv, groups=(slot_map(), small), num_blocks=BLOCKS, frames=rank.frames, frame_bytes=FRAME_BYTES
    )
    layout = two.layout()
    assert [group.slot_bytes for group in layout.groups] == [rank.slot_bytes(0), 10 * 4]
    assert len({group.fingerprint for group in layout.groups}) == 2
    assert two.stage(block=1, group=1, start=0, stop=2, frame=0) == zlib.crc32(two.frame(0)[:80].tobytes())


def test_a_layout_is_known_by_its_words_and_strides() -> None:
    rank, same = new_rank(), new_rank(seed=5)
    assert rank.layout() == same.layout(), "contents do not matter"
    longer = GroupMap(words=slot_map().words, stride_words=slot_map().stride_words + 1)
    other = Mirror(
        kv=rank.kv, groups=(longer,), num_blocks=BLOCKS, frames=rank.frames, frame_bytes=FRAME_BYTES
    )
    assert other.layout().fingerprint != rank.layout().fingerprint


def test_the_words_are_the_storage_itself() -> None:
    cache = torch.zeros(4, dtype=torch.bfloat16)
    words = Mirror.words_of(cache.untyped_storage(), 2, cache.device)
    words[1] = 0x3F80
    assert cache.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flipped_signs_are_those_of_the_named_slots(dtype: torch.dtype) -> None:
    """An injected fault: it corrupts what it says, and nothing else."""
    rank = new_rank(dtype)
    before = memory(rank, dtype).cache.clone()
    rank.flip_signs(block=2, group=0, slots=3)
    expected = Memory(before.clone())
    for slot, layer in itertools.product(range(3), range(LAYERS)):
        for half in (expected.k, expected.v):
            half(2, layer)[slot] *= -1
    assert torch.equal(memory(rank, dtype).cache, expected.cache)
    rank.flip_signs(block=2, group=0, slots=3)
    assert torch.equal(memory(rank, dtype).cache, before)
