"""The ledger: every count has its own place, only grows, and is the same for whoever maps it."""

from __future__ import annotations

import threading

import pytest

from ghostserve.arena.ledger import BUCKETS_S, LEDGER_BYTES, Ledger
from ghostserve.types import FailureKind, Phase, RecoveryOutcome, RecoveryPath


@pytest.fixture
def memory() -> memoryview:
    return memoryview(bytearray(LEDGER_BYTES))


def test_it_starts_at_zero(memory: memoryview) -> None:
    ledger = Ledger(memory)
    assert [ledger.failures(kind) for kind in FailureKind] == [0] * len(FailureKind)
    for phase in (None, *Phase):
        assert ledger.histogram(phase).counts == (0,) * (len(BUCKETS_S) + 1)
        assert ledger.histogram(phase).sum_s == 0.0


def test_every_count_has_its_own_place_and_is_seen_by_others(memory: memoryview) -> None:
    """Each is given another value; then all are read through a second view."""
    ledger, reader = Ledger(memory), Ledger(memory)
    places = [(path, outcome) for path in RecoveryPath for outcome in RecoveryOutcome]
    phases = (None, *Phase)
    for times, kind in enumerate(FailureKind):
        for _ in range(times + 1):
            ledger.count_failure(kind)
    for times, place in enumerate(places):
        for _ in range(times + 1):
            ledger.count_recovery(*place)
    for times, phase in enumerate(phases):
        for _ in range(times + 1):
            for bound in (*BUCKETS_S, 1e6):
                ledger.observe(phase, bound)
    assert [reader.failures(kind) for kind in FailureKind] == list(range(1, len(FailureKind) + 1))
    assert [reader.recoveries(*place) for place in places] == list(range(1, len(places) + 1))
    for times, phase in enumerate(phases):
        found = reader.histogram(phase)
        assert found.counts == (times + 1,) * (len(BUCKETS_S) + 1)
        assert found.sum_s == pytest.approx((times + 1) * (sum(BUCKETS_S) + 1e6))


@pytest.mark.parametrize(
    ("took_s", "bucket"),
    [(0.0, 0), (0.001, 0), (0.0011, 1), (0.5, 8), (0.51, 9), (120.0, 15), (120.1, 16)],
)
def test_a_bound_belongs_to_its_bucket(memory: memoryview, took_s: float, bucket: int) -> None:
    """As `le` says: less or equal."""
    ledger = Ledger(memory)
    ledger.observe(Phase.KV, took_s)
    assert ledger.histogram(Phase.KV).counts.index(1) == bucket


def test_threads_lose_no_count(memory: memoryview) -> None:
    ledger = Ledger(memory)

    def count() -> None:
        for _ in range(2000):
            ledger.count_failure(FailureKind.CRASH)
            ledger.observe(None, 0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.failures(FailureKind.CRASH) == 8000
    assert ledger.histogram(None).sum_s == 4000.0


def test_more_recoveries_than_the_state_document_keeps(memory: memoryview) -> None:
    ledger = Ledger(memory)
    for _ in range(40):
        ledger.observe(None, 0.4)
        ledger.count_recovery(RecoveryPath.REBUILD, RecoveryOutcome.RECOVERED)
    assert sum(ledger.histogram(None).counts) == 40
    assert ledger.recoveries(RecoveryPath.REBUILD, RecoveryOutcome.RECOVERED) == 40
