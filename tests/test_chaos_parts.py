"""The pure parts of a chaos run: its requests, its faults, its judgement; and its command line."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ghostserve.arena.fault_kinds import FaultKind
from ghostserve.cli import chaos
from ghostserve.cli import main as cli
from ghostserve.errors import GhostserveError, UsageError
from ghostserve.testing import chaos_load
from ghostserve.testing.chaos_client import GAP_S_MIN, gaps_of
from ghostserve.testing.chaos_faults import KEEPER_KINDS, Injection, choose, strikable
from ghostserve.testing.chaos_processes import ClientProcess
from ghostserve.testing.chaos_report import (
    DESCRIPTORS_SLACK,
    Outcome,
    Resources,
    Tally,
    as_document,
    as_text,
    violations,
)
from ghostserve.testing.chaos_run import answered
from ghostserve.testing.client import StreamResult
from ghostserve.testing.fault_plan import FaultPlan
from ghostserve.testing.fault_runner import FaultRunner

# -- load ----------------------------------------------------------------------------------------------


def test_quantiles_are_met() -> None:
    assert [chaos_load.sample_quantiles([0, 10, 30], u) for u in (0, 0.25, 0.5, 0.75, 1)] == [
        0,
        5,
        10,
        20,
        30,
    ]


def test_lengths_are_those_of_the_traces() -> None:
    requests = chaos_load.make_requests(2000, rng=random.Random(1), prompts=["abc " * 50])
    outputs = sorted(request.max_tokens for request in requests)
    assert outputs[0] == chaos_load.OUTPUT_TOKENS_MIN
    assert outputs[-1] == chaos_load.OUTPUT_TOKENS_MAX
    median = (
        sorted(chaos_load.trace_lengths()["azure2023_conv"]["output_tokens"])[50] / chaos_load.OUTPUT_DIVISOR
    )
    assert 0.5 * median < outputs[1000] < 3 * median
    longest = (
        chaos_load.CHARACTERS_PER_TOKEN * chaos_load.INPUT_TOKENS_MAX + chaos_load.SHARED_CHARACTERS + 50
    )
    assert max(len(request.prompt) for request in requests) <= longest


def test_the_load_is_mixed_and_told_by_its_seed() -> None:
    first, second = (
        chaos_load.make_requests(200, rng=random.Random(5), prompts=["x y\n", "z"]) for _ in range(2)
    )
    assert first == second
    assert first != chaos_load.make_requests(200, rng=random.Random(6), prompts=["x y\n", "z"])
    assert {request.prefix for request in first} == {None, 0, 1, 2}
    assert {request.n for request in first} == {1, 2}
    assert all((request.seed is None) == (request.temperature == 0) for request in first)
    assert all(request.n == 1 for request in first if request.seed is None), (
        "vLLM refuses several greedy answers"
    )
    same = [request.prompt[:600] for request in first if request.prefix == 1]
    assert len(set(same)) == 1
    assert len({request.prompt for request in first}) == 200


def test_gaps_are_between_tokens_of_one_choice() -> None:
    result = StreamResult(
        token_ids={}, text={}, arrivals_s={0: [1.0, 1.01, 2.0], 1: [5.0]}, finish_reasons={}, error=None
    )
    assert gaps_of(result) == [(1.01, 2.0)]
    assert GAP_S_MIN < 0.99


# -- faults --------------------------------------------------------------------------------------------


class Deaf:
    """An admin that takes everything."""

    def status(self) -> dict[str, Any]:
        return {"armed_faults": [], "counters": {"steps_total": 0}}

    def inflict(self, how: str, **values: Any) -> dict[str, Any]:
        return {}

    def arm_fault(self, **values: Any) -> None:
        """Nothing strikes."""


def test_every_kind_comes_up_as_often_and_can_be_performed() -> None:
    rng, done, chosen = random.Random(3), Counter[FaultKind](), Counter[FaultKind]()
    for _ in range(17 * 20):
        injection = choose(rng, done=done, kinds=tuple(FaultKind), ranks=2, keeper_rested=True).choice
        done[injection.kind] += 1
        chosen.update(fault.kind for fault in injection.plan.faults)
        assert injection.kind in {fault.kind for fault in injection.plan.faults}
        # A loss now and then finds another in its recovery; the runner knows where it would strike.
        rest = FaultPlan(tuple(f for f in injection.plan.faults if f.kind is not FaultKind.CLIENT_GONE))
        FaultRunner(Deaf(), rest).start()
    assert set(done.values()) == {20}
    assert chosen[FaultKind.CRASH] > 60


def test_a_keeper_gets_its_rest() -> None:
    rng = random.Random(0)
    for _ in range(50):
        decision = choose(
            rng,
            done={FaultKind.CRASH: 9},
            kinds=(FaultKind.CRASH, *KEEPER_KINDS),
            ranks=2,
            keeper_rested=False,
        )
        assert decision.choice.kind is FaultKind.CRASH


@pytest.mark.parametrize(
    ("plan", "single"),
    [
        (FaultPlan().crash(rank=0), True),
        (FaultPlan().corrupt_kv(rank=0, dies=True), True),
        (FaultPlan().corrupt_kv(rank=0), False),
        (FaultPlan().slow(rank=0, factor=2), False),
        (FaultPlan().crash(rank=0).then.crash(rank=1).in_recovery("kv"), False),
    ],
)
def test_what_is_a_single_loss(plan: FaultPlan, single: bool) -> None:
    assert Injection(kind=FaultKind.CRASH, plan=plan).is_single_loss is single


# -- judgement -----------------------------------------------------------------------------------------


def recovery(path: str, lost: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {"path": path, "lost_ranks": list(lost), "total_ms": 800.0}


def outcome(path: str, **values: Any) -> Outcome:
    known = {"kinds": (FaultKind.CRASH,), "told": "crash 1", "at_s": 10.0, "settled_s": 12.0, "decoding": 3}
    return Outcome(**{**known, "single_loss": True, "recoveries": (recovery(path),), **values})


def good() -> Tally:
    tally = Tally(outcomes=[outcome("rebuild") for _ in range(5)], gaps=[(9.9, 10.8), (20.0, 29.0)])
    tally.judge(0, {0: [1, 2, 3]}, {0: [1, 2, 3]}, error=None, aborted=False)
    tally.before = tally.after = Resources(
        processes=7, orphaned_names=0, descriptors={"front": 40}, memory_bytes={"front": 1 << 30}
    )
    return tally


def test_a_good_run() -> None:
    tally = good()
    assert violations(tally) == []
    document = as_document(tally, seed=4, wall_s=60.0)
    assert document["ok"]
    assert document["faults_by_kind"] == {"crash": 5}
    assert document["outage_s"]["max"] == pytest.approx(0.9), "a silence elsewhere counts as an outage"
    text = as_text(document)
    assert "no violation · seed 4" in text
    assert "of single losses 5 of 5 rebuilt" in text


@pytest.mark.parametrize(
    ("tokens", "error", "aborted", "said"),
    [
        ([1, 2, 4], None, False, "1 changed"),
        ([1, 2], None, False, "1 lost"),
        ([1, 2, 3], "HTTP 500", False, "HTTP 500"),
        ([1, 9], None, True, "1 changed"),
    ],
)
def test_a_wrong_answer_is_a_violation(
    tokens: list[int], error: str | None, aborted: bool, said: str
) -> None:
    tally = good()
    tally.judge(7, {0: [1, 2, 3]}, {0: tokens}, error=error, aborted=aborted)
    (found,) = violations(tally)
    assert "request 7" in found
    assert said in found
    assert not as_document(tally, seed=0, wall_s=0)["ok"]


def test_a_client_that_left_is_judged_by_what_it_has() -> None:
    tally = good()
    tally.judge(7, {0: [1, 2, 3], 1: [4]}, {0: [1, 2]}, error=None, aborted=True)
    assert violations(tally) == []
    assert tally.requests_left == 1


def test_a_build_that_always_recomputes_fails() -> None:
    tally = good()
    tally.outcomes = [outcome("recompute") for _ in range(5)]
    (found,) = violations(tally)
    assert "only 0 were rebuilt" in found


def test_recompute_is_right_where_more_was_wrong() -> None:
    tally = good()
    tally.outcomes += [outcome("recompute", single_loss=False) for _ in range(50)]
    assert violations(tally) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"processes": 8}, "8 processes"),
        ({"orphaned_names": 1}, "names of shared memory"),
        ({"descriptors": {"front": 41 + DESCRIPTORS_SLACK}}, "descriptors"),
        ({"memory_bytes": {"front": 2 << 30}}, "1024 MiB more"),
    ],
)
def test_what_grows_is_a_violation(change: dict[str, Any], said: str) -> None:
    tally = good()
    assert tally.after is not None
    tally.after = replace(tally.after, **change)
    (found,) = violations(tally)
    assert said in found


def test_what_stays_is_a_violation() -> None:
    tally = good()
    tally.left_behind = ["process 7"]
    assert violations(tally) == ["left behind: process 7"]


# -- command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--faults", "0"], "at least 1"),
        (["--minutes", "0"], "above 0"),
        (["--plan", "x.json", "--faults", "3"], "leave --faults"),
        (["--kinds", "crash,flood"], "no kind 'flood'"),
        (["--control", "nothing"], "invalid choice"),
    ],
)
def test_bad_options_are_named(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        chaos.parse(argv)


def test_a_plan_that_cannot_strike_is_told_before_a_server_starts(tmp_path: Path) -> None:
    plan = FaultPlan().crash(rank=1).at_token(20).then.crash(rank=0).in_recovery("weights")
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    with pytest.raises(UsageError, match="rank 0 is a survivor by then"):
        chaos.parse(["--plan", str(tmp_path / "plan.yaml")])


def test_clients_that_end_are_not_waited_for() -> None:
    """Here for an address that is none; nothing else would tell of it."""
    clients = ClientProcess({"url": "nowhere", "plan": FaultPlan().crash(rank=0).to_dict(), "streams": 0})
    try:
        with pytest.raises(GhostserveError, match="has ended"):
            clients.next_event(timeout_s=30)
        clients.tell({"do": "stop"})
    finally:
        clients.close()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chaos", "--help"]) == 0
    assert "memory_exhausted" in capsys.readouterr().out


def test_defaults() -> None:
    options = chaos.parse([])
    assert options.faults == chaos.DEFAULT_FAULTS
    assert options.seed != chaos.parse([]).seed, "a seed is drawn, and told"
    assert chaos.parse(["--seed", "3", "model", "--dtype", "float32"]).serve == [
        "model",
        "--dtype",
        "float32",
    ]
    assert chaos.parse(["--minutes", "2"]).faults is None


def test_kinds_that_cannot_be_brought_about_are_left_out() -> None:
    assert FaultKind.STANDBY_DEAD not in chaos.kinds_of(None, standbys=False)
    assert FaultKind.STANDBY_DEAD in chaos.kinds_of(None, standbys=True)
    assert chaos.kinds_of("crash, hang", standbys=False) == (FaultKind.CRASH, FaultKind.HANG)


@pytest.mark.parametrize(
    ("plan", "recoveries", "expected"),
    [
        (FaultPlan().hang(rank=0), [], False),
        (FaultPlan().hang(rank=0), [{"lost_ranks": []}], False),  # an exception's, from before
        (FaultPlan().hang(rank=0), [{"lost_ranks": []}, {"lost_ranks": [0]}], True),
        (FaultPlan().exception(rank=0), [], False),
        (FaultPlan().exception(rank=0), [{"lost_ranks": []}], True),
        (FaultPlan().keeper_crash(), [], True),
    ],
)
def test_a_fault_is_answered_by_its_own_recovery(
    plan: FaultPlan, recoveries: list[dict[str, Any]], expected: bool
) -> None:
    assert answered(plan.faults, recoveries) is expected


def test_a_keeper_that_has_just_suffered_is_left_alone() -> None:
    """Also where nothing else is asked for: then nothing strikes for a while."""
    kinds = [FaultKind.KEEPER_HANG, FaultKind.KEEPER_CRASH]
    assert strikable(kinds, keeper_rested=True) == kinds
    assert strikable(kinds, keeper_rested=False) == []
    assert strikable([*kinds, FaultKind.SLOW], keeper_rested=False) == [FaultKind.SLOW]
