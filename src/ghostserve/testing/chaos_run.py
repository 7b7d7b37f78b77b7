"""A chaos run: clients load a server while faults strike it, and every answer is compared with the one without faults.

    references (two passes, in other batches: they must agree) ─▶ faults under load ─▶ every request once more, quiet

It decides nothing about what comes next (`chaos_faults`) or what is a violation (`chaos_report`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghostserve.arena.fault_kinds import KINDS, FaultKind
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import CheckFailed, EngineLost, GhostserveError
from ghostserve.testing.chaos_faults import KEEPER_KINDS, KEEPER_REST_S, Injection, choose, strikable
from ghostserve.testing.chaos_load import Request
from ghostserve.testing.chaos_processes import ClientProcess, OwnNames, resources
from ghostserve.testing.chaos_report import Outcome, Resources, Tally
from ghostserve.testing.fault_plan import FaultPlan, PlannedFault
from ghostserve.testing.fault_runner import LOSING, FaultRunner
from ghostserve.testing.server import ServerProcess
from ghostserve.web.admin import Refused

STRIKE_TIMEOUT_S = 12.0  # what has not struck by then is disarmed, and does not count
SETTLE_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 180.0
POLL_S = 0.03
PAUSE_S_MAX = 0.4  # between two injections
CALM_S = 0.15
PLAN_S = 30.0  # for a plan, unless told


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is asked for."""

    requests: Sequence[Request]
    streams: int
    seed: int
    kinds: tuple[FaultKind, ...]
    faults_wanted: int | None  # that count
    seconds: float | None
    plan: FaultPlan | None  # instead of faults at random


