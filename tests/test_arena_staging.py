"""Staged records: found only whole and only under their own step and epoch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from ghostserve.arena.memfd import Segment
from ghostserve.arena.staging import StagingArea
from ghostserve.errors import BudgetExceeded, UsageError

RANKS, RING, RECORD = 3, 2, 100


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create("test", StagingArea.required_bytes(ranks=RANKS, ring=RING, record_bytes=RECORD))
    yield made
    made.close()


def area(segment: Segment) -> StagingArea:
    return StagingArea(segment, ranks=RANKS, ring=RING, record_bytes=RECORD)


def test_each_rank_and_step_has_its_own(segment: Segment) -> None:
    writer, reader = area(segment), area(segment)
    for rank in range(RANKS):
        for step in (10, 11):
            writer.write(rank, step, 1, bytes([rank, step]) * 50)
    for rank in range(RANKS):
        for step in (10, 11):
            assert reader.read(rank, step, 1) == bytes([rank, step]) * 50


def test_only_this_step_of_this_epoch(segment: Segment) -> None:
    staging = area(segment)
    assert staging.read(0, 0, 0) is None  # zeros are no record
    staging.write(0, 4, 1, b"four")
    assert staging.read(0, 4, 1) == b"four"
    assert staging.read(0, 4, 2) is None
    assert staging.read(0, 6, 1) is None  # the same place in the ring
    assert staging.read(0, 5, 1) is None
    assert staging.read(1, 4, 1) is None
    staging.write(0, 6, 1, b"six")
    assert staging.read(0, 4, 1) is None


def test_empty_and_full_records_and_views(segment: Segment) -> None:
    staging = area(segment)
    staging.write(0, 1, 1, b"")
    assert staging.read(0, 1, 1) == b""
    staging.write(2, 1, 1, np.arange(RECORD, dtype=np.uint8).data)
    assert staging.read(2, 1, 1) == bytes(range(RECORD))
    with pytest.raises(BudgetExceeded, match="101 bytes, room for 100"):
        staging.write(0, 1, 1, b"x" * (RECORD + 1))
    assert staging.read(0, 1, 1) == b""


def test_torn_at_any_byte_it_is_old_new_or_absent(segment: Segment) -> None:
    """A rank may die after any byte it stored, in whatever order they reach memory."""
    staging = area(segment)
    staging.write(1, 8, 3, b"old " * 20)
    before = segment.array.copy()
    staging.write(1, 10, 3, b"new record " * 8)
    after = segment.array.copy()
    absent = mixed = 0
    changed = np.flatnonzero(before != after)
    for order in (changed, changed[::-1]):
        for stored in range(len(order) + 1):
            segment.array[:] = before
            segment.array[order[:stored]] = after[order[:stored]]
            old, new = staging.read(1, 8, 3), staging.read(1, 10, 3)
            assert old in (None, b"old " * 20)
            assert new in (None, b"new record " * 8)
            absent += old is None and new is None
            mixed += 0 < stored < len(order)
    assert absent
    assert mixed


def test_a_flipped_bit_anywhere_is_found(segment: Segment) -> None:
    staging = area(segment)
    staging.write(0, 1, 1, b"payload")
    place = np.flatnonzero(segment.array)
    for at in range(place[0], place[-1] + 1):
        segment.array[at] ^= 1
        assert staging.read(0, 1, 1) is None
        segment.array[at] ^= 1
    assert staging.read(0, 1, 1) == b"payload"


def test_it_is_seen_through_another_mapping(segment: Segment) -> None:
    other = Segment.attach(os.dup(segment.fd))
    area(segment).write(2, 7, 1, b"hello")
    assert area(other).read(2, 7, 1) == b"hello"
    other.close()


def test_refused_sizes(segment: Segment) -> None:
    with pytest.raises(UsageError, match="needed"):
        StagingArea(segment, ranks=RANKS + 1, ring=RING, record_bytes=RECORD)
    with pytest.raises(UsageError, match="ring of 0"):
        StagingArea.required_bytes(ranks=1, ring=0, record_bytes=1)
    with pytest.raises(AssertionError):
        area(segment).read(RANKS, 0, 0)
