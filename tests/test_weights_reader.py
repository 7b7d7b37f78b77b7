"""The reader gives exactly the bytes of the file: every way in which they can lie in file and memory, and every file system here."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostserve.errors import MissingShardError, WeightsChangedError, WeightsReadError
from ghostserve.weights import reader, source
from ghostserve.weights.bounded import answer_within
from ghostserve.weights.checksums import CELL_BYTES, Checksums
from ghostserve.weights.model_files import open_model
from ghostserve.weights.ranges import Range, packed
from ghostserve.weights.reader import ReadStats, read_ranges
from ghostserve.weights.source import Source
from weights_kit import open_files, write_bytes_file, write_weights

PAGE = mmap.PAGESIZE
CHUNK = 64 << 10
WAYS = [True, False, None]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No thread and no descriptor outlives a read. Those of other tests may end meanwhile."""
    gc.collect()
    before, threads = open_files(), set(threading.enumerate())
    yield
    assert [thread.name for thread in set(threading.enumerate()) - threads] == []
    assert open_files() - before == set()


def whole(path: Path, **order: object) -> tuple[bytes, ReadStats, list[int]]:
    """The file by one read into fresh memory, in small chunks."""
    nbytes = path.stat().st_size
    memory, ready = mmap.mmap(-1, max(nbytes, 1)), list[int]()
    stats = read_ranges(
        path,
        [Range(0, nbytes, 0)],
        memoryview(memory),
        **{"chunk_bytes": CHUNK, "on_ready": ready.append, **order},  # type: ignore[arg-type]
    )
    data = memory[:nbytes]
    memory.close()  # a BufferError if the reader still held it
    return data, stats, ready


