"""The simulated cluster itself: deterministic, eventful, and green on the product as it is."""

from __future__ import annotations

import json

import pytest

from ghostserve.cli import main as cli
from ghostserve.shadow.commit_rule import StepGate
from ghostserve.testing.simulation import report, run
from ghostserve.testing.simulation.contents import SLOT_BYTES, Truth
from ghostserve.testing.simulation.run import run_seed
from ghostserve.testing.simulation.setup import FAULT_KINDS

SEEDS = 16


@pytest.fixture(scope="module")
def totals() -> report.Totals:
    return report.simulate(first_seed=5000, seeds=SEEDS, jobs=1)


def test_every_invariant_holds(totals: report.Totals) -> None:
    assert totals.violations == []


def test_schedules_are_eventful(totals: report.Totals) -> None:
    assert totals.seeds == SEEDS
    assert totals.events_mean >= 200
    assert totals.without_loss == 0
    for what in ("blocks from mirrors", "blocks from parity", "requests recomputed", "stripes coded"):
        assert totals.counts[what] > 0, what
    assert len([kind for kind in FAULT_KINDS if totals.counts[kind]]) > len(FAULT_KINDS) // 2
    assert len({n for n, _ in totals.shapes}) > 3


def test_the_same_seed_is_the_same_schedule() -> None:
    first, second = (run_seed(5003, trace=True) for _ in range(2))
    assert first.trace == second.trace
    assert first == second
    assert len(first.trace) > 50
    assert run_seed(5003).checksum == first.checksum, "looking on changes nothing"
    assert run_seed(5004).checksum != first.checksum


def test_two_processes_come_to_the_same(totals: report.Totals) -> None:
    again = report.simulate(first_seed=5000, seeds=SEEDS, jobs=2)
    assert (again.events, again.counts, again.violated) == (totals.events, totals.counts, totals.violated)


def test_one_wrong_byte_changes_every_later_token() -> None:
    truth, other = (Truth(tokens=[first, 2, 3], seed=1, parts=4) for first in (1, 9))
    assert [truth.token(at) for at in range(3, 9)] != [other.token(at) for at in range(3, 9)]
    assert len(truth.kv(0, 2, 5)) == 3 * SLOT_BYTES
    assert truth.kv(1, 0, 6)[2 * SLOT_BYTES :] == truth.kv(1, 2, 6)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_simulate_prints_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--seeds", "2", "--first-seed", "5000", "--jobs", "1", "--json"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc["seeds"] == 2
    assert doc["violated"] == 0
    assert doc["counts"]["losses"] >= 2


def test_replay_shows_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--replay", "5000", "--trace"]) == 0
    out = capsys.readouterr().out
    assert "every invariant held" in out
    assert "FAULT" in out


def test_a_violation_is_told_with_its_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepGate, "refusal", lambda self, *, epoch: "never")
    monkeypatch.setattr(run, "QUIET_EVENTS_MAX", 50)
    assert cli.main(["simulate", "--seeds", "1", "--first-seed", "5002", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "seed 5002: event" in out
    assert "ghostserve simulate --replay 5002" in out
    assert cli.main(["simulate", "--replay", "5002"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--trace"], "name it with --replay"),
        (["--first-seed", "-1"], "--first-seed -1: must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err
