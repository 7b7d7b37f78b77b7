"""What the demo prints and when it fails: every check has a run that fails only that one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ghostserve.cli.demo_report import (
    DemoRun,
    build_report,
    distinct_ratio,
    failures,
    headline,
    outage_ms,
    recovery_of,
)
from ghostserve.types import Phase

REFERENCE = tuple(range(100))
ARRIVALS_S = tuple([0.01 * i for i in range(60)] + [2.0 + 0.01 * i for i in range(40)])
RECOVERY: dict[str, Any] = {
    "epoch": 1,
    "lost_ranks": [1],
    "lost_pids": [77],
    "path": "rebuild",
    "ok": True,
    "reason": "",
    "phases_ms": {phase.value: float(i) for i, phase in enumerate(Phase)},
    "total_ms": 36.0,
    "kv_blocks_from_parity": 3,
    "kv_blocks_from_mirrors": 1,
    "kv_bytes_rebuilt": 4096,
    "tokens_recomputed": 0,
    "requests_recomputed": 0,
    "requests_recomputed_by_choice": 0,
}
STATE: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "dtype": "float32",
    "version": "0.1.0",
    "vllm": "0.32.0",
    "torch": "2.13.0",
    "counters": {"kv_bytes_protected": 8192},
    "shadow": {"parity_bytes": 4096, "mirror_bytes": 1024, "bound_bytes": 9999, "bound_holds": True},
}
GOOD = DemoRun(
    killed_rank=1,
    killed_pid=77,
    killed_at_token=58,
    kill_sent_s=0.575,
    reference_ids=REFERENCE,
    faulted_ids=REFERENCE,
    arrivals_s=ARRIVALS_S,
    stream_error=None,
    recovery=RECOVERY,
    state=STATE,
    model="tiny-llama",
    bound_held=True,
)
KEYS = [
    "tensor_parallel_size",
    "killed_rank",
    "killed_pid",
    "killed_at_token",
    "tokens_total",
    "tokens_lost",
    "tokens_duplicated",
    "tokens_changed",
    "identical",
    "recovery_path",
    "outage_ms",
    "phases_ms",
    "kv_blocks_from_parity",
    "kv_blocks_from_mirrors",
    "kv_bytes_rebuilt",
    "tokens_recomputed",
    "kv_bytes_protected",
    "parity_bytes",
    "mirror_bytes",
    "model",
    "dtype",
    "versions",
]


def test_the_keys_are_an_interface() -> None:
    report = build_report(GOOD)
    assert list(report) == KEYS
    assert list(report["phases_ms"]) == [
        "detect", "fence", "leave", "spawn", "regroup", "weights", "state", "kv", "retry",
    ]  # fmt: skip
    assert report["versions"] == {"ghostserve": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0"}


def test_a_good_run() -> None:
    report = build_report(GOOD)
    assert failures(report, GOOD) == []
    assert report["outage_ms"] == 1410.0
    assert (report["tokens_total"], report["identical"], report["recovery_path"]) == (100, True, "rebuild")
    assert headline(report) == "recovered in 1410 ms · 0 lost · 0 duplicated · identical ✓"


def broken(**changes: Any) -> DemoRun:
    return replace(GOOD, recovery=RECOVERY | changes)


def looping(at_token: int) -> DemoRun:
    ids = (*REFERENCE[:at_token], *([7] * (100 - at_token)))
    return replace(GOOD, reference_ids=ids, faulted_ids=ids)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (replace(GOOD, faulted_ids=(*REFERENCE[:60], 999, *REFERENCE[61:])), "from token 60"),
        (replace(GOOD, faulted_ids=REFERENCE[:90], arrivals_s=ARRIVALS_S[:90]), "from token 90"),
        (replace(GOOD, faulted_ids=(), reference_ids=(), arrivals_s=()), "nothing was compared"),
        (looping(50), "repeats itself"),
        (replace(GOOD, stream_error="connection lost"), "connection lost"),
        (replace(GOOD, bound_held=False), "memory bound"),
        (replace(GOOD, recovery=None), "no recovery"),
        (broken(path="recompute"), "recompute, not rebuild"),
        (broken(tokens_recomputed=5), "5 tokens"),
        (broken(kv_blocks_from_parity=1), "1 sealed blocks"),
        (broken(kv_blocks_from_parity=0), "0 sealed blocks"),
    ],
)
def test_each_check_fails_alone(run: DemoRun, said: str) -> None:
    (reason,) = failures(build_report(run), run)
    assert said in reason


def test_what_was_not_measured_is_not_made_up() -> None:
    run = replace(
        GOOD, recovery=None, stream_error="gone", faulted_ids=REFERENCE[:60], arrivals_s=ARRIVALS_S[:60]
    )
    report = build_report(run)
    assert list(report) == KEYS
    assert report["outage_ms"] is None
    assert report["recovery_path"] is None
    assert set(report["phases_ms"].values()) == {None}
    assert report["tokens_lost"] == 40
    assert headline(report) == "not recovered · 40 lost · 0 duplicated · NOT identical ✗"


def test_no_restore_is_seen() -> None:
    run = replace(GOOD, faulted_ids=(*REFERENCE[:60], *range(1000, 1040)))
    report = build_report(run)
    assert report["identical"] is False
    assert report["tokens_changed"] == 40
    assert "NOT identical" in headline(report)


def test_a_loop_is_told_from_text() -> None:
    assert distinct_ratio([1, 2, 3] * 40) < 0.05
    assert distinct_ratio(range(100)) == 1.0
    assert distinct_ratio([1, 2]) == 1.0


def test_the_outage_ends_with_a_token_that_came_after_the_kill() -> None:
    assert outage_ms([0.0, 5.0, 5.1, 6.0, 6.1], kill_sent_s=5.05) == pytest.approx(900)
    assert outage_ms([0.0, 1.0], kill_sent_s=2.0) is None
    assert outage_ms([3.0], kill_sent_s=2.0) is None
    assert outage_ms([], kill_sent_s=2.0) is None


def test_the_recovery_is_found_by_the_killed_process() -> None:
    other = RECOVERY | {"lost_pids": [5]}
    assert recovery_of({"recoveries": [RECOVERY, other], "last_recovery": other}, 77) == RECOVERY
    assert recovery_of({"recoveries": [], "last_recovery": RECOVERY}, 77) == RECOVERY
    assert recovery_of({"recoveries": [other], "last_recovery": None}, 77) is None
    assert recovery_of({}, 77) is None