@pytest.mark.parametrize("direct", WAYS)
@pytest.mark.parametrize(
    "nbytes", [0, 1, 511, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK + 4099]
)
def test_files_of_every_length(tmp_path: Path, nbytes: int, direct: bool | None) -> None:
    content = random.Random(nbytes).randbytes(nbytes)
    (tmp_path / "x").write_bytes(content)
    data, stats, ready = whole(tmp_path / "x", direct=direct)
    assert data == content
    assert stats.bytes_wanted == stats.bytes_read == nbytes
    assert stats.bytes_copied == 0
    assert stats.reads == -(-nbytes // CHUNK)
    assert ready == sorted(set(ready))
    assert ready[-1:] == ([nbytes] if nbytes else [])


@pytest.mark.parametrize("shift", [1, 512, PAGE])
def test_what_cannot_be_read_in_place_is_copied(tmp_path: Path, shift: int) -> None:
    """And still comes past the page cache: a direct read into memory at an odd place would be refused."""
    content = write_bytes_file(tmp_path / "x", 5 * CHUNK + 9)
    memory = mmap.mmap(-1, len(content) + PAGE)
    ranges = [Range(0, len(content), shift)]
    stats = read_ranges(tmp_path / "x", ranges, memoryview(memory), direct=True, chunk_bytes=CHUNK)
    assert memory[shift : shift + len(content)] == content
    assert stats.bytes_direct == 5 * CHUNK
    assert stats.bytes_copied == (0 if shift == PAGE else len(content))


def test_direct_is_past_the_page_cache_and_the_rest_is_not(tmp_path: Path) -> None:
    """By default: from the disk past the page cache, and what is cached from there."""
    path = tmp_path / "x"
    content = write_bytes_file(path, 10 * CHUNK + 100)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for _ in range(2):  # the first has put nothing into it
        data, stats, _ready = whole(path)
        assert (data, stats.bytes_direct) == (content, 10 * CHUNK)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the odd bytes at the end
    os.pread(fd, 4 * CHUNK, 0)
    data, stats, _ready = whole(path)
    assert data == content
    assert stats.bytes_direct <= 6 * CHUNK
    data, stats, _ready = whole(path, direct=True)
    assert (data, stats.bytes_direct) == (content, 10 * CHUNK)
    data, stats, _ready = whole(path, direct=False)
    assert (data, stats.bytes_direct) == (content, 0)
    os.close(fd)


@pytest.mark.parametrize("direct", WAYS)
def test_a_file_system_in_memory(direct: bool | None) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        content = write_bytes_file(Path(folder) / "x", 5 * CHUNK + 5)
        assert whole(Path(folder) / "x", direct=direct)[0] == content


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    content = write_bytes_file(tmp_path / "x", 5 * CHUNK + 5)
    real = os.open

    def refuse(path: object, flags: int, *rest: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(source.os, "open", refuse)
    data, stats, _ = whole(tmp_path / "x", direct=True)
    assert (data, stats.bytes_direct) == (content, 0)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_ranges_to_any_places(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges"
    if not path.exists():
        path.write_bytes(random.Random(1).randbytes(3 * CHUNK + 1234))
    content = path.read_bytes()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=10)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    shift = data.draw(st.sampled_from([0, 1, 8, 512, PAGE]))
    ranges = [Range(one.begin, one.end, one.at + shift) for one in packed(spans)]
    total = sum(end - begin for begin, end in spans)
    memory = mmap.mmap(-1, shift + total + PAGE)
    direct = data.draw(st.sampled_from(WAYS))
    chunk_bytes = data.draw(st.sampled_from([1, PAGE, 3 * PAGE, CHUNK]))
    stats = read_ranges(path, ranges, memoryview(memory), direct=direct, chunk_bytes=chunk_bytes)
    assert memory[shift : shift + total] == b"".join(content[begin:end] for begin, end in spans)
    assert not any(memory[:shift])
    assert not any(memory[shift + total :])
    assert stats.bytes_wanted == total
    memory.close()


def test_the_tensors_of_a_model_one_by_one(tmp_path: Path) -> None:
    tensors = {"tiny": ("U8", [1]), "none": ("F32", [0, 4]), "odd": ("F8_E4M3", [777, 13]), "bits": ("BOOL", [9]),
               "large": ("BF16", [300, 1000]), "scalar": ("I64", [])}  # fmt: skip
    content = write_weights(tmp_path / "model.safetensors", tensors)
    file = open_model(tmp_path).files[0]
    for span in file.header.tensors:
        into = bytearray(span.nbytes)
        read_ranges(file.path, [Range(span.begin, span.end, 0)], memoryview(into), expect=file)
        assert bytes(into) == content[span.begin : span.end]


def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """A sparse file: only the places looked at are there. Tensors behind byte 2^31 and 2^32, and one larger than 2 GiB."""
    path, size = tmp_path / "x", (5 << 30) + 3
    marks = {(2 << 30) - 3: b"aaaaaa", (4 << 30) - 1: b"bb", size - 5: b"ccccc"}
    with path.open("wb") as file:
        file.truncate(size)
        for at, text in marks.items():
            file.seek(at)
            file.write(text)
    ranges = packed((at, at + len(text)) for at, text in marks.items())
    into = bytearray(13)
    assert read_ranges(path, ranges, memoryview(into)).bytes_read < 20 * PAGE
    assert bytes(into) == b"aaaaaabbccccc"
    ready: list[int] = []
    stats = read_ranges(path, [Range(1, (2 << 30) + 9, 0)], None, on_ready=ready.append)
    assert ready[-1] == stats.bytes_wanted == (2 << 30) + 8


def test_the_watermark_means_what_it_says(tmp_path: Path) -> None:
    content = write_bytes_file(tmp_path / "x", 40 * CHUNK + 5)
    memory, seen = mmap.mmap(-1, len(content)), 0

    def told(ready: int) -> None:
        nonlocal seen
        assert threading.current_thread() is threading.main_thread()
        assert memory[seen:ready] == content[seen:ready]
        seen = ready

    read_ranges(
        tmp_path / "x",
        [Range(0, len(content), 0)],
        memoryview(memory),
        depth=8,
        chunk_bytes=CHUNK,
        on_ready=told,
    )
    assert seen == len(content)  # fmt: skip


def test_the_watermark_waits_for_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are done long before it."""
    content = write_bytes_file(tmp_path / "x", 10 * CHUNK)
    others, real = threading.Semaphore(0), Source.read

    def read(self: Source, offset: int, into: memoryview, moved: Callable[[int], None]) -> int:
        if offset == 0:
            for _ in range(9):
                assert others.acquire(timeout=20)
        done = real(self, offset, into, moved)
        others.release()
        return done

    monkeypatch.setattr(Source, "read", read)
    data, _stats, ready = whole(tmp_path / "x")
    assert data == content
    assert ready == [len(content)]


def test_what_the_callback_raises_ends_the_read(tmp_path: Path) -> None:
    write_bytes_file(tmp_path / "x", 40 * CHUNK)

    def refuse(ready: int) -> None:
        raise KeyError(ready)

    with pytest.raises(KeyError):
        whole(tmp_path / "x", on_ready=refuse)


def test_an_error_lets_go_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the garbage collector, or a segment could not be given up."""
    write_bytes_file(tmp_path / "x", 4 * CHUNK)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(source.os, "preadv", fail)
    memory = mmap.mmap(-1, 4 * CHUNK)
    gc.disable()
    try:
        with pytest.raises(WeightsReadError, match="Input/output error at byte"):
            read_ranges(tmp_path / "x", [Range(0, 4 * CHUNK, 0)], memoryview(memory))
        memory.close()
    finally:
        gc.enable()


def test_the_file_must_be_the_one_whose_header_was_read(tmp_path: Path) -> None:
    write_bytes_file(tmp_path / "model.safetensors", 5000)
    file = open_model(tmp_path).files[0]
    order = [Range(0, file.nbytes, 0)]
    into = memoryview(bytearray(file.nbytes))
    read_ranges(file.path, order, into, expect=file)
    write_bytes_file(tmp_path / "new", 5000, seed=2)
    (tmp_path / "new").replace(file.path)
    with pytest.raises(WeightsChangedError, match="written to since"):
        read_ranges(file.path, order, into, expect=file)
    write_bytes_file(file.path, 4000)
    with pytest.raises(WeightsChangedError, match="has 4000 bytes now, and had 5000"):
        read_ranges(file.path, order, into, expect=file)
    file.path.unlink()
    with pytest.raises(MissingShardError):
        read_ranges(file.path, order, into, expect=file)


def test_a_destination_that_is_too_small_or_fixed_is_refused(tmp_path: Path) -> None:
    write_bytes_file(tmp_path / "x", 5000)
    with pytest.raises(ValueError, match="ends behind it"):
        read_ranges(tmp_path / "x", [Range(0, 5000, 0)], memoryview(bytearray(4999)))
    with pytest.raises(ValueError, match="not writable"):
        read_ranges(tmp_path / "x", [Range(0, 5000, 0)], memoryview(bytes(5000)))
    with pytest.raises(ValueError, match="not in the file"):
        read_ranges(tmp_path / "x", [Range(0, 5001, 0)], None)


def test_checks_see_whole_cells_whatever_is_wanted(tmp_path: Path) -> None:
    nbytes = 3 * CELL_BYTES + 4097
    content = write_bytes_file(tmp_path / "x", nbytes)
    sums = Checksums(tmp_path / "x", nbytes)
    into = bytearray(20)
    spans = [(CELL_BYTES - 5, CELL_BYTES + 5), (nbytes - 10, nbytes)]
    read_ranges(tmp_path / "x", packed(spans), memoryview(into), verify=sums)
    assert bytes(into) == b"".join(content[begin:end] for begin, end in spans)
    assert [value is not None for value in sums.values] == [True, True, False, True]


def test_a_call_that_does_not_return_is_left_behind() -> None:
    done = threading.Event()
    with pytest.raises(WeightsReadError, match=r"x: its file system did not answer for 0.05 s"):
        answer_within(0.05, lambda: done.wait(30), Path("x"))
    done.set()
    for thread in threading.enumerate():
        if thread.name == "ghostserve-files":
            thread.join(10)
    assert answer_within(5, lambda: 7, Path("x")) == 7
    with pytest.raises(KeyError):
        answer_within(5, lambda: {}["a"], Path("x"))


def test_a_file_is_open_as_long_as_somebody_reads(tmp_path: Path) -> None:
    """A descriptor that is closed early may be given to another file: wrong bytes."""
    write_bytes_file(tmp_path / "x", 5000)
    opened = Source(tmp_path / "x")
    opened.enter()
    opened.leave()
    assert len(opened.read_bytes(0, 100)) == 100
    opened.enter()
    opened.leave()
    opened.leave()
    with pytest.raises(WeightsReadError, match="Bad file descriptor"):
        opened.read_bytes(0, 100)


def test_stats_add_up() -> None:
    total = ReadStats(wall_s=1.0, reads=2)
    total.add(ReadStats(wall_s=0.5, reads=3, bytes_copied=4))
    assert total == ReadStats(wall_s=1.5, reads=5, bytes_copied=4)
    assert reader.LEAVE_S < reader.STALL_S
