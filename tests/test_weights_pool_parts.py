"""The pool's smaller parts: messages, watermark, sealed memory, and how much memory a machine has."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostserve.clock import monotonic_s
from ghostserve.errors import PoolError, ProtocolError
from ghostserve.weights import pool_memory
from ghostserve.weights import pool_messages as messages
from ghostserve.weights.host_memory import HostMemory, read_host_memory
from ghostserve.weights.pool_book import PoolBook
from ghostserve.weights.pool_layout import ALIGNMENT_BYTES, META_BYTES_MAX, data_end, meta_begin, total_bytes
from ghostserve.weights.pool_types import Image, ImageKind
from ghostserve.weights.watermark import Watermark

GIB = 1 << 30

# ---- messages --------------------------------------------------------------------------------------------------------

REQUESTS = [
    messages.Hello(),
    messages.Hello(budget_bytes=0),
    messages.Open(key="k", nbytes=1, kind="file", label="", reload_cost_s=0.0),
    messages.Open(key="é" * 256, nbytes=1 << 50, kind="rank", label="m" * 256, reload_cost_s=1e9),
    messages.Publish(meta_bytes=META_BYTES_MAX),
    messages.Ask(what="list", after=3),
    messages.Ask(what="drop", name="n" * 256),
]
ANSWERS = [
    messages.Welcome(),
    messages.Given(how="hit", nbytes=1, meta_bytes=2),
    messages.Refused(why="memory", reason="none"),
    messages.Done(entries=1, in_use=1),
    messages.Entries(entries=[], more=False),
]


@pytest.mark.parametrize("message", REQUESTS)
def test_requests_come_over_and_fit(message: messages.Request) -> None:
    data = messages.to_json(message)
    assert len(data) <= messages.REQUEST_BYTES_MAX
    assert messages.request_from_json(data) == message
    with pytest.raises(ProtocolError):
        messages.answer_from_json(data)


@pytest.mark.parametrize("message", ANSWERS)
def test_answers_come_over(message: messages.Answer) -> None:
    data = messages.to_json(message)
    assert messages.answer_from_json(data) == message
    with pytest.raises(ProtocolError):
        messages.request_from_json(data)


@given(st.binary(max_size=200))
def test_bytes_are_a_message_or_a_named_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.request_from_json(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(REQUESTS), st.data())
def test_a_field_that_is_anything_is_taken_only_if_it_may_be(
    message: messages.Request, data: st.DataObject
) -> None:
    document = json.loads(messages.to_json(message))
    name = data.draw(st.sampled_from(sorted(document)))
    document[name] = data.draw(json_values)
    try:
        taken = messages.request_from_json(json.dumps(document).encode())
    except ProtocolError:
        return
    assert json.loads(messages.to_json(taken)) == document


def test_numbers_and_entries_come_over() -> None:
    book = PoolBook(budget_bytes=GIB, began_s=7.0)
    image = Image(key="k", nbytes=1, kind=ImageKind.FILE, label="m", reload_cost_s=1.0)
    book.open(1, image, free_bytes=None, now_s=1.0)
    numbers = messages.answer_from_json(messages.to_json(messages.numbers_of(book.stats())))
    assert isinstance(numbers, messages.Numbers)
    assert messages.stats_of(numbers) == book.stats()
    page = messages.answer_from_json(messages.to_json(messages.page_of(book.entries())))
    assert isinstance(page, messages.Entries)
    assert messages.entries_of(page) == list(book.entries())
    for broken in ({}, {"bytes": 3}, {**numbers.status, "extra": 1}):
        with pytest.raises(ProtocolError):
            messages.stats_of(messages.Numbers(status=broken))
    with pytest.raises(ProtocolError):
        messages.entries_of(messages.Entries(entries=[{"kind": "file"}, 3], more=False))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, ALIGNMENT_BYTES, 3 * ALIGNMENT_BYTES + 5])
def nbytes(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def memory(nbytes: int) -> Iterator[int]:
    fd = pool_memory.create(nbytes)
    yield fd
    os.close(fd)


def test_parts_do_not_overlap(nbytes: int) -> None:
    assert nbytes <= data_end(nbytes) < meta_begin(nbytes) == total_bytes(nbytes)
    assert data_end(nbytes) % ALIGNMENT_BYTES == 0


def test_new_memory_is_empty_and_takes_one_page(memory: int, nbytes: int) -> None:
    assert os.pread(memory, nbytes, 0) == bytes(nbytes)
    fresh = pool_memory.create(nbytes)
    assert pool_memory.allocated_bytes(fresh) <= ALIGNMENT_BYTES
    os.close(fresh)


@pytest.mark.parametrize("meta", [b"", b"table", b"x" * 100_000])
def test_sealed_memory_is_without_a_flaw_and_has_its_meta(memory: int, nbytes: int, meta: bytes) -> None:
    os.pwrite(memory, b"w" * nbytes, 0)
    assert pool_memory.flaw(memory, nbytes, len(meta)) == "it is not sealed (seals 0x2, wanted 0xf)"
    pool_memory.seal(memory, nbytes, meta)
    assert pool_memory.flaw(memory, nbytes, len(meta)) is None
    assert pool_memory.read_meta(memory, nbytes) == meta
    assert os.pread(memory, nbytes, 0) == b"w" * nbytes
    assert "bytes, " in str(pool_memory.flaw(memory, nbytes, len(meta) + 1))
    pool_memory.mark_abandoned(memory, nbytes)
    assert pool_memory.flaw(memory, nbytes, len(meta)) is None, "what is sealed cannot be marked either"


def test_a_trailer_that_does_not_say_so_is_a_flaw(memory: int, nbytes: int) -> None:
    os.pwrite(memory, bytes(64), data_end(nbytes))
    os.ftruncate(memory, total_bytes(nbytes))
    import fcntl

    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, pool_memory.SEALS)
    assert pool_memory.flaw(memory, nbytes, 0) == "its trailer does not say that it is whole"


def test_too_much_meta_is_refused(memory: int, nbytes: int) -> None:
    with pytest.raises(PoolError, match="bytes of meta, at most"):
        pool_memory.seal(memory, nbytes, bytes(META_BYTES_MAX + 1))


def test_a_reading_descriptor_reads_and_no_more(memory: int, nbytes: int) -> None:
    fd = pool_memory.reading(memory)
    try:
        assert not os.get_inheritable(fd)
        assert os.pread(fd, 1, 0) == b"\0"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


# ---- watermark -------------------------------------------------------------------------------------------------------


def test_a_watermark_rises_and_is_seen(memory: int, nbytes: int) -> None:
    with Watermark(memory, nbytes, writable=True) as mark, Watermark(memory, nbytes) as seen:
        assert seen.ready_bytes == 0
        mark.advance(1)
        assert seen.ready_bytes == 1
        mark.advance(nbytes)
        assert seen.wait(nbytes, timeout_s=0)
        for wrong in (0, nbytes + 1):
            with pytest.raises(AssertionError):
                mark.advance(wrong)
    mark.close()


def test_waiting_ends_when_it_is_reached_and_when_time_is_over(memory: int, nbytes: int) -> None:
    with Watermark(memory, nbytes, writable=True) as mark, Watermark(memory, nbytes) as seen:
        began_s = monotonic_s()
        assert not seen.wait(nbytes, timeout_s=0.05)
        assert 0.05 <= monotonic_s() - began_s < 5
        timer = threading.Timer(0.05, lambda: mark.advance(nbytes))
        timer.start()
        assert seen.wait(nbytes, timeout_s=10)
        timer.join()


def test_progress_begins_the_time_anew() -> None:
    size = 40
    fd = pool_memory.create(size)
    stop = threading.Event()
    with Watermark(fd, size, writable=True) as mark, Watermark(fd, size) as seen:

        def fill() -> None:
            for ready in range(1, size + 1):
                stop.wait(0.02)
                mark.advance(ready)

        filler = threading.Thread(target=fill)
        filler.start()
        assert seen.wait(size, timeout_s=0.5), "0.8 s in all, and never 0.5 s without progress"
        filler.join(10)
    os.close(fd)


def test_who_is_abandoned_does_not_wait(memory: int, nbytes: int) -> None:
    with Watermark(memory, nbytes) as seen:
        assert not seen.abandoned
        pool_memory.mark_abandoned(memory, nbytes)
        assert seen.abandoned
        began_s = monotonic_s()
        assert not seen.wait(nbytes, timeout_s=60)
        assert monotonic_s() - began_s < 5


def test_a_watermark_of_other_memory_is_refused(memory: int, nbytes: int) -> None:
    with pytest.raises(PoolError, match=f"no pool entry of {nbytes + 1} bytes"):
        Watermark(memory, nbytes + 1)


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(folder: Path, cgroup: str = "", files: dict[str, str] | None = None) -> HostMemory:
    """A /proc and a /sys/fs/cgroup of a machine with 64 GiB, 40 of them available."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    meminfo = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1024 kB\nMemAvailable: {40 * GIB // 1024} kB\n"
    (proc / "meminfo").write_text(meminfo)
    if cgroup:
        (proc / "self" / "cgroup").write_text(cgroup)
    cgroups.mkdir()
    for name, text in (files or {}).items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    return read_host_memory(proc=proc, cgroups=cgroups)


