"""One file and several processes: read once, right for all, whoever dies or hangs on the way.

What leader, follower and hit promise as every other way does is in test_weights_tiers.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ghostserve.errors import WeightsChangedError
from ghostserve.weights import arriving, pooled_file, reader
from ghostserve.weights.model_files import WeightsFile, open_file
from ghostserve.weights.pool import Follow, Hit, Lease
from ghostserve.weights.pool_types import EntryState, ImageKind
from ghostserve.weights.pooled_file import PooledFile, file_key
from ghostserve.weights.source import Source
from weights_kit import write_weights
from weights_pool_kit import SOURCE, Place, eventually

TENSORS = {"a": ("U8", [5 << 20]), "b": ("F32", [7]), "c": ("U8", [3 << 20])}

FIRST = """
import sys, time
from pathlib import Path
from ghostserve.weights import arriving
from ghostserve.weights.model_files import open_file
from ghostserve.weights.pool import Pool
from ghostserve.weights.pooled_file import PooledFile
stock = arriving.read_ranges
def half(path, ranges, into, *, on_ready, **more):  # reads all, says half of it, and goes no further
    def tell(ready):
        on_ready(min(ready, 4 << 20))
    stock(path, ranges, into, on_ready=tell, **more)
    print("half", flush=True)
    time.sleep(60)
