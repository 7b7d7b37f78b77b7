"""The ring of records: order, overwriting, torn writers, and readers beside writers in other processes."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ghostserve.arena.event_rings import RINGS_BYTES, EventRings, Ring, Teller
from ghostserve.arena.record_ring import RecordRing, RingRead
from ghostserve.clock import monotonic_s, sleep_s, wall_s
from ghostserve.errors import BudgetExceeded
from ghostserve.events.kinds import KeeperRestarted, RankSlow, RequestAdmitted

SLOTS, SLOT_BYTES = 8, 48
fork = multiprocessing.get_context("fork")


def ring_in(memory: Any, *, slots: int = SLOTS) -> RecordRing:
    return RecordRing(memoryview(memory), slots=slots, slot_bytes=SLOT_BYTES)


@pytest.fixture
def memory() -> bytearray:
    return bytearray(RecordRing.required_bytes(slots=SLOTS, slot_bytes=SLOT_BYTES))


def test_what_is_written_is_read_once_and_in_order(memory: bytearray) -> None:
    ring = ring_in(memory)
    for text in (b"a", b"", b"ccc"):
        ring.write(text)
    place, read = ring_in(memory).read(0)
    assert (place, read) == (3, RingRead((b"a", b"", b"ccc"), 0))
    assert ring_in(memory).read(place) == (3, RingRead((), 0))
    ring.write(b"d")
    assert ring_in(memory).read(place) == (4, RingRead((b"d",), 0))


def test_what_was_overwritten_is_counted(memory: bytearray) -> None:
    ring = ring_in(memory)
    for number in range(20):
        ring.write(str(number).encode())
    place, read = ring.read(0)
    assert read.payloads == tuple(str(number).encode() for number in range(12, 20))
    assert (place, read.lost) == (20, 12)
    assert ring.read(15) == (20, RingRead((b"15", b"16", b"17", b"18", b"19"), 0))


def test_a_record_that_does_not_fit_is_refused(memory: bytearray) -> None:
    ring = ring_in(memory)
    ring.write(b"x" * ring.payload_max_bytes)
    with pytest.raises(BudgetExceeded, match="room for 32"):
        ring.write(b"x" * (ring.payload_max_bytes + 1))
    assert len(ring.read(0)[1].payloads) == 1


def test_a_damaged_record_is_lost_and_no_other(memory: bytearray) -> None:
    ring = ring_in(memory)
    for text in (b"aa", b"bb", b"cc"):
        ring.write(text)
    memory[memory.index(b"bb")] ^= 1
    assert ring.read(0) == (3, RingRead((b"aa", b"cc"), 1))


@pytest.mark.parametrize("before", [1, SLOTS])
def test_a_writer_that_dies_in_the_middle_leaves_no_record(memory: bytearray, before: int) -> None:
    """Cut off after any byte of what it stores before the head: the record was never there, the next one is whole."""
    ring = ring_in(memory)
    for number in range(before):
        ring.write(f"old {number}".encode())
    earlier = bytes(memory)
    ring.write(b"torn record")
    written = bytes(memory)
    first = 64 + (before + 1) % SLOTS * SLOT_BYTES
    for cut in range(SLOT_BYTES + 1):
        memory[:] = earlier[:first] + written[first : first + cut] + earlier[first + cut :]
        place, read = ring_in(memory).read(0)
        assert place == before
        # Where the ring is full the slot held the oldest record: lost at most.
        assert len(read.payloads) + read.lost == before
        assert read.lost <= (1 if before == SLOTS else 0)
        assert b"torn record" not in read.payloads
        ring_in(memory).write(b"next")
        assert ring_in(memory).read(place) == (before + 1, RingRead((b"next",), 0))


def in_processes(count: int, work: Callable[[int], None]) -> None:
    processes = [fork.Process(target=work, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def test_writers_in_processes_and_threads_lose_nothing() -> None:
    """A ring per process, several threads in each, and a reader that keeps up."""
    memory = mmap.mmap(-1, 1 << 20)
    view = memoryview(memory)
    rings = [
        RecordRing(view[at << 19 : (at + 1) << 19], slots=4096, slot_bytes=SLOT_BYTES) for at in range(2)
    ]

    def write(number: int) -> None:
        def some(thread: int) -> None:
            for index in range(500):
                rings[number].write(f"{thread} {index}".encode())

        threads = [threading.Thread(target=some, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    reader = threading.Thread(target=in_processes, args=(2, write))
    reader.start()
    seen: list[list[bytes]] = [[], []]
    places = [0, 0]
    while True:
        running = reader.is_alive()
        for number, ring in enumerate(rings):
            places[number], read = ring.read(places[number])
            assert read.lost == 0
            seen[number] += read.payloads
        if not running:
            break
    reader.join()
    for payloads in seen:
        assert len(payloads) == 1500
        for thread in range(3):  # in the order in which each thread wrote
            mine = [payload for payload in payloads if payload.startswith(f"{thread} ".encode())]
            assert mine == [f"{thread} {index}".encode() for index in range(500)]


def test_a_killed_writer_is_followed_by_another() -> None:
    memory = mmap.mmap(-1, 1 << 16)
    view = memoryview(memory)
    ring = RecordRing(view, slots=64, slot_bytes=SLOT_BYTES)

    def write() -> None:
        while True:
            ring.write(b"x" * 30)

    victim = fork.Process(target=write)
    victim.start()
    assert victim.pid is not None
    deadline_s = monotonic_s() + 20
    while ring.head < 1000:
        assert monotonic_s() < deadline_s
        sleep_s(0.001)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(10)
    head = ring.head
    assert head >= 1000
    ring.write(b"next")
    place, read = ring.read(head)
    assert (place, read) == (head + 1, RingRead((b"next",), 0))
    whole = ring.read(0)[1].payloads
    assert len(whole) >= 62
    assert set(whole) == {b"x" * 30, b"next"}


# -- the rings of events -------------------------------------------------------------------------------------------


def rings(memory: Any, teller: Teller | None) -> EventRings:
    return EventRings(memoryview(memory), teller=teller)


def test_events_of_all_processes_are_merged_by_time() -> None:
    memory = bytearray(RINGS_BYTES)
    front, engine = rings(memory, Teller.FRONT), rings(memory, Teller.ENGINE)
    now_s = monotonic_s()
    engine.tell(RankSlow(rank=1, reason="third"), at_monotonic_s=now_s)
    front.tell(KeeperRestarted(pid=1, restarts=1), at_monotonic_s=now_s - 1)
    engine.tell(RequestAdmitted(request="a", prompt_tokens=1, max_tokens=2), at_monotonic_s=now_s - 2)
    look = rings(memory, None).look
    news = look()
    assert [event.kind for _, event in news.events] == ["request_admitted", "keeper_restarted", "rank_slow"]
    assert news.lost == 0
    assert look().events == []


def test_the_order_is_that_of_the_monotonic_clock() -> None:
    """What is told of the past is not a microsecond off, or a cause would come after its effect."""
    memory = bytearray(RINGS_BYTES)
    engine = rings(memory, Teller.ENGINE)
    at_s = monotonic_s() - 1
    for number in range(200):
        engine.tell(RankSlow(rank=number, reason=""), at_monotonic_s=at_s)
    times = [at_s for at_s, _ in rings(memory, None).look().events]
    assert len(set(times)) == 1
    assert abs(wall_s() - 1 - times[0]) < 5


def test_a_flood_of_requests_leaves_the_other_events_alone() -> None:
    memory = bytearray(RINGS_BYTES)
    engine = rings(memory, Teller.ENGINE)
    engine.tell(RankSlow(rank=1, reason="early"))
    slots, _ = Ring.REQUESTS.value
    for number in range(slots + 10):
        engine.tell(RequestAdmitted(request=str(number), prompt_tokens=1, max_tokens=2))
    news = rings(memory, None).look()
    assert sum(event.kind == "rank_slow" for _, event in news.events) == 1
    assert (len(news.events), news.lost) == (slots + 1, 10)


def test_what_cannot_be_told_is_counted_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    memory = bytearray(RINGS_BYTES)
    engine = rings(memory, Teller.ENGINE)
    for _ in range(2):
        engine.tell(RankSlow(rank=1, reason=object()))  # type: ignore[arg-type]
    assert engine.untold == 2
    assert len(caplog.records) == 1  # said once
    engine.tell(RankSlow(rank=1, reason="x" * 5000))  # clipped
    assert engine.untold == 2
    ((_, event),) = rings(memory, None).look().events
    assert isinstance(event, RankSlow)
    assert event.reason.endswith("x…")
    assert 300 < len(event.reason) <= 400


def test_a_process_without_a_ring_tells_nobody() -> None:
    memory = bytearray(RINGS_BYTES)
    rings(memory, None).tell(RankSlow(rank=1, reason="?"))
    assert not any(memory)


def test_what_is_no_event_is_counted_as_lost() -> None:
    memory = bytearray(RINGS_BYTES)
    engine = rings(memory, Teller.ENGINE)
    for junk in (b"{", b'["no_such_kind", 1.0, {}]', b'["rank_slow", 1.0, {"rank": 1}]'):
        engine._rings[Ring.ENGINE].write(junk)
    engine.tell(RankSlow(rank=1, reason="good"))
    news = rings(memory, None).look()
    assert (len(news.events), news.lost) == (1, 3)