def group(path: str, limit: str, used: int, cache: int, *, v1: bool = False) -> dict[str, str]:
    if v1:
        return {
            f"{path}/memory.limit_in_bytes": limit,
            f"{path}/memory.usage_in_bytes": str(used),
            f"{path}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
        }
    return {
        f"{path}/memory.max": f"{limit}\n",
        f"{path}/memory.current": str(used),
        f"{path}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def test_without_a_cgroup_the_machine_counts(tmp_path: Path) -> None:
    found = machine(tmp_path)
    assert found == HostMemory(total_bytes=64 * GIB, available_bytes=40 * GIB)
    assert found.auto_budget_bytes == 16 * GIB
    assert found.spendable_bytes == 40 * GIB - int(6.4 * GIB)


@pytest.mark.parametrize(
    ("cgroup", "files", "total", "available"),
    [
        ("0::/a/b\n", group("a/b", str(8 * GIB), 3 * GIB, 1 * GIB), 8, 6),
        ("0::/a/b\n", group("a/b", "max", 3 * GIB, 0) | group("a", str(16 * GIB), 4 * GIB, 0), 16, 12),
        ("0::/a\n", group("a", "max", 3 * GIB, 0), 64, 40),
        ("0::/host/path\n", group(".", str(8 * GIB), 3 * GIB, 0), 8, 5),
        ("0::/\n", {}, 64, 40),
        ("4:memory:/a\n0::/\n", group("memory/a", str(8 * GIB), 7 * GIB, 2 * GIB, v1=True), 8, 3),
        ("4:memory:/a\n", group("memory/a", "9223372036854771712", 7 * GIB, 0, v1=True), 64, 40),
        ("4:cpu,memory:/gone\n", group("memory", str(8 * GIB), 8 * GIB, 0, v1=True), 8, 0),
        ("0::/a\n", {"a/memory.max": str(8 * GIB)}, 64, 40),
    ],
)
def test_the_narrowest_cgroup_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], total: int, available: int
) -> None:
    found = machine(tmp_path, cgroup, files)
    assert found == HostMemory(total_bytes=total * GIB, available_bytes=available * GIB)


def test_this_machine_has_memory() -> None:
    found = read_host_memory()
    assert 0 < found.available_bytes <= found.total_bytes