arriving.read_ranges = half
file = open_file(Path(sys.argv[1]))
pool = Pool.connect(start=False, directory=Path(sys.argv[2]))
PooledFile(pool, file, [], label="model", verify=None).wait()
"""


@pytest.fixture
def file(tmp_path: Path) -> WeightsFile:
    write_weights(tmp_path / "model.safetensors", TENSORS)
    return open_file(tmp_path / "model.safetensors")


def spans_of(file: WeightsFile) -> list[tuple[int, int]]:
    return [(one.begin, one.end) for one in file.header.tensors]


def opened(place: Place, file: WeightsFile) -> PooledFile:
    return PooledFile(place.pool(), file, spans_of(file), label="model", verify=None)


def demand_all(pooled: PooledFile, file: WeightsFile) -> None:
    content = file.path.read_bytes()
    for begin, end in spans_of(file):
        assert pooled.get(begin, end).tobytes() == content[begin:end]


def test_read_once_then_there(place: Place, file: WeightsFile) -> None:
    first, second = opened(place, file), opened(place, file)
    assert isinstance(first._held, Lease)
    assert isinstance(second._held, Follow)
    demand_all(second, file)
    demand_all(first, file)
    for one in (first, second):
        one.wait()
    third = opened(place, file)
    assert isinstance(third._held, Hit)
    demand_all(third, file)
    third.wait()
    for one in (first, second, third):
        one.close()
    assert [entry.references for entry in place.pool().list()] == [0]


def test_a_rank_that_is_late_finds_what_the_first_has_read(place: Place, file: WeightsFile) -> None:
    """The first is through with everything, its own image published, before the second asks: still one read of the disk."""
    pool = place.pool()
    for number in range(2):
        rank = pool.open(f"rank-{number}", 4096, kind="rank", label="model", reload_cost_s=1.0)
        assert isinstance(rank, Lease)
        pooled = PooledFile(pool, file, spans_of(file), label="model", verify=None, readers=2)
        assert isinstance(pooled._held, Hit if number else Lease)
        demand_all(pooled, file)
        pooled.wait()
        pooled.close()
        published = rank.publish()
        assert isinstance(published, Hit)
        published.close()
    eventually(lambda: [entry.label for entry in pool.list() if entry.kind is ImageKind.FILE] == [])


def test_who_changes_a_tensor_changes_his_own(place: Place, file: WeightsFile) -> None:
    first = opened(place, file)
    begin, end = spans_of(file)[0]
    first.get(begin, end)[:] = 0
    first.wait()
    second = opened(place, file)
    demand_all(second, file)
    for one in (first, second):
        one.close()


@pytest.fixture
def stuck(place: Place, file: WeightsFile) -> Iterator[subprocess.Popen[str]]:
    """A process that reads the file and gets no further than half of it."""
    place.pool()
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST, str(file.path), str(place.directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "half\n"
        yield process
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_the_reader_is_killed(place: Place, file: WeightsFile, stuck: subprocess.Popen[str]) -> None:
    """Its follower reads in its place, for itself and for others, into new memory."""
    follower = opened(place, file)
    assert isinstance(follower._held, Follow)
    begin = spans_of(file)[0][0]
    assert follower.get(begin, begin + 4096).tobytes() == file.path.read_bytes()[begin : begin + 4096]
    stuck.kill()
    stuck.wait(10)
    demand_all(follower, file)
    assert isinstance(follower._held, Lease)
    follower.wait()
    assert isinstance(follower._held, Hit)
    follower.close()
    eventually(lambda: [entry.references for entry in place.pool().list()] == [0])


def test_the_reader_stands_still(
    place: Place, file: WeightsFile, stuck: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled_file, "STALL_S", 0.1)
    monkeypatch.setattr(pooled_file, "SUCCESSION_S", 0.1)
    stuck.send_signal(signal.SIGSTOP)
    follower = opened(place, file)
    demand_all(follower, file)
    assert follower._held is None, "read alone"
    follower.wait()
    follower.close()


def test_the_holder_is_killed_meanwhile(place: Place, file: WeightsFile) -> None:
    first, second = opened(place, file), opened(place, file)
    place.kill()
    for one in (first, second):
        demand_all(one, file)
        one.wait()
        one.close()


def test_a_file_that_changed_while_others_read_it(place: Place, file: WeightsFile) -> None:
    """Who read it may not live to say so: each looks by itself."""
    first = opened(place, file)
    first.wait()
    second = opened(place, file)
    demand_all(second, file)
    os.utime(file.path, ns=(0, 0))
    with pytest.raises(WeightsChangedError):
        second.wait()
    for one in (first, second):
        one.close()


def test_other_bytes_have_another_key(file: WeightsFile) -> None:
    key = file_key(file)
    os.utime(file.path, ns=(0, 0))
    assert file_key(open_file(file.path)) != key


def test_a_late_thread_writes_into_no_other_file(
    place: Place, file: WeightsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that hangs outlives its load; its descriptor's number may belong to another file by then."""
    hangs, answers = threading.Event(), threading.Event()
    stock = Source.read

    def late(self: Source, offset: int, into: memoryview, moved: Callable[[int], None]) -> int:
        hangs.set()
        assert answers.wait(30)
        return stock(self, offset, into, moved)

    monkeypatch.setattr(Source, "read", late)
    for module in (arriving, reader):
        monkeypatch.setattr(module, "LEAVE_S", 0.05)
    before = set(threading.enumerate())
    pooled = opened(place, file)
    assert isinstance(pooled._held, Lease)
    number = pooled._held.fd
    assert hangs.wait(30)
    pooled.close()
    other = tmp_path / "other"
    other.write_bytes(b"somebody else's")
    taken = [os.open(other, os.O_RDWR)]
    try:
        while taken[-1] < number:
            taken.append(os.dup(taken[0]))
        assert os.path.samestat(os.fstat(number), other.stat())  # the number is used again
        answers.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(30)
        assert other.read_bytes() == b"somebody else's"
    finally:
        answers.set()
        for fd in taken:
            os.close(fd)


@pytest.mark.parametrize("reader", ["publishes", "ends"])
def test_who_wants_it_kept_waits_for_the_readers_last_word(
    place: Place, file: WeightsFile, reader: str
) -> None:
    first, second = opened(place, file), opened(place, file)
    demand_all(second, file)
    second.wait()
    assert isinstance(second._held, Follow)  # all bytes are there, and nothing is published
    last = threading.Timer(0.1, first.wait if reader == "publishes" else first.close)
    last.start()
    try:
        second.settle()
    finally:
        last.join()
    assert isinstance(second._held, Hit)
    assert [entry.state for entry in place.pool().list()] == [EntryState.PUBLISHED]
    first.close()
    second.close()
