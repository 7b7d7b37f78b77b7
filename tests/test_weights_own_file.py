"""What a process reads for itself: what it wants and no more, in little memory, never waited for in vain.

What it promises as every other way does is in test_weights_tiers.py.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import WeightsReadError
from ghostserve.weights import arriving, blocks, own_file
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.destination import Bytes
from ghostserve.weights.model_files import WeightsFile, open_file
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.recycled import Recycler
from ghostserve.weights.source import Source
from weights_kit import write_weights

pytestmark = pytest.mark.long

TENSORS = {f"t{number}": ("U8", [size]) for number, size in enumerate((5, 1 << 20, 0, 3, 9 << 20, 4096))}


@pytest.fixture
def file(tmp_path: Path) -> WeightsFile:
    write_weights(tmp_path / "model.safetensors", TENSORS)
    return open_file(tmp_path / "model.safetensors")


def spans_of(file: WeightsFile, names: str | list[str]) -> list[tuple[int, int]]:
    return [(span.begin, span.end) for span in file.header.tensors if span.name[1:] in names]


def arrive(file: WeightsFile, names: str | list[str], **more: object) -> OwnFile:
    return OwnFile(
        file,
        spans_of(file, names),
        **{"recycler": Recycler(), "direct": None, "verify": None, **more},  # type: ignore[arg-type]
    )


def test_only_what_is_wanted_is_read(file: WeightsFile) -> None:
    one = arrive(file, "5")
    one.wait()
    assert one.arriving.stats is not None
    assert one.arriving.stats.bytes_read < 1 << 20


# -- memory is used again ----------------------------------------------------------------------------------------------

KIB = 1 << 10
CHUNK = 16 * KIB


class Counted(Recycler):
    """Knows which memory it has given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []

    def take(self, nbytes: int) -> Bytes:
        memory = super().take(nbytes)
        self.given.append(memory.ctypes.data)
        return memory


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Blocks of 64 KiB, 128 KiB ahead, reads of 16 KiB."""

    def shrink(**more: object) -> None:
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 * KIB)
        monkeypatch.setattr(own_file, "AHEAD_BYTES", 128 * KIB)
        order = functools.partial(arriving_read, chunk_bytes=CHUNK, **more)  # type: ignore[arg-type]
        monkeypatch.setattr(arriving, "read_ranges", order)

    shrink()
    return shrink


arriving_read = arriving.read_ranges
MANY = [str(number) for number in range(200)]


@pytest.fixture
def long_file(tmp_path: Path) -> WeightsFile:
    """200 tensors, 3 MB."""
    rng = random.Random(1)
    write_weights(tmp_path / "long", {f"t{name}": ("U8", [rng.randrange(30 * KIB)]) for name in MANY})
    return open_file(tmp_path / "long")


@pytest.mark.parametrize("keep", [False, True])
def test_memory_is_used_again_when_its_tensors_are_gone(
    long_file: WeightsFile, small: Callable[..., None], keep: bool
) -> None:
    """And not before: who keeps them all has them all."""
    content, recycler, kept = long_file.path.read_bytes(), Counted(), []
    one = arrive(long_file, MANY, recycler=recycler)
    for begin, end in spans_of(long_file, MANY):
        tensor = one.get(begin, end)
        assert tensor.tobytes() == content[begin:end]
        if keep:
            kept.append((tensor, content[begin:end]))
    one.wait()
    one.close()
    assert len(recycler.given) > 40
    if keep:
        assert all(tensor.tobytes() == bytes_ for tensor, bytes_ in kept)
        assert len(set(recycler.given)) == len(recycler.given)
    else:
        assert (
            len(set(recycler.given)) <= 8
        )  # four ahead, one begun, one of which the last tensor is still held; and room


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_is_kept_stays_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 90 * KIB)), max_size=40))
    wanted = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    checked, direct = data.draw(st.booleans()), data.draw(st.sampled_from([None, True, False]))
    path = tmp_path_factory.mktemp("any") / "model"
    content = write_weights(path, {f"t{number}": ("U8", [size]) for number, size in enumerate(sizes)})
    file = open_file(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", data.draw(st.sampled_from([1, 5000, 64 * KIB])))
        patch.setattr(own_file, "AHEAD_BYTES", data.draw(st.sampled_from([1, 20 * KIB, 500 * KIB])))
        patch.setattr(arriving, "read_ranges", functools.partial(arriving_read, chunk_bytes=CHUNK))
        names, kept = [str(number) for number, want in enumerate(wanted) if want], []
        sums = Checksums(path, file.nbytes) if checked else None
        one = arrive(file, names, verify=sums, direct=direct)
        for begin, end in spans_of(file, names):
            tensor = one.get(begin, end)
            assert tensor.tobytes() == content[begin:end]
            if data.draw(st.booleans()):
                kept.append((tensor, content[begin:end]))
        one.wait()
        one.close()
    for tensor, bytes_ in kept:
        assert tensor.tobytes() == bytes_


def test_no_further_ahead_than_that_however_long_it_takes(
    long_file: WeightsFile, small: Callable[..., None]
) -> None:
    """Whoever works on a tensor for longer than a disk may take is not the disk's fault."""
    small(stall_s=0.2)
    one = arrive(long_file, MANY)
    begin, end = spans_of(long_file, MANY)[0]
    one.get(begin, end)
    sleep_s(0.8)
    assert one.arriving._ready_bytes <= end + own_file.AHEAD_BYTES + CHUNK
    content = long_file.path.read_bytes()
    for begin, end in spans_of(long_file, MANY)[1:]:
        assert one.get(begin, end).tobytes() == content[begin:end]
    one.wait()
    one.close()


