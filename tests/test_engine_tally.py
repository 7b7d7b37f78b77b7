"""What is counted of losses and recoveries, without a group of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.engine.oom import LATELY_S, OomKills
from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent
from ghostserve.engine.tally import Tally
from ghostserve.recovery.report import RecoveryReport
from ghostserve.types import FailureKind, Phase, RecoveryOutcome, RecoveryPath


def report(*, ok: bool = True, path: RecoveryPath = RecoveryPath.REBUILD) -> RecoveryReport:
    phases_ms = {**dict.fromkeys(Phase, 0.0), Phase.FENCE: 2.0, Phase.KV: 300.0}
    return RecoveryReport(
        epoch=1, lost_ranks=(1,), lost_pids=(11,), path=path, ok=ok, reason="", noticed_at_s=0.0,
        phases_ms=phases_ms, total_ms=302.0, kv_blocks_from_parity=0, kv_blocks_from_mirrors=0, kv_bytes_rebuilt=0,
        kv_blocks_forgotten=0, tokens_recomputed=0, requests_recomputed=0, requests_recomputed_by_choice=0,
    )  # fmt: skip


@pytest.fixture
def executor() -> Iterator[Any]:
    segment = Segment.create("test", CONTROL_BYTES)
    ControlPage.format(segment)
    yield SimpleNamespace(
        session=SimpleNamespace(page=ControlPage(segment, lane=LANE_ENGINE)),
        workers=[SimpleNamespace(proc=SimpleNamespace(pid=10 + rank)) for rank in range(3)],
    )
    segment.close()


def failures(executor: Any) -> dict[str, int]:
    ledger = executor.session.page.ledger
    return {kind.value: count for kind in FailureKind if (count := ledger.failures(kind))}


def replace(executor: Any, rank: int, pid: int) -> None:
    executor.workers[rank].proc = SimpleNamespace(pid=pid)


def test_each_lost_process_counts_once(executor: Any) -> None:
    """A loss is told by whoever notices it: the monitor, a step, and the kill that fences a rank that hung."""
    tally = Tally(executor)
    tally.failed(RanksDied(frozenset({1}), "noticed while idle"))
    tally.failed(RanksDied(frozenset({1, 2}), "in a step"))
    assert failures(executor) == {"crash": 2}
    tally.failed(RankSilent(frozenset({0}), "no progress"))
    tally.failed(RanksDied(frozenset({0}), "it was fenced"))
    assert failures(executor) == {"crash": 2, "hang": 1}
    replace(executor, 1, 21)
    tally.failed(RanksDied(frozenset({1}), "its successor, too"))
    assert failures(executor) == {"crash": 3, "hang": 1}


def test_a_raise_is_no_loss_and_an_eviction_was_counted_before(executor: Any) -> None:
    tally = Tally(executor)
    tally.failed(RankRaised(1, "no"))
    tally.failed(RankRaised(1, "no"))
    tally.failed(RankSilent(frozenset({1}), "slow", evicted=True))
    tally.failed(RanksDied(frozenset({1}), "killed, being evicted"))
    assert failures(executor) == {"raised": 2}


def test_recoveries_and_their_phases(executor: Any) -> None:
    tally = Tally(executor)
    for path, outcome in (("rebuild", "recovered"), ("recompute", "step_failed"), ("rebuild", "given_up")):
        tally.ended(report(ok=outcome == "recovered", path=RecoveryPath(path)), RecoveryOutcome(outcome))
    ledger = executor.session.page.ledger
    counts = {
        (path.value, outcome.value): ledger.recoveries(path, outcome)
        for path in RecoveryPath
        for outcome in RecoveryOutcome
        if ledger.recoveries(path, outcome)
    }
    assert counts == {
        ("rebuild", "recovered"): 1,
        ("recompute", "step_failed"): 1,
        ("rebuild", "given_up"): 1,
    }
    assert sum(ledger.histogram(None).counts) == 3
    assert ledger.histogram(None).sum_s == pytest.approx(3 * 0.302)
    observed = {phase for phase in Phase if sum(ledger.histogram(phase).counts)}
    assert observed == {Phase.DETECT, Phase.FENCE, Phase.KV}, "the others did not run"


def test_what_cannot_be_counted_does_not_stop_a_recovery(
    executor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tally = Tally(executor)
    executor.workers = tally._page = object()
    with caplog.at_level(logging.ERROR):
        tally.failed(RanksDied(frozenset({1}), ""))
        tally.ended(report(), RecoveryOutcome.RECOVERED)
    assert [record.message for record in caplog.records] == ["a loss or a recovery was not counted"] * 2


# -- the kernel's kills for memory ---------------------------------------------------------------------


def vmstat(path: Path, kills: int) -> Path:
    path.write_text(f"nr_free_pages 1\noom_kill {kills}\nunevictable_pgs_culled 0\n")
    return path


def test_a_kill_for_memory_is_told_for_a_moment(tmp_path: Path) -> None:
    file = vmstat(tmp_path / "vmstat", 4)
    kills = OomKills(file)
    assert not kills.lately(0.0), "those of before are not ours"
    vmstat(file, 5)
    kills.look(1.0)
    assert kills.lately(1.1)
    assert kills.lately(1.0 + LATELY_S)
    assert not kills.lately(1.1 + LATELY_S), "a death much later has another cause"


@pytest.mark.parametrize("text", [None, "nr_free_pages 1\n"])
def test_a_kernel_that_does_not_tell(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "vmstat").write_text(text)
    kills = OomKills(tmp_path / "vmstat")
    vmstat(tmp_path / "vmstat", 5)
    assert not kills.lately(1.0)


def test_a_death_at_that_time_is_an_oom(executor: Any, tmp_path: Path) -> None:
    tally = Tally(executor)
    tally._oom = OomKills(vmstat(tmp_path / "vmstat", 0))
    vmstat(tmp_path / "vmstat", 1)
    tally.failed(RanksDied(frozenset({1}), "in a step"))
    tally._oom = OomKills(tmp_path / "vmstat")
    tally.failed(RanksDied(frozenset({2}), "in a step"))
    assert failures(executor) == {"oom": 1, "crash": 1}
