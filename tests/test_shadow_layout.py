"""Slot maps from bit planes: whatever the layout, every slot's words are found, or the layout is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostserve.errors import UnsupportedError
from ghostserve.shadow.layout import (
    FRAME_ALIGNMENT_BYTES,
    GroupLayout,
    Layout,
    probe_bits,
    probe_values,
    slot_words,
    words_fingerprint,
)

Owners = npt.NDArray[np.int64]  # per word of a page: the slot that owns it, or PADDING
PADDING = -1


def probe(owners: Owners, block_size: int) -> npt.NDArray[np.int64]:
    """What the engine does: write every plane through `owners`, read the page back, ask for the slot map."""

    def read_back(plane: int | None) -> npt.NDArray[np.bool_]:
        page = np.zeros(owners.shape, dtype=np.float32)
        mine = owners != PADDING
        page[mine] = probe_values(block_size, plane)[owners[mine]]
        return page != 0

    planes = [read_back(bit) for bit in range(probe_bits(block_size))]
    return slot_words(read_back(None), planes, block_size=block_size)


def contiguous(block_size: int, words_per_slot: int) -> Owners:
    """[slot][word]: as on a GPU."""
    return np.repeat(np.arange(block_size), words_per_slot)


def transposed_k(block_size: int, heads: int, head_size: int) -> Owners:
    """K as [head][dim][slot] and V as [head][slot][dim]: as on a CPU."""
    slots = np.arange(block_size)
    k = np.tile(slots, heads * head_size)
    v = np.tile(np.repeat(slots, head_size), heads)
    return np.concatenate([k, v])


def token_pairs(block_size: int, head_size: int) -> Owners:
    """[slot pair][dim][slot of the pair]: as with AMX in bfloat16."""
    pairs = np.arange(block_size).reshape(-1, 2)
    return np.concatenate([np.tile(pair, head_size) for pair in pairs])


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 17, 32, 128])
def test_planes_tell_all_slots_apart(block_size: int) -> None:
    values = np.stack([probe_values(block_size, bit) for bit in range(probe_bits(block_size))])
    assert len({tuple(column) for column in values.T}) == block_size
    assert probe_values(block_size, None).tolist() == [1.0] * block_size


def test_contiguous_slots() -> None:
    words = probe(contiguous(16, 8), 16)
    assert words.tolist() == np.arange(16 * 8).reshape(16, 8).tolist()


def test_transposed_k_scatters_a_slot_over_many_runs() -> None:
    block_size, heads, head_size = 16, 2, 64
    words = probe(transposed_k(block_size, heads, head_size), block_size)
    assert words.shape == (block_size, 2 * heads * head_size)
    runs = 1 + np.count_nonzero(np.diff(words[3]) != 1)
    assert runs == heads * head_size + heads  # one word per K element, one run per head of V
    assert words[3][: heads * head_size].tolist() == [3 + block_size * i for i in range(heads * head_size)]


def test_pairs_of_tokens() -> None:
    words = probe(token_pairs(4, 3), 4)
    assert words.tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


def test_words_that_belong_to_no_slot_are_left_alone() -> None:
    owners = np.concatenate([contiguous(4, 2), [PADDING] * 5, contiguous(4, 1)])
    words = probe(owners, 4)
    assert words.tolist() == [[0, 1, 13], [2, 3, 14], [4, 5, 15], [6, 7, 16]]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 9), st.integers(0, 2**32))
def test_any_assignment_of_words_to_slots(block_size: int, per_slot: int, padding: int, seed: int) -> None:
    layout = [*np.repeat(np.arange(block_size), per_slot), *[PADDING] * padding]
    random.Random(seed).shuffle(layout)
    owners = np.array(layout)
    words = probe(owners, block_size)
    for slot in range(block_size):
        assert words[slot].tolist() == np.flatnonzero(owners == slot).tolist()


@pytest.mark.parametrize(
    ("owners", "says"),
    [
        (np.array([0, 0, 1]), "1 to 2 words"),
        (np.array([0, 2, 3]), "0 to 1 words"),  # slot 1 has none
        (np.array([0, 1, 2]), "over 4 slots of 4|0 to 1 words"),  # the last has none
        (np.full(8, PADDING), "0 to 0 words"),  # nothing was written at all
    ],
)
def test_slots_of_unequal_size_are_refused(owners: Owners, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says) as error:
        probe(owners, 2 if owners.max() == 1 else 4)
    assert "--protection none" in str(error.value)


def test_more_slots_than_the_block_has_are_refused() -> None:
    used = np.ones(4, dtype=np.bool_)
    planes = [np.array([False, True, False, True]), np.array([False, False, True, True])]
    with pytest.raises(UnsupportedError, match="over 4 slots of 3"):
        slot_words(used, planes, block_size=3)


def test_fingerprint_of_a_slot_map() -> None:
    words = probe(transposed_k(4, 1, 2), 4)
    assert words_fingerprint(words) == words_fingerprint(words.copy())
    assert words_fingerprint(words) == words_fingerprint(np.asfortranarray(words)), (
        "memory order is no identity"
    )
    assert words_fingerprint(words) != words_fingerprint(probe(contiguous(4, 4), 4))
    flat = np.arange(8).reshape(2, 4)
    assert words_fingerprint(flat) != words_fingerprint(flat.reshape(4, 2)), "the shape is part of it"


GROUP = GroupLayout(block_size=16, slot_bytes=512, fingerprint="a")
LAYOUT = Layout(groups=(GROUP,), num_blocks=100)


def test_a_frame_holds_a_block_of_any_group() -> None:
    small = replace(GROUP, slot_bytes=3)
    assert GROUP.block_bytes == 8192
    assert LAYOUT.frame_bytes == 8192
    assert Layout(groups=(small, GROUP), num_blocks=1).frame_bytes == 8192
    assert Layout(groups=(small,), num_blocks=1).frame_bytes == FRAME_ALIGNMENT_BYTES


@pytest.mark.parametrize(
    "other",
    [
        replace(LAYOUT, num_blocks=101),
        replace(LAYOUT, groups=(GROUP, GROUP)),
        *(
            replace(LAYOUT, groups=(replace(GROUP, **change),))  # type: ignore[arg-type]
            for change in ({"block_size": 32}, {"slot_bytes": 256}, {"fingerprint": "b"})
        ),
    ],
)
def test_layouts_that_differ_have_other_fingerprints(other: Layout) -> None:
    assert other.fingerprint != LAYOUT.fingerprint
    assert replace(other).fingerprint == other.fingerprint
