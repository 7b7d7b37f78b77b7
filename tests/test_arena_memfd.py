"""Shared segments: growing, sharing, wiping, and leaving nothing behind."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ghostserve.arena.memfd import Segment
from ghostserve.errors import UsageError

PAGE = mmap.PAGESIZE


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create("test", 8 * PAGE)
    yield made
    made.close()


def test_starts_as_zeros_and_is_shared(segment: Segment) -> None:
    other = Segment.attach(os.dup(segment.fd))
    assert other.size_bytes == segment.size_bytes == 8 * PAGE
    assert not other.array.any()
    segment.array[5] = 7
    assert other.array[5] == 7
    other.close()


def test_an_empty_segment_can_grow() -> None:
    segment = Segment.create("test", 0)
    other = Segment.attach(os.dup(segment.fd))
    assert segment.size_bytes == 0
    segment.resize(3 * PAGE)
    segment.array[-1] = 9
    assert other.size_bytes == 0
    other.refresh()
    assert other.size_bytes == 3 * PAGE
    assert other.array[-1] == 9
    segment.close()
    other.close()


def test_old_views_show_the_same_memory_after_growth_and_close(segment: Segment) -> None:
    old = segment.array
    segment.resize(16 * PAGE)
    old[3] = 1
    assert segment.array[3] == 1
    new = segment.array
    segment.close()
    segment.close()
    new[4] = 2
    assert old[4] == 2


def test_shrinking_is_refused(segment: Segment) -> None:
    with pytest.raises(UsageError, match=f"{8 * PAGE} bytes cannot shrink to {PAGE}"):
        segment.resize(PAGE)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 8 * PAGE),
        (PAGE, PAGE),
        (10, 20),
        (PAGE - 3, 6),
        (5, 3 * PAGE),
        (3 * PAGE + 1, 5 * PAGE - 1),
        (7, 0),
    ],
)
def test_punch_wipes_exactly_its_range(segment: Segment, offset: int, length: int) -> None:
    segment.array[:] = 0xFF
    expected = np.full(8 * PAGE, 0xFF, dtype=np.uint8)
    expected[offset : offset + length] = 0
    segment.punch(offset, length)
    assert np.array_equal(segment.array, expected)


def test_punch_gives_memory_back(segment: Segment) -> None:
    segment.array[:] = 1
    assert segment.allocated_bytes() == 8 * PAGE
    segment.punch(PAGE // 2, 4 * PAGE)  # half a page, three whole ones, half a page
    assert segment.allocated_bytes() == 5 * PAGE


def test_populate_gives_memory_and_keeps_contents(segment: Segment) -> None:
    segment.array[PAGE] = 7
    segment.populate(0, 0)
    segment.populate(0, 4 * PAGE)
    assert segment.allocated_bytes() in (PAGE, 4 * PAGE)  # the former on an old kernel
    assert segment.array[PAGE] == 7
    with pytest.raises(AssertionError):
        segment.populate(PAGE, 8 * PAGE)


def test_punch_beyond_the_end_is_our_bug(segment: Segment) -> None:
    with pytest.raises(AssertionError):
        segment.punch(7 * PAGE, 2 * PAGE)


def test_a_bad_descriptor_is_the_callers_still() -> None:
    read, write = os.pipe()
    os.write(write, b"x")
    try:
        segment = Segment.attach(read)  # a pipe has size 0, so it maps to nothing
        with pytest.raises(OSError):
            segment.resize(PAGE)
        segment.close()
    finally:
        os.close(write)
    with pytest.raises(OSError):
        Segment.attach(read)


def test_no_name_is_left_and_no_descriptor() -> None:
    def descriptors() -> int:
        """Of these segments: other tests' threads may close theirs meanwhile."""
        gc.collect()
        places = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum("memfd:counted" in os.readlink(place) for place in places if os.path.islink(place))

    assert descriptors() == 0
    segments = [Segment.create("counted", 4 * PAGE) for _ in range(20)]
    assert descriptors() >= 20
    assert all(os.fstat(segment.fd).st_nlink == 0 for segment in segments)
    for segment in segments:
        segment.resize(8 * PAGE)
        segment.close()
    del segment
    segments.clear()
    assert descriptors() == 0


def test_another_program_does_not_inherit_it(segment: Segment) -> None:
    script = """
import os
places = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
print(any("memfd:test" in os.readlink(place) for place in places if os.path.islink(place)))
"""
    command = [sys.executable, "-S", "-c", script]
    passed = subprocess.run(command, pass_fds=[segment.fd], capture_output=True, text=True, timeout=30)
    plain = subprocess.run(command, close_fds=False, capture_output=True, text=True, timeout=30)
    assert passed.stdout.strip() == "True"  # the check can see it
    assert plain.stdout.strip() == "False"


def test_it_stays_out_of_core_dumps(segment: Segment) -> None:
    segment.array[0] = 1
    entries = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = [
        after.split("\n")[0].split()
        for before, after in itertools.pairwise(entries)
        if "memfd:test" in before
    ]
    assert flags
    assert all("dd" in of_map for of_map in flags)