@dataclass(slots=True)
class Chaos:
    """One run on one server that serves. `say` gets a line now and then."""

    server: ServerProcess
    model: str
    settings: Settings
    say: Callable[[str], None]
    tally: Tally = field(default_factory=Tally)
    names: OwnNames = field(default_factory=OwnNames)
    _references: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    _keeper_fault_s: float = float("-inf")
    _performed: list[str] = field(default_factory=list)  # of the plan, as the clients say

    def run(self) -> None:
        """All of it; what is wrong ends up in the tally, also when the server is lost."""
        settings = self.settings
        clients = ClientProcess(
            {
                "url": self.server.base_url,
                "model": self.model,
                "requests": [request.as_dict() for request in settings.requests],
                "streams": settings.streams,
                "seed": settings.seed,
                "plan": None if settings.plan is None else settings.plan.to_dict(),
            }
        )
        try:
            self._take_references(clients)
            self.tally.before = self._held()
            clients.tell({"do": "loop", "salt": "loop"})
            if settings.plan is None:
                self._strike_at_random(clients)
            else:
                self._follow_plan(clients, settings.plan)
            self._collect(clients, {"do": "stop"})
            every = [request.number for request in settings.requests]
            self._collect(clients, {"do": "once", "order": every, "salt": "loop"})
            self._settle()
            self.tally.after = self._held()
        except (GhostserveError, EngineLost) as error:
            self.tally.failures.append(self._cause(error))
        finally:
            clients.close()

    def _cause(self, error: GhostserveError) -> str:
        code = self.server.poll()
        return str(error) if code is None else f"the server ended with status {code}: {error}"

    # -- answers ---------------------------------------------------------------------------------------

    def _take_references(self, clients: ClientProcess) -> None:
        """Two failure-free passes in other orders; CheckFailed if an answer depends on what else runs."""
        rng = random.Random(f"order/{self.settings.seed}")
        numbers = [request.number for request in self.settings.requests]
        for turn in range(2):
            self.say(f"failure-free pass {turn + 1} of 2, {len(numbers)} requests")
            for event in self._events(clients, {"do": "once", "order": numbers, "salt": f"reference-{turn}"}):
                number, tokens = event["request"], _tokens(event)
                if event["error"] is not None:
                    raise CheckFailed(f"request {number} fails without a fault: {event['error']}")
                if self._references.setdefault(number, tokens) != tokens:
                    raise CheckFailed(
                        f"request {number} has another answer in another batch, without a fault: serve it in float32"
                    )
            rng.shuffle(numbers)

    def _events(self, clients: ClientProcess, command: dict[str, Any]) -> list[dict[str, Any]]:
        """What comes until the clients are idle."""
        clients.tell(command)
        found: list[dict[str, Any]] = []
        while True:
            event = clients.next_event(timeout_s=ANSWER_TIMEOUT_S)
            if event is None:
                raise CheckFailed(f"no answer came for {ANSWER_TIMEOUT_S:.0f} s")
            if event["event"] == "idle":
                return found
            found.append(event)

    def _collect(self, clients: ClientProcess, command: dict[str, Any]) -> None:
        for event in self._events(clients, command):
            self._judge(event)

    def _judge_all(self, clients: ClientProcess) -> None:
        """What has come by now."""
        while (event := clients.next_event()) is not None:
            self._judge(event)

    def _judge(self, event: dict[str, Any]) -> None:
        if event["event"] == "performed":
            self._performed = event["kinds"]
            return
        self.tally.judge(
            event["request"],
            self._references[event["request"]],
            _tokens(event),
            error=event["error"],
            aborted=event["aborted"],
        )
        self.tally.gaps.extend((since_s, until_s) for since_s, until_s in event["gaps"])

    # -- faults ----------------------------------------------------------------------------------------

    def _strike_at_random(self, clients: ClientProcess) -> None:
        settings, began_s = self.settings, monotonic_s()
        rng = random.Random(settings.seed)
        done: Counter[FaultKind] = Counter()
        while not self._enough(began_s):
            sleep_s(rng.uniform(0.0, PAUSE_S_MAX))
            rested = monotonic_s() - self._keeper_fault_s >= KEEPER_REST_S
            status = self._status()
            kinds = [
                kind for kind in settings.kinds if kind is not FaultKind.STANDBY_DEAD or _has_standby(status)
            ]
            if not strikable(kinds, keeper_rested=rested):
                continue
            decision = choose(rng, done=done, kinds=kinds, ranks=len(status["ranks"]), keeper_rested=rested)
            injection = decision.choice
            if injection.kind in KEEPER_KINDS:
                self._keeper_fault_s = monotonic_s()
            done[injection.kind] += 1
            self._inject(clients, injection)
            self._judge_all(clients)

    def _enough(self, began_s: float) -> bool:
        wanted, seconds = self.settings.faults_wanted, self.settings.seconds
        counted = sum(self.tally.faults().values())
        return (wanted is not None and counted >= wanted) or (
            seconds is not None and monotonic_s() - began_s >= seconds
        )

    def _inject(self, clients: ClientProcess, injection: Injection) -> None:
        """Perform one plan while streams are in mid-answer, and see the server through it."""
        deadline_s = monotonic_s() + SETTLE_TIMEOUT_S
        while not clients.decoding:
            if monotonic_s() > deadline_s:
                raise CheckFailed(f"no stream showed a token for {SETTLE_TIMEOUT_S:.0f} s")
            sleep_s(POLL_S)
        before = self.server.status()
        self.server.record_processes()
        self.names.note(self.server)
        leaves = [fault for fault in injection.plan.faults if fault.kind is FaultKind.CLIENT_GONE]
        rest = FaultPlan(tuple(fault for fault in injection.plan.faults if fault not in leaves))
        at_s, decoding = monotonic_s(), len(clients.decoding)
        for _ in leaves:
            clients.tell({"do": "leave"})
        runner = FaultRunner(self.server.admin, rest)
        try:
            runner.start()
        except Refused as error:  # who was to suffer it has just gone
            self.say(f"{_told(injection.plan)}: {error}")
            self.server.admin.disarm_faults()
            self._settle()
            return
        missed = self._await_strikes(runner, before)
        kinds = [fault.kind for fault in injection.plan.faults]
        for fault in missed:
            kinds.remove(fault.kind)
        after = self._settle()
        outcome = Outcome(
            kinds=tuple(kinds) if decoding else (),
            told=_told(injection.plan),
            at_s=at_s,
            settled_s=monotonic_s(),
            decoding=decoding,
            single_loss=injection.is_single_loss,
            recoveries=_since(before, after),
        )
        self.tally.outcomes.append(outcome)
        self._tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        paths = (
            ", ".join(f"{r['path']} in {r['total_ms']:.0f} ms" for r in outcome.recoveries) or "no recovery"
        )
        tally = self.tally
        wrong = len(tally.failures) + len(tally.differences)
        self.say(
            f"[{sum(tally.faults().values())}] {outcome.told} · {outcome.decoding} streams · {paths} · "
            f"{tally.requests} requests, {wrong} wrong"
        )

    def _await_strikes(self, runner: FaultRunner, before: dict[str, Any]) -> list[PlannedFault]:
        """Until everything has struck and every loss is noticed; what has not struck in time, disarmed."""
        deadline_s = monotonic_s() + STRIKE_TIMEOUT_S
        watch = runner.watch()
        while True:
            status = self._status()
            watch(0, (), "", monotonic_s())  # what follows something that has struck by now
            left = [item for item in runner.performed if item.armed and _is_armed(item.armed, status)]
            struck = [item.fault for item in runner.performed if item not in left]
            loses = any(fault.kind in LOSING or fault.dies for fault in struck)
            noticed = answered(struck, _since(before, status))
            is_calm = noticed and status["state"] == "serving"
            # Nothing is left, or what is left waits for a recovery that is over.
            waits_in_vain = all(item.fault.when.recovery is not None for item in left) and loses
            if runner.is_done and is_calm and (not left or waits_in_vain):
                break
            if monotonic_s() > deadline_s + (0 if noticed else SETTLE_TIMEOUT_S):
                if not noticed:
                    raise CheckFailed(
                        f"{_told(FaultPlan(tuple(struck)))}: not answered in {SETTLE_TIMEOUT_S:.0f} s"
                    )
                break
            sleep_s(POLL_S)
        self.server.admin.disarm_faults()
        done = [item.fault for item in runner.performed]
        never = [fault for fault in runner.plan.faults if fault not in done]
        return [item.fault for item in left] + never

    def _follow_plan(self, clients: ClientProcess, plan: FaultPlan) -> None:
        """The clients perform it, while they load the server for `seconds`."""
        before, at_s, decoding = self.server.status(), monotonic_s(), 0
        self.server.record_processes()
        while monotonic_s() - at_s < (self.settings.seconds or PLAN_S):
            decoding = max(decoding, len(clients.decoding))
            self._judge_all(clients)
            sleep_s(10 * POLL_S)
        self._performed = []
        self._collect(clients, {"do": "stop"})
        armed = self._settle()
        left = [item["action"] for item in armed["armed_faults"]]
        kinds = []
        for kind in map(FaultKind, self._performed):
            action = KINDS[kind].action
            if action is not None and action.value in left:
                left.remove(action.value)
                self.say(f"{kind} never struck")
            else:
                kinds.append(kind)
        self.server.admin.disarm_faults()
        outcome = Outcome(
            kinds=tuple(kinds) if decoding else (),
            told=_told(plan),
            at_s=at_s,
            settled_s=monotonic_s(),
            decoding=decoding,
            single_loss=False,
            recoveries=_since(before, armed),
        )
        self.tally.outcomes.append(outcome)
        self._tell(outcome)

    # -- the server ------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        code = self.server.poll()
        if code is not None:
            raise EngineLost(f"it is gone; the end of its log:\n{self.server.log_tail(lines=15)}")
        return self.server.status()

    def _held(self) -> Resources:
        sleep_s(1.0)  # what ends takes a moment to be gone
        return resources(self.server, self._status(), self.names)

    def _settle(self) -> dict[str, Any]:
        """Serving again with all ranks, for CALM_S; raises CheckFailed if that takes too long."""
        deadline_s, calm_since_s, total = monotonic_s() + SETTLE_TIMEOUT_S, monotonic_s(), -1
        while True:
            status = self._status()
            serving = status["state"] == "serving" and all(r["state"] == "alive" for r in status["ranks"])
            if not serving or status["recoveries_total"] != total:
                calm_since_s, total = monotonic_s(), status["recoveries_total"]
            elif monotonic_s() - calm_since_s >= CALM_S:
                return status
            if monotonic_s() > deadline_s:
                raise CheckFailed(f"not serving again within {SETTLE_TIMEOUT_S:.0f} s: {status['state']}")
            sleep_s(POLL_S)


