"""Fault plans: they read like a sentence, round-trip, name what is wrong, and are performed in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ghostserve.arena.fault_kinds import KINDS, FaultKind, Victim
from ghostserve.arena.names import FaultAction, FaultPoint
from ghostserve.errors import UsageError
from ghostserve.testing.client import StopStreaming
from ghostserve.testing.fault_plan import FaultPlan, PlannedFault, When
from ghostserve.testing.fault_runner import FaultRunner
from ghostserve.types import Phase

EVERYTHING = (
    FaultPlan()
    .crash(rank=1).at_token(40).then.hang(rank=0).in_recovery("kv")
    .segfault(rank=0).at_step(3).then.exception(rank=1).at_step(2)
    .spin(rank=0).in_request("prefill")
    .blocked(rank=0).at_absolute_step(900)
    .slow(rank=1, factor=8, steps=30)
    .oom(rank=0).in_recovery("state")
    .corrupt_kv(rank=1, dies=True).at_step(20)
    .corrupt_mirror(rank=0).at_step(1)
    .corrupt_parity()
    .keeper_crash().at_token(3)
    .keeper_hang().in_request("decode")
    .arena_write_failure(rank=1)
    .memory_exhausted(steps=12)
    .standby_dead().in_request("queued")
    .client_gone(at_token=9)
)  # fmt: skip


def test_it_reads_like_a_sentence() -> None:
    plan = FaultPlan().crash(rank=1).at_token(40).then.hang(rank=0).in_recovery("kv")
    assert plan.faults == (
        PlannedFault(kind=FaultKind.CRASH, rank=1, when=When(token=40)),
        PlannedFault(kind=FaultKind.HANG, rank=0, when=When(recovery=Phase.KV), then=True),
    )


def test_every_kind_has_a_word_and_round_trips(tmp_path: Path) -> None:
    assert {fault.kind for fault in EVERYTHING.faults} == set(FaultKind)
    for name, text in (("plan.json", EVERYTHING.to_json()), ("plan.yaml", EVERYTHING.to_yaml())):
        (tmp_path / name).write_text(text)
        assert FaultPlan.from_file(tmp_path / name) == EVERYTHING


def test_a_plan_is_frozen() -> None:
    plan = FaultPlan().crash(rank=0)
    plan.at_step(3)
    assert plan.faults[0].when == When()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.faults = ()  # type: ignore[misc]


def test_kinds_that_are_only_a_clients_or_a_signals_have_no_points() -> None:
    for kind, facts in KINDS.items():
        assert bool(facts.points) == (facts.action is not None), kind
        assert facts.by_signal or facts.action or facts.victim is Victim.CLIENT, kind


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FaultPlan().at_step(3), "name one first"),
        (lambda: FaultPlan().then, "name one first"),
        (lambda: FaultPlan().crash(rank=-1), "from 0 on"),
        (lambda: FaultPlan().crash(rank=0).at_step(0), "from 1 on"),
        (lambda: FaultPlan().crash(rank=0).at_step(1).at_token(2), "has a time already"),
        (lambda: FaultPlan().crash(rank=0).in_recovery("lunch"), "choose one of detect, fence"),
        (lambda: FaultPlan().crash(rank=0).in_recovery("detect"), "choose one of leave"),
        (lambda: FaultPlan().crash(rank=0).in_request("asleep"), "queued, prefill, decode"),
        (lambda: FaultPlan().corrupt_kv(rank=0).in_recovery("kv"), "cannot strike during a recovery"),
        (lambda: FaultPlan().standby_dead().at_step(3), "does not strike in a step"),
        (lambda: FaultPlan().client_gone(at_token=0), "from 1 on"),
        (lambda: FaultPlan.from_dict([]), '{"faults": [...]}'),
        (lambda: FaultPlan.from_dict({"faults": [3]}), "fault 1: 3 is no fault"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "flood"}]}), "fault 1: there is no kind 'flood'"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "crash"}]}), "fault 1: crash: rank None is none"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "crash", "rank": True}]}), "rank True is none"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "crash", "rank": 0, "who": 1}]}), "unknown field 'who'"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "crash", "rank": 0, "factor": 2}]}), "leave it out"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "keeper_crash", "rank": 0}]}), "concerns no rank"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "crash", "rank": 0, "then": True}]}), "first one"),
        (lambda: FaultPlan.from_dict({"faults": [{"kind": "crash", "rank": 0, "at": 3}]}), "'at' is 3"),
        (
            lambda: FaultPlan.from_dict({"faults": [{"kind": "crash", "rank": 0, "at": {"step": 1, "token": 1}}]}),
            "keep one of them",
        ),
        (
            lambda: FaultPlan.from_dict({"faults": [{"kind": "slow", "rank": 0, "factor": "2"}]}),
            "'2' must be a whole number",
        ),
        (lambda: FaultPlan.from_text("{"), "neither JSON nor YAML"),
        (lambda: FaultPlan.from_file(Path("/nowhere/plan.json")), "cannot be read"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert said in str(caught.value)


# -- performing ----------------------------------------------------------------------------------------


class Admin:
    """Keeps what it was asked for; armed faults stay until `strike`."""

    def __init__(self, *, steps_total: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.armed: list[dict[str, Any]] = []
        self._steps_total = steps_total

    def status(self) -> dict[str, Any]:
        return {"armed_faults": list(self.armed), "counters": {"steps_total": self._steps_total}}

    def inflict(self, how: str, **values: Any) -> dict[str, Any]:
        self.calls.append((how, values["rank"]))
        return {"pid": 1}

    def arm_fault(self, **fault: Any) -> None:
        self.armed.append(fault)
        self.calls.append((fault["point"], fault["rank"], fault["action"], fault["skip"]))

    def strike(self) -> None:
        self.armed.clear()


def run(plan: FaultPlan, admin: Admin, tokens: int) -> FaultRunner:
    runner = FaultRunner(admin, plan)
    runner.start()
    watch = runner.watch()
    for _ in range(tokens):
        watch(0, [1], "x", 0.0)
    return runner


def test_by_token_and_what_strikes_in_its_recovery_is_armed_before() -> None:
    admin = Admin()
    plan = (
        FaultPlan()
        .crash(rank=1)
        .at_token(3)
        .then.hang(rank=0)
        .in_recovery("kv")
        .then.oom(rank=1)
        .in_recovery("kv")
    )
    assert not run(plan, admin, 2).performed
    assert run(plan, admin, 3).is_done
    # A survivor exports, the newcomer adopts; the crash comes last.
    assert admin.calls == [("adopt", 1, "oom", 0), ("export", 0, "hang", 0), ("crash", 1)]


def test_steps_count_from_the_fault_before() -> None:
    admin = Admin()
    run(
        FaultPlan()
        .crash(rank=1)
        .at_step(5)
        .then.exception(rank=0)
        .at_step(3)
        .slow(rank=0, factor=3)
        .at_step(2),
        admin,
        0,
    )
    assert admin.calls == [
        ("before_model", 1, "kill", 4),
        ("before_model", 0, "raise", 7),
        ("after_model", 0, "slow", 1),
    ]
    assert admin.armed[-1]["argument"] == 3


def test_a_rank_that_dies_with_its_corrupt_kv() -> None:
    admin = Admin()
    run(FaultPlan().corrupt_kv(rank=1, dies=True).at_step(2).corrupt_kv(rank=0, dies=True), admin, 0)
    assert [fault["argument"] for fault in admin.armed] == [1, 1]
    assert admin.calls == [("staged", 1, "corrupt_kv", 1), ("staged", 0, "corrupt_kv", 0)]
    with pytest.raises(UsageError, match="dies says nothing"):
        FaultPlan.from_dict({"faults": [{"kind": "crash", "rank": 0, "dies": True}]})


def test_an_absolute_step_that_is_over() -> None:
    admin = Admin(steps_total=10)
    run(FaultPlan().crash(rank=0).at_absolute_step(14), admin, 0)
    assert admin.calls == [("before_model", 0, "kill", 3)]
    with pytest.raises(UsageError, match="step 10 is over"):
        run(FaultPlan().crash(rank=0).at_absolute_step(10), admin, 0)


def test_what_follows_waits_until_the_one_before_has_struck() -> None:
    admin = Admin()
    runner = FaultRunner(admin, FaultPlan().exception(rank=0).at_step(5).then.crash(rank=1).at_token(2))
    runner.start()
    watch = runner.watch()
    for _ in range(4):
        watch(0, [1], "x", 0.0)
    assert len(runner.performed) == 1
    admin.strike()
    watch(0, [1], "x", 0.0)
    assert runner.is_done
    assert admin.calls[-1] == ("crash", 1)


def test_by_request_phase() -> None:
    admin = Admin()
    runner = FaultRunner(
        admin,
        FaultPlan()
        .crash(rank=0)
        .in_request("prefill")
        .hang(rank=1)
        .in_request("queued")
        .oom(rank=0)
        .in_request("decode"),
    )
    runner.start()
    assert admin.calls == []
    runner.sending()
    assert admin.calls == [("before_model", 0, "kill", 0)]
    runner.sent()
    assert admin.calls[1:] == [("hang", 1)]
    runner.watch()(0, [1], "x", 0.0)
    assert admin.calls[2:] == [("oom", 0)]


def test_a_client_that_goes_leaves_its_own_stream_only() -> None:
    runner = FaultRunner(Admin(), FaultPlan().client_gone(at_token=2))
    runner.start()
    first, second = runner.watch(), runner.watch()
    first(0, [1], "x", 0.0)
    with pytest.raises(StopStreaming):
        second(0, [1, 2], "xy", 0.0)
    first(0, [1, 2], "xy", 0.0)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (FaultPlan().crash(rank=0).in_recovery("spawn"), "survivor"),
        (FaultPlan().hang(rank=0).then.crash(rank=0).in_recovery("leave"), "newcomer"),
    ],
)
def test_a_phase_that_the_rank_does_not_come_by(plan: FaultPlan, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        FaultRunner(Admin(), plan)


def test_the_actions_are_those_of_the_table() -> None:
    """Every action can be had by some name; none is left that nothing names. But a pause: nothing fails by it."""
    used = {facts.action for facts in KINDS.values()} - {None}
    assert used == set(FaultAction) - {FaultAction.PAUSE}
    named = {point for facts in KINDS.values() for point in facts.points}
    assert named == set(FaultPoint) - {FaultPoint.SCHEDULED}


def test_the_documentation_names_every_kind() -> None:
    text = (Path(__file__).parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
    documented = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert documented == {kind.value for kind in FaultKind}
    plan = "".join(
        line.removeprefix("    ") + "\n"
        for line in text.splitlines()
        if line.startswith(("    faults:", "    - {"))
    )
    assert FaultPlan.from_text(plan) == FaultPlan().crash(rank=1).at_token(40).then.hang(rank=0).in_recovery(
        "kv"
    )
