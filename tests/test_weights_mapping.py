"""Ranges of shared memory: seen by all while they are filled, then each one's own; given back with the last array."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ghostserve.weights import pool_memory
from ghostserve.weights.mapping import Mapped, written_pages

PAGE = mmap.PAGESIZE


@pytest.fixture
def fd() -> Iterator[int]:
    fd = pool_memory.create(4 * PAGE)
    yield fd
    os.close(fd)


def mapped_ranges() -> int:
    return Path("/proc/self/maps").read_text().count("ghostserve-weights")


def test_shared_is_seen_and_private_is_not(fd: int) -> None:
    shared = Mapped(fd, offset=0, length=4 * PAGE, shared=True).array()
    private = Mapped(fd, offset=PAGE, length=PAGE, shared=False).array()
    shared[PAGE] = 7
    assert private[0] == 7
    private[0] = 8
    assert shared[PAGE] == 7


def flags_of(array: np.ndarray) -> list[str]:
    """What the kernel was told of the mapping that the array lies in (proc(5), VmFlags)."""
    ours = f"{array.ctypes.data:x}-"
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(ours))
    return next(line for line in lines[at:] if line.startswith("VmFlags:")).split()[1:]


def test_large_pages_are_asked_for(fd: int) -> None:
    """Whether they are given is the machine's business (shmem_enabled)."""
    plain = mmap.mmap(fd, 4 * PAGE)
    mapped = Mapped(fd, offset=0, length=4 * PAGE, shared=True)
    array = mapped.array()
    assert "hg" not in flags_of(np.frombuffer(plain, dtype=np.uint8))
    assert "hg" in flags_of(array)
    mapped.make_private(fd)
    assert "hg" in flags_of(array)


def test_from_shared_to_private_in_place(fd: int) -> None:
    """The addresses stay, and so does what is there; then the memory can be sealed."""
    mapped = Mapped(fd, offset=0, length=4 * PAGE, shared=True)
    array = mapped.array()
    array[:] = 5
    with pytest.raises(Exception, match="mapped for writing"):
        pool_memory.seal(fd, 4 * PAGE, b"")
    mapped.make_private(fd)
    pool_memory.seal(fd, 4 * PAGE, b"")
    assert (array == 5).all()
    array[0] = 6
    assert os.pread(fd, 1, 0) == b"\x05"


def test_given_back_with_the_last_array(fd: int) -> None:
    before = mapped_ranges()
    part = Mapped(fd, offset=0, length=4 * PAGE, shared=False).array()[10:20]
    assert mapped_ranges() == before + 1
    del part
    assert mapped_ranges() == before


def test_what_cannot_be_mapped(fd: int) -> None:
    with pytest.raises(OSError, match="mapping"):
        Mapped(fd, offset=1, length=PAGE, shared=True)


def test_written_pages_are_known() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 8 * PAGE), dtype=np.uint8)
    memory = memory.copy() if not memory.flags.writeable else memory
    memory[3 * PAGE] = 1
    written = written_pages(memory.ctypes.data, memory.nbytes)
    assert len(written) == 8
    assert written[3]
    assert not written.all() or _huge_pages()


def _huge_pages() -> bool:
    return "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