def answered(struck: Sequence[PlannedFault], recoveries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the server has dealt with what struck: losses by a recovery that lost a rank, exceptions by any.

    A recovery that an earlier fault has coming must not be taken for the answer: the next fault would be injected into a
    recovery that is about to begin, and three losses in one are more than the server promises to survive.
    """
    loses = any(fault.kind in LOSING or fault.dies for fault in struck)
    raises = any(fault.kind is FaultKind.EXCEPTION for fault in struck)
    return (not loses or any(report["lost_ranks"] for report in recoveries)) and (
        not raises or bool(recoveries)
    )


def _has_standby(status: dict[str, Any]) -> bool:
    return any(standby["state"] == "ready" for standby in status.get("standbys") or ())


def _since(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The reports of the recoveries in between; the server keeps the last few."""
    new = after["recoveries_total"] - before["recoveries_total"]
    return tuple(after["recoveries"][-new:]) if new else ()


def _tokens(event: dict[str, Any]) -> dict[int, list[int]]:
    return {int(index): ids for index, ids in event["tokens"].items()}


def _is_armed(fault: Any, status: dict[str, Any]) -> bool:
    known = (fault.point.value, fault.rank, fault.action.value)
    return known in {(item["point"], item["rank"], item["action"]) for item in status["armed_faults"]}


def _told(plan: FaultPlan) -> str:
    """A plan in a few words: `crash 1 at step 7, then crash 0 in recovery state`."""
    words = []
    for fault in plan.faults:
        at = [f"{name.replace('_', ' ')} {getattr(v, 'value', v)}" for name in fault.when.__slots__
              if (v := getattr(fault.when, name)) is not None]  # fmt: skip
        rank = "" if fault.rank is None else f" {fault.rank}"
        words.append(f"{'then ' if fault.then else ''}{fault.kind}{rank}{' at ' + at[0] if at else ''}")
    return ", ".join(words)
