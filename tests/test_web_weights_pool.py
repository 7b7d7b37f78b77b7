"""The pool's numbers in /metrics: there from the start, and nobody waits for them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ghostserve.arena.control import ControlPage
from ghostserve.web.metrics import PageCollector
from ghostserve.web.weights_pool import PoolReading, PoolWatch, after
from ghostserve.weights.pool import Lease, Pool
from ghostserve.weights.pool_types import Counts, ImageKind, PoolStats, Refusal
from ghostserve.weights.runtime_dir import RUNTIME_DIR_ENV
from real.scraping import Scrape, parse
from weights_pool_kit import Place, eventually

MIB = 1 << 20


def stats(*, hits: int = 0, refused: int = 0, began_s: float = 1.0) -> PoolStats:
    return PoolStats(
        began_s=began_s,
        budget_bytes=100,
        used_bytes=30,
        referenced_bytes=20,
        pinned_bytes=10,
        pins=1,
        clients=1,
        bytes={ImageKind.FILE: 10, ImageKind.RANK: 20},
        entries={ImageKind.FILE: 1, ImageKind.RANK: 2},
        counts={ImageKind.FILE: Counts(), ImageKind.RANK: Counts(hits=hits, misses=1)},
        refusals=dict.fromkeys(Refusal, refused),
    )


def scrape(page: ControlPage, reading: PoolReading) -> Scrape:
    registry = CollectorRegistry()
    registry.register(PageCollector(page, pool=lambda: reading))
    return parse(generate_latest(registry).decode())


def test_counts_go_on_when_a_holder_ends_and_another_starts() -> None:
    reading = after(PoolReading(), first := stats(hits=5, refused=2), None)
    assert reading.counts[ImageKind.RANK].hits == 5
    reading = after(reading, None, first)
    assert (reading.stats, reading.counts[ImageKind.RANK].hits) == (None, 5)
    reading = after(reading, second := stats(hits=2, began_s=9.0), first)
    assert (reading.counts[ImageKind.RANK].hits, reading.refusals[Refusal.MEMORY]) == (7, 2)
    reading = after(reading, stats(hits=3, began_s=9.0), second)
    assert reading.counts[ImageKind.RANK].hits == 8
    assert reading.counts[ImageKind.RANK].misses == 2


def test_metrics_with_and_without_a_holder(page: ControlPage) -> None:
    without, with_one = scrape(page, PoolReading()), scrape(page, after(PoolReading(), stats(hits=5), None))
    assert (without.get("weights_pool_up"), with_one.get("weights_pool_up")) == (0, 1)
    for name, labels, value in (
        ("bytes", {"kind": "rank"}, 20),
        ("bytes", {"kind": "file"}, 10),
        ("entries", {"kind": "rank"}, 2),
        ("budget_bytes", {}, 100),
        ("referenced_bytes", {}, 20),
        ("pinned_bytes", {}, 10),
        ("hits_total", {"kind": "rank"}, 5),
        ("misses_total", {"kind": "rank"}, 1),
        ("evictions_total", {"kind": "rank"}, 0),
        ("refusals_total", {"reason": "too_large"}, 0),
    ):
        assert with_one.get(f"weights_pool_{name}", **labels) == value, name
        assert without.get(f"weights_pool_{name}", **labels) == 0, name


def test_a_real_holder_is_watched_while_it_comes_goes_and_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "run")
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(place.directory))
    watch = PoolWatch(period_s=0.01)

    def misses() -> int:
        return watch.reading.counts[ImageKind.RANK].misses

    try:
        assert watch.reading.stats is None
        pool = place.pool()
        lease = pool.open("k", MIB, kind="rank", label="m", reload_cost_s=1.0)
        assert isinstance(lease, Lease)
        eventually(lambda: watch.reading.stats and watch.reading.stats.bytes[ImageKind.RANK] > MIB)
        with place.stopped():
            eventually(lambda: watch.reading.stats is None)
            assert misses() == 1
        eventually(lambda: watch.reading.stats is not None)
        lease.close()
        place.kill()
        eventually(lambda: watch.reading.stats is None)
        with place.pool().open("k", MIB, kind="rank", label="m", reload_cost_s=1.0):  # type: ignore[union-attr]
            eventually(lambda: misses() == 2)
    finally:
        watch.close()
        place.close()


def test_a_watch_ends_when_it_is_told_and_when_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    asked = threading.Event()

    def ask() -> PoolStats | None:
        asked.set()
        return None

    watch = PoolWatch(ask, period_s=600)
    assert asked.wait(10)
    watch.close()
    watch._thread.join(10)
    assert not watch._thread.is_alive()

    def fail() -> PoolStats | None:
        raise RuntimeError("broken")

    failed = PoolWatch(fail)
    failed._thread.join(10)
    assert not failed._thread.is_alive()
    assert "not watched any more" in caplog.text
    assert failed.reading == PoolReading()


def test_a_pool_of_a_directory_that_is_gone_is_no_pool(tmp_path: Path) -> None:
    assert Pool.connect(start=False, directory=tmp_path / "gone") is None