def test_a_disk_that_hangs_is_noticed_while_others_wait_for_leave(
    long_file: WeightsFile, small: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(stall_s=0.2)
    hangs, real = threading.Event(), Source.read

    def read(self: Source, offset: int, into: memoryview, moved: Callable[[int], None]) -> int:
        if offset == 2 * CHUNK:
            hangs.wait(20)
        return real(self, offset, into, moved)

    monkeypatch.setattr(Source, "read", read)
    monkeypatch.setattr("ghostserve.weights.reader.LEAVE_S", 0.1)
    one = arrive(long_file, MANY)
    try:
        with pytest.raises(WeightsReadError, match=f"from byte {2 * CHUNK} on"):
            for span in spans_of(long_file, MANY):
                one.get(*span)
    finally:
        hangs.set()
        one.close()


def test_closed_while_it_waits_for_leave(long_file: WeightsFile, small: Callable[..., None]) -> None:
    before = set(threading.enumerate())
    one = arrive(long_file, MANY)
    one.get(*spans_of(long_file, MANY)[0])
    began_s = monotonic_s()
    one.close()
    assert monotonic_s() - began_s < arriving.LEAVE_S
    assert set(threading.enumerate()) <= before


def test_what_was_given_away_is_not_there_again(long_file: WeightsFile, small: Callable[..., None]) -> None:
    """Rather an error than the bytes of others."""
    one = arrive(long_file, MANY)
    first, last = spans_of(long_file, MANY)[0], spans_of(long_file, MANY)[-1]
    one.get(*last)
    with pytest.raises(AssertionError):
        one.get(*first)
    one.close()


def test_little_lies_about_unused() -> None:
    recycler = Recycler()
    for _ in range(3):
        memory = [recycler.take(200 << 20) for _ in range(4)]
        del memory
    recycler.take(1)
    assert sum(map(len, recycler._free)) <= 600 << 20


STOPPED = """
import sys, time
from pathlib import Path
from ghostserve.weights import arriving
from ghostserve.weights.model_files import open_file
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.recycled import Recycler
from ghostserve.weights.source import Source
arriving.STALL_S, arriving.LEAVE_S = 0.6, 0.0
stock = Source.read
def slow(self, *words):
    print("reading", flush=True)
    time.sleep(0.5)
    return stock(self, *words)
file = open_file(Path(sys.argv[1]))
Source.read = slow
span = file.header.tensors[0]
one = OwnFile(file, [(span.begin, span.end)], Recycler(), direct=False, verify=None)
print(len(one.get(span.begin, span.end)), flush=True)
one.close()
"""


def test_a_process_that_was_stopped_blames_no_disk(tmp_path: Path) -> None:
    """A paused container, a debugger: the time that passed meanwhile is nobody's fault."""
    write_weights(tmp_path / "model.safetensors", {"a": ("U8", [4096])})
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "model.safetensors")]
    environ = {**os.environ, "PYTHONPATH": str(Path(own_file.__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "reading\n"
            sleep_s(0.2)
            child.send_signal(signal.SIGSTOP)
            sleep_s(2.5)
            child.send_signal(signal.SIGCONT)
            assert child.stdout.readline() == "4096\n"
        finally:
            child.kill()
