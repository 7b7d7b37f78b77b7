"""Our metrics over a stand-in for the page: names, labels, zeros, and counts that never go back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest, make_asgi_app

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, LANE_FRONT, LANE_KEEPER, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.arena.names import Counter
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.types import FailureKind, Phase, RecoveryOutcome, ServerState
from ghostserve.web import metrics
from ghostserve.web.metric_table import METRICS, WORKER_STATES, worker_state
from ghostserve.web.metrics import PageCollector, expose
from ghostserve.weights.pool_types import ImageKind, Refusal
from real.scraping import Scrape, parse, went_back

PROMISED = {  # name and labels, as users were told
    "ghostserve_worker_state": ("rank", "state"),
    "ghostserve_failures_total": ("kind",),
    "ghostserve_recoveries_total": ("path", "outcome"),
    "ghostserve_recovery_seconds": ("phase",),
    "ghostserve_requests_resumed_total": (),
    "ghostserve_tokens_recomputed_total": (),
    "ghostserve_shadow_lag_tokens": (),
    "ghostserve_protected_tokens": (),
    "ghostserve_unprotected_tokens": (),
    "ghostserve_parity_bytes": (),
    "ghostserve_mirror_bytes": (),
    "ghostserve_host_budget_bytes": (),
    "ghostserve_host_needed_bytes": (),
    "ghostserve_host_used_bytes": (),
    "ghostserve_encode_bytes_total": (),
    "ghostserve_scrub_mismatch_total": (),
    "ghostserve_standby_ready": (),
    "ghostserve_weights_pool_bytes": ("kind",),
    "ghostserve_weights_pool_budget_bytes": (),
    "ghostserve_weights_pool_hits_total": ("kind",),
    "ghostserve_weights_pool_misses_total": ("kind",),
    "ghostserve_weights_pool_evictions_total": ("kind",),
}
LABEL_VALUES = {
    "kind": {*(kind.value for kind in FailureKind), "nan", "inf", *(kind.value for kind in ImageKind)},
    "reason": {why.value for why in Refusal},
    "path": {"rebuild", "recompute"},
    "outcome": {outcome.value for outcome in RecoveryOutcome},
    "phase": {phase.value for phase in Phase},
    "rank": {"0", "1"},
    "state": {*WORKER_STATES, *(state.value for state in ServerState), "draining"},
}


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(outage_s=0.05)
    yield engine
    engine.close()


def scrape(page: Any) -> Scrape:
    registry = CollectorRegistry()
    registry.register(PageCollector(page))
    return parse(generate_latest(registry).decode())


def test_promised_names_and_labels() -> None:
    table = {metric.name: metric.labels for metric in METRICS}
    assert len(table) == len(METRICS)
    assert {name: table.get(name) for name in PROMISED} == PROMISED
    assert all(name.startswith("ghostserve_") for name in table)
    assert all((metric.kind == "counter") == metric.name.endswith("_total") for metric in METRICS)


def test_every_series_is_there_from_the_first_scrape_on(page: ControlPage) -> None:
    """On a page that nobody has written to yet; only ranks are not known then."""
    found = scrape(page)
    names = {metric.name.removesuffix("_total") for metric in METRICS}
    assert set(found.types) == names
    for kind in FailureKind:
        assert found.get("failures_total", kind=kind.value) == 0
    for path in ("rebuild", "recompute"):
        for outcome in RecoveryOutcome:
            assert found.get("recoveries_total", path=path, outcome=outcome.value) == 0
    for phase in Phase:
        assert found.get("recovery_seconds_count", phase=phase.value) == 0
        assert found.get("recovery_seconds_bucket", phase=phase.value, le="+Inf") == 0
    empty = {name for name in names if not any(key[0].startswith(name) for key in found.samples)}
    assert empty == {"ghostserve_worker_state"}
    assert found.get("server_state", state="starting") == 1


def test_a_server_that_drains_says_so_unless_it_recovers(engine: FakeEngine) -> None:
    registry = CollectorRegistry()
    registry.register(PageCollector(engine, draining=lambda: True))
    for state, shown in (("serving", "draining"), ("recovering", "recovering"), ("failed", "failed")):
        engine.state = state
        found = parse(generate_latest(registry).decode())
        on = {dict(labels)["state"] for (name, labels), value in found.samples.items()
              if name == "ghostserve_server_state" and value}  # fmt: skip
        assert on == {shown}
    assert scrape(engine).get("server_state", state="draining") == 0


def test_labels_are_bounded(engine: FakeEngine) -> None:
    for name, labels in scrape(engine).samples:
        if name != "ghostserve_info":
            for label, value in labels:
                assert label == "le" or value in LABEL_VALUES[label], (name, label, value)


def test_counts_never_go_back_over_a_recovery(engine: FakeEngine) -> None:
    scrapes = [scrape(engine)]
    for rank in (0, 1, 0):
        engine.workers[rank].kill()
        engine.workers[rank].wait()
        engine.step()
        scrapes.append(scrape(engine))
    assert went_back(scrapes) == []
    last = scrapes[-1]
    assert last.get("failures_total", kind="crash") == 3
    assert last.get("recoveries_total", path="rebuild", outcome="recovered") == 3
    assert last.get("outage_seconds_count") == 3
    total_s = sum(recovery["total_ms"] for recovery in engine.recoveries) / 1e3
    assert last.get("outage_seconds_sum") == pytest.approx(total_s)
    assert last.get("outage_seconds_bucket", le="+Inf") == 3
    assert last.get("outage_seconds_bucket", le="0.025") == 0
    assert went_back(scrapes[::-1]), "the check would find one"


def test_buckets_are_cumulated(page: ControlPage) -> None:
    for took_s in (0.0004, 0.3, 0.3, 500.0):
        page.ledger.observe(Phase.KV, took_s)
    found = scrape(page)
    counts = {
        le: found.get("recovery_seconds_bucket", phase="kv", le=le)
        for le in ("0.001", "0.25", "0.5", "120.0", "+Inf")
    }
    assert counts == {"0.001": 1, "0.25": 1, "0.5": 3, "120.0": 3, "+Inf": 4}
    assert found.get("recovery_seconds_count", phase="kv") == 4
    assert found.get("recovery_seconds_sum", phase="kv") == pytest.approx(500.6004)


def test_values_are_those_of_the_page(page: ControlPage) -> None:
    page.set(Counter.PROTECTED_TOKENS, 96)
    page.set(Counter.UNPROTECTED_TOKENS, 32)
    page.set(Counter.SHADOW_LAG_TOKENS, 7)
    page.set(Counter.HOST_USED_BYTES, 4096)
    page.keeper_pid, page.keeper_given_up = 77, True
    page.write_state(
        {
            "state": "recovering",
            "epoch": 3,
            "ranks": [{"rank": 0, "state": "alive", "health": "slow"}, {"rank": 1, "state": "lost"}],
            "standbys": [{"state": "ready", "memory_bytes": 10}, {"state": "starting", "memory_bytes": 5}],
            "standbys_wanted": 2,
            "shadow": {"budget_bytes": 8192, "protection": "parity", "parity_shards": 2},
            "version": "1", "vllm": "2", "torch": "3",
        }
    )  # fmt: skip
    found = scrape(page)
    assert [found.get(f"{name}_tokens") for name in ("protected", "unprotected", "shadow_lag")] == [96, 32, 7]
    assert (found.get("host_used_bytes"), found.get("host_budget_bytes")) == (4096, 8192)
    assert (found.get("keeper_up"), found.get("keeper_given_up")) == (1, 1)
    assert (found.get("standby_ready"), found.get("standby_wanted"), found.get("standby_memory_bytes")) == (
        1,
        2,
        15,
    )
    for rank, now in (("0", "slow"), ("1", "lost")):
        states = {state: found.get("worker_state", rank=rank, state=state) for state in WORKER_STATES}
        assert states == {state: float(state == now) for state in WORKER_STATES}
    assert found.get("server_state", state="recovering") == 1
    assert found.get("info", version="1", vllm="2", torch="3", protection="parity", parity_shards="2") == 1


def test_corruption_is_what_any_process_found(page: ControlPage) -> None:
    page.add(Counter.SCRUB_KV_MISMATCHES_TOTAL, 2)
    page.add(Counter.SCRUB_MIRROR_MISMATCHES_TOTAL, 3)
    page.add(Counter.SCRUB_PARITY_MISMATCHES_TOTAL, 5)
    page.add(Counter.CHECKSUM_REFUSALS_TOTAL, 7)
    found = scrape(page)
    assert found.get("scrub_mismatch_total") == 10
    assert found.get("failures_total", kind="corruption") == 17


@pytest.mark.parametrize(
    ("rank", "state"),
    [
        ({"state": "alive"}, "alive"),
        ({"state": "alive", "health": "suspect"}, "suspect"),
        ({"state": "alive", "health": "dead"}, "lost"),
        ({"state": "lost", "health": "slow"}, "lost"),
        ({"state": "starting"}, "starting"),
    ],
)
def test_one_word_for_a_rank(rank: dict[str, str], state: str) -> None:
    assert worker_state(rank) == state
    assert state in WORKER_STATES


def test_an_engine_that_says_nothing_any_more_is_seen_by_the_age_of_its_state(
    page: ControlPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.write_state({"written_at_s": 100.0})
    monkeypatch.setattr(metrics, "monotonic_s", lambda: 142.0)
    assert scrape(page).get("state_age_seconds") == 42.0


def test_what_cannot_be_read_is_left_out_and_told_once(
    page: ControlPage, caplog: pytest.LogCaptureFixture
) -> None:
    page.write_state({"ranks": [{"nonsense": 1}]})
    registry = CollectorRegistry()
    registry.register(PageCollector(page))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            found = parse(generate_latest(registry).decode())
            assert "ghostserve_worker_state" not in found.types
            assert found.get("steps_total") == 0
    assert [record.message for record in caplog.records] == ["ghostserve_worker_state cannot be read"]


def test_a_page_that_cannot_be_read_costs_vllms_metrics_nothing(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError

    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Of vLLM.", registry=registry).set(3)
    registry.register(PageCollector(engine))
    monkeypatch.setattr(engine, "read_state", fail)
    for _ in range(2):
        assert set(parse(generate_latest(registry).decode()).types) == {"vllm:num_requests_running"}
    assert [record.message for record in caplog.records] == ["the control page cannot be read"]


# -- in vLLM's endpoint --------------------------------------------------------------------------------


def test_ours_are_in_the_registry_that_vllm_exposes(page: ControlPage) -> None:
    """And a later page takes an earlier one's place, instead of having each name twice."""
    other = FakeEngine()
    try:
        expose(FastAPI(), other)
        expose(FastAPI(), page)
        page.add(Counter.STEPS_TOTAL, 5)
        text = generate_latest(REGISTRY).decode()
        assert text.count("# TYPE ghostserve_steps_total counter") == 1
        assert parse(text).get("steps_total") == 5
        only = generate_latest(REGISTRY.restricted_registry(["ghostserve_epoch"])).decode()
        assert set(parse(only).types) == {"ghostserve_epoch"}
    finally:
        other.close()
        assert metrics._exposed is not None
        REGISTRY.unregister(metrics._exposed)
        metrics._exposed = None


def test_where_vllms_metrics_go_through_files_ours_are_beside_them(
    page: ControlPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.MULTIPROCESS_ENV, str(tmp_path))
    app = FastAPI()
    app.mount(
        "/metrics", make_asgi_app(registry=CollectorRegistry())
    )  # stands for vLLM's, which knows files alone
    expose(app, page)
    answer = TestClient(app).get("/metrics", follow_redirects=False)
    assert answer.status_code == 200
    assert parse(answer.text).get("steps_total") == 0


def test_counts_of_all_processes_add_up() -> None:
    segment = Segment.create("test", CONTROL_BYTES)
    ControlPage.format(segment)
    try:
        for lane in (0, 5, LANE_FRONT, LANE_ENGINE, LANE_KEEPER):
            ControlPage(segment, lane=lane).add(Counter.CHECKSUM_REFUSALS_TOTAL)
        assert scrape(ControlPage(segment)).get("checksum_refusals_total") == 5
    finally:
        segment.close()
