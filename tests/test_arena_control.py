"""The control page: what one process writes another reads, whole, without waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ghostserve.arena.control import (
    CONTROL_BYTES,
    LANE_ENGINE,
    LANE_FRONT,
    LANE_KEEPER,
    RANKS_MAX,
    STATE_MAX_BYTES,
    VERSION,
    ControlPage,
    Counter,
    Fault,
    FaultAction,
    FaultPoint,
    Mark,
    Stamp,
    StampStatus,
    Switch,
)
from ghostserve.arena.memfd import Segment
from ghostserve.arena.records import SharedRecord
from ghostserve.clock import monotonic_s
from ghostserve.errors import BudgetExceeded, ProtocolError, UsageError
from ghostserve.types import FailureKind, Phase


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create("test", CONTROL_BYTES)
    ControlPage.format(made)
    yield made
    made.close()


def test_only_a_formatted_page_of_this_version_is_taken(segment: Segment) -> None:
    ControlPage(segment)
    segment.array.view(np.uint64)[1] += 1
    with pytest.raises(ProtocolError, match=f"version {VERSION + 1}; {VERSION} expected"):
        ControlPage(segment)
    for size in (CONTROL_BYTES, 4096):
        blank = Segment.create("test", size)
        with pytest.raises(ProtocolError):
            ControlPage(blank)
        blank.close()


def test_single_values(segment: Segment) -> None:
    writer, reader = ControlPage(segment), ControlPage(segment)
    assert (reader.epoch, reader.keeper_pid, reader.keeper_given_up) == (0, None, False)
    writer.epoch, writer.keeper_pid, writer.keeper_given_up = 2**64 - 1, 1234, True
    assert (reader.epoch, reader.keeper_pid, reader.keeper_given_up) == (2**64 - 1, 1234, True)
    writer.keeper_pid = None
    assert reader.keeper_pid is None
    assert reader.last_step_s is None
    writer.last_step_s = 123456.789012345
    assert reader.last_step_s == pytest.approx(123456.789012345, abs=1e-6)


def test_every_item_has_its_own_place(segment: Segment) -> None:
    """Writing any one item changes no other: everything is written once, then everything is read."""
    page = ControlPage(segment, lane=LANE_ENGINE)
    page.epoch = 77
    for index, counter in enumerate(Counter):
        page.set(counter, index + 1)
    for switch in Switch:
        page.set_switch(switch, switch % 2 == 0)
    for rank in range(RANKS_MAX):
        page.stamp(rank, epoch=rank, step=rank * 2, status=StampStatus.STAGED, now_s=rank * 0.5)
        for mark in Mark:
            page.mark(rank, mark, 1.0 + rank + mark / 16)
    for rank in range(8):
        page.arm_fault(Fault(point=FaultPoint.STAGED, rank=rank, action=FaultAction.HANG, skip=rank))
    for phase in (None, *Phase):
        page.ledger.observe(phase, 0.3)
    for kind in FailureKind:
        page.ledger.count_failure(kind)
    doc = {"text": "x" * (STATE_MAX_BYTES - 64)}
    page.write_state(doc)
    page.write_state(doc)
    reader = ControlPage(segment)
    assert reader.epoch == 77
    assert reader.counters() == {counter.name.lower(): i + 1 for i, counter in enumerate(Counter)}
    assert [reader.get_switch(switch) for switch in Switch] == [switch % 2 == 0 for switch in Switch]
    for rank in range(RANKS_MAX):
        assert reader.read_stamp(rank) == Stamp(
            epoch=rank, step=rank * 2, status=StampStatus.STAGED, at_s=rank * 0.5
        )
        assert reader.marks(rank) == {mark: 1.0 + rank + mark / 16 for mark in Mark}
    assert [fault.skip for fault in reader.armed_faults()] == list(range(8))
    assert reader.read_state() == doc
    assert [reader.ledger.histogram(phase).sum_s for phase in (None, *Phase)] == [0.3] * (1 + len(Phase))
    assert [reader.ledger.failures(kind) for kind in FailureKind] == [1] * len(FailureKind)
    page.clear_progress(RANKS_MAX - 1)
    assert reader.ledger.failures(FailureKind.CRASH) == 1, "the last rank's progress is before it"
    page.clear_marks(5)
    assert reader.marks(5) == {}
    assert len(reader.marks(4)) == len(reader.marks(6)) == len(Mark)


def test_counters_add_up_over_processes(segment: Segment) -> None:
    pages = [
        ControlPage(segment, lane=lane) for lane in (0, RANKS_MAX - 1, LANE_FRONT, LANE_ENGINE, LANE_KEEPER)
    ]
    for page in pages:
        page.add(Counter.SHADOW_ERRORS_TOTAL)
        page.add(Counter.SHADOW_ERRORS_TOTAL, 10)
    assert pages[0].get(Counter.SHADOW_ERRORS_TOTAL) == 55
    pages[3].set(Counter.FRAMES_USED, 5)
    pages[3].add(Counter.FRAMES_USED, -2)
    assert ControlPage(segment).get(Counter.FRAMES_USED) == 3
    assert ControlPage(segment).counters()["frames_used"] == 3


def test_counting_needs_a_lane(segment: Segment) -> None:
    with pytest.raises(UsageError, match="without a lane"):
        ControlPage(segment).add(Counter.STEPS_TOTAL)
    with pytest.raises(UsageError, match="lane 67"):
        ControlPage(segment, lane=LANE_KEEPER + 1)


# -- records that are never torn -----------------------------------------------------------------------


def test_no_record_yet(segment: Segment) -> None:
    page = ControlPage(segment)
    assert page.read_state() is None
    assert page.read_stamp(3) == Stamp(epoch=0, step=0, status=StampStatus.NONE, at_s=0.0)


def test_a_document_too_long_leaves_the_last_one(segment: Segment) -> None:
    page = ControlPage(segment)
    page.write_state({"n": 1})
    with pytest.raises(BudgetExceeded):
        page.write_state({"text": "x" * STATE_MAX_BYTES})
    assert page.read_state() == {"n": 1}


def test_torn_at_any_byte_a_stamp_is_the_old_or_the_new(segment: Segment) -> None:
    """Also when the bytes reach memory in another order, and when a writer dies for good."""
    page = ControlPage(segment)
    old = Stamp(epoch=1, step=7, status=StampStatus.DONE, at_s=1.5)
    new = Stamp(epoch=2, step=8, status=StampStatus.BEGUN, at_s=2.5)
    seen = set()
    for warm_up in range(1, 4):  # so that either copy is the older one
        for _ in range(warm_up):
            page.stamp(0, epoch=1, step=7, status=StampStatus.DONE, now_s=1.5)
        before = segment.array.copy()
        page.stamp(0, epoch=2, step=8, status=StampStatus.BEGUN, now_s=2.5)
        after = segment.array.copy()
        changed = np.flatnonzero(before != after)
        for order in (changed, changed[::-1]):
            for stored in range(len(order) + 1):
                segment.array[:] = before
                segment.array[order[:stored]] = after[order[:stored]]
                seen.add(ControlPage(segment).read_stamp(0))
                # A replacement's stamp is seen whatever its predecessor left.
                if stored % 5 == 0:
                    ControlPage(segment).stamp(0, epoch=3, step=8, status=StampStatus.BEGUN, now_s=3.0)
                    assert page.read_stamp(0).epoch == 3
        segment.array[:] = before
    assert seen == {old, new}


def test_without_the_checksum_a_torn_record_would_be_seen() -> None:
    """The negative control of the test above: a mixed payload does lie in memory."""
    memory = np.zeros(SharedRecord.required_bytes(64), dtype=np.uint8)
    record = SharedRecord(memory.data, payload_max_bytes=64)
    for payload in (b"a" * 64, b"b" * 64):
        record.write(payload)
    before = memory.copy()
    record.write(b"c" * 64)
    torn = np.flatnonzero(before != memory)[-32:]
    memory[torn] = before[torn]
    assert b"ccca" in memory.tobytes()
    assert record.read() == b"b" * 64


WRITER = """
import sys
from ghostserve.arena.control import ControlPage, StampStatus
from ghostserve.arena.memfd import Segment
from ghostserve.clock import monotonic_s
page = ControlPage(Segment.attach(int(sys.argv[1])))
until_s, n = monotonic_s() + 1.0, 0
while monotonic_s() < until_s:
    n += 1
    page.write_state({"n": n, "list": [n] * (n % 3000)})
    page.stamp(0, epoch=n, step=2 * n, status=StampStatus.DONE, now_s=float(n))
"""


def test_a_reader_beside_a_busy_writer(segment: Segment) -> None:
    page = ControlPage(segment)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(segment.fd)], pass_fds=[segment.fd])
    try:
        last = last_stamp = reads = 0
        deadline_s = monotonic_s() + 60
        while writer.poll() is None and monotonic_s() < deadline_s:
            doc, stamp = page.read_state(), page.read_stamp(0)
            if doc is not None:
                assert doc["list"] == [doc["n"]] * (doc["n"] % 3000)
                assert doc["n"] >= last, "went back to an older document"
                last, reads = doc["n"], reads + 1
            assert stamp.step == 2 * stamp.epoch == 2 * stamp.at_s
            assert stamp.epoch >= last_stamp, "went back to an older stamp"
            last_stamp = stamp.epoch
        assert writer.wait(10) == 0
        assert reads > 10
        assert last > 10
    finally:
        writer.kill()
        writer.wait(10)


# -- faults --------------------------------------------------------------------------------------------


def test_a_fault_strikes_once_at_its_place(segment: Segment) -> None:
    front, rank = ControlPage(segment), ControlPage(segment)
    assert rank.take_fault(FaultPoint.STAGED, 1) is None
    front.arm_fault(Fault(point=FaultPoint.STAGED, rank=1, action=FaultAction.KILL))
    assert rank.take_fault(FaultPoint.STAGED, 0) is None
    assert rank.take_fault(FaultPoint.BEFORE_MODEL, 1) is None
    taken = rank.take_fault(FaultPoint.STAGED, 1)
    assert taken is not None
    assert taken.action is FaultAction.KILL
    assert rank.take_fault(FaultPoint.STAGED, 1) is None
    assert front.armed_faults() == []


def test_a_fault_can_wait_for_its_turn(segment: Segment) -> None:
    page = ControlPage(segment)
    page.arm_fault(Fault(point=FaultPoint.AFTER_MODEL, rank=0, action=FaultAction.RAISE, skip=2))
    taken = [page.take_fault(FaultPoint.AFTER_MODEL, 0) for _ in range(5)]
    assert [fault is not None for fault in taken] == [False, False, True, False, False]


def test_several_faults_and_no_more_than_fit(segment: Segment) -> None:
    page = ControlPage(segment)
    for index in range(8):
        assert page.arm_fault(Fault(point=FaultPoint.STAGED, rank=index, action=FaultAction.HANG)) == index
    with pytest.raises(BudgetExceeded, match="8 faults"):
        page.arm_fault(Fault(point=FaultPoint.STAGED, rank=0, action=FaultAction.HANG))
    assert page.take_fault(FaultPoint.STAGED, 3) is not None
    assert page.arm_fault(Fault(point=FaultPoint.BEFORE_REPLY, rank=0, action=FaultAction.KILL)) == 3
    page.disarm_faults()
    assert page.armed_faults() == []
    assert page.take_fault(FaultPoint.STAGED, 0) is None


def test_a_fault_armed_later_is_seen_by_who_saw_none(segment: Segment) -> None:
    """The quick way out ("nothing is armed") must not outlive the next arming."""
    front, rank = ControlPage(segment), ControlPage(segment)
    for _ in range(3):
        assert rank.take_fault(FaultPoint.STAGED, 0) is None
        front.arm_fault(Fault(point=FaultPoint.STAGED, rank=0, action=FaultAction.RAISE))
        assert rank.take_fault(FaultPoint.STAGED, 0) is not None
        assert rank.take_fault(FaultPoint.STAGED, 0) is None


def test_every_fault_survives_the_page(segment: Segment) -> None:
    page = ControlPage(segment)
    for point in FaultPoint:
        for action in FaultAction:
            fault = Fault(point=point, rank=63, action=action, skip=1, argument=9, count=4)
            page.arm_fault(fault)
            assert page.armed_faults() == [fault]
            page.disarm_faults()


@pytest.mark.parametrize("name", ["rank", "skip", "argument", "count"])
def test_a_negative_number_is_named(segment: Segment, name: str) -> None:
    fault = Fault(point=FaultPoint.STAGED, rank=0, action=FaultAction.KILL)
    with pytest.raises(UsageError, match=f"{name} -1"):
        ControlPage(segment).arm_fault(replace(fault, **{name: -1}))


@pytest.mark.parametrize(("count", "struck"), [(1, 1), (3, 3), (0, 5)])
def test_a_fault_strikes_as_often_as_told(segment: Segment, count: int, struck: int) -> None:
    """And each strike is counted, by a process that counts."""
    page = ControlPage(segment, lane=0)
    page.arm_fault(Fault(point=FaultPoint.STAGED, rank=0, action=FaultAction.SLOW, argument=7, count=count))
    taken = [page.take_fault(FaultPoint.STAGED, 0) for _ in range(5)]
    assert [fault.argument for fault in taken if fault is not None] == [7] * struck
    assert bool(page.armed_faults()) is (count == 0)
    assert page.get(Counter.FAULTS_STRUCK_TOTAL) == struck


def test_the_page_is_shared(segment: Segment) -> None:
    other = Segment.attach(os.dup(segment.fd))
    ControlPage(segment).set_switch(Switch.SKIP_RESTORE, True)
    assert ControlPage(other).get_switch(Switch.SKIP_RESTORE)
    other.close()
