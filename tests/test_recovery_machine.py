"""The recovery machine: text scenarios, every reachable state of small machines, random walks of larger ones.

A scenario (tests/scenarios/*.txt) is blocks of input lines, `----`, the expected output, and an empty line.

    new ranks=N parity=M attempts=K [retries=R] [calm=S]     lost R,R [epoch=E] [in_flight] [: reason]
    done PHASE... [epoch=E]        failed PHASE [ranks=R,R] [epoch=E] [: reason]
    raised R,R [epoch=E] [: reason]        accepted [epoch=E]        wait SECONDS        history

Without `epoch=` an event is of the current epoch. Each event comes one second after the one before.
`python tests/test_recovery_machine.py [--write] [FILE...]` prints (or writes) them with the actual output.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ghostserve.recovery import machine as m
from ghostserve.recovery.loss_rate import LossRate
from ghostserve.types import Phase, RecoveryPath

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


# ---- text scenarios ----


def ranks_of(word: str) -> frozenset[int]:
    return frozenset(int(r) for r in word.split(","))


def state_line(machine: m.RecoveryMachine) -> str:
    parts = [
        f"= {machine.state.value}",
        machine.phase.value if machine.phase else "",
        f"epoch={machine.epoch}",
        f"lost={','.join(map(str, sorted(machine.lost)))}" if machine.lost else "",
        f"attempts={machine.attempts}/{machine.max_attempts}",
    ]
    return " ".join(filter(None, parts))


class Scenario:
    """Runs input lines on one machine and tells what came out."""

    def __init__(self) -> None:
        self.machine = m.RecoveryMachine(1, 0, max_attempts=1)
        self.now_s = 0.0

    def run(self, line: str) -> Iterator[str]:
        head, _, reason = (part.strip() for part in line.partition(" : "))
        verb, *words = head.split()
        options = dict(word.split("=", 1) for word in words if "=" in word)
        words = [word for word in words if "=" not in word]
        epoch = int(options.get("epoch", self.machine.epoch))
        match verb, words:
            case "new", []:
                self.machine = m.RecoveryMachine(
                    int(options["ranks"]),
                    int(options["parity"]),
                    max_attempts=int(options["attempts"]),
                    max_step_retries=int(options.get("retries", "1")),
                    calm_s=float(options.get("calm", "300")),
                )
            case "wait", [seconds]:
                self.now_s += float(seconds)
            case "history", []:
                yield from self.machine.history
            case "lost", [ranks, *rest]:
                yield from self.handle(m.RanksLost(ranks_of(ranks), reason, epoch, "in_flight" in rest))
            case "done", [*phases]:
                for phase in phases:
                    yield from self.handle(m.PhaseDone(Phase(phase), epoch))
            case "failed", [phase]:
                blamed = ranks_of(options["ranks"]) if "ranks" in options else m.NOBODY
                yield from self.handle(m.PhaseFailed(Phase(phase), reason, epoch, blamed))
            case "raised", [ranks]:
                yield from self.handle(m.StepRaised(ranks_of(ranks), reason, epoch))
            case "accepted", []:
                yield from self.handle(m.StepAccepted(epoch))
            case _:
                raise ValueError(f"not a scenario line: {line!r}")

    def handle(self, event: m.Event) -> Iterator[str]:
        self.now_s += 1.0
        try:
            yield from map(m.text, self.machine.handle(event, self.now_s))
        except m.IllegalTransition as error:
            yield str(error).splitlines()[0]
        self.machine.check()


def actual(source: str) -> str:
    """The scenario's text with what really comes out in place of what is expected."""
    scenario = Scenario()
    out: list[str] = []
    inputs: list[str] = []
    expected = False
    for line in [*source.rstrip("\n").split("\n"), ""]:
        if line == "----":
            expected = True
            out.append(line)
            for words in inputs:
                out.extend(scenario.run(words))
            out.append(state_line(scenario.machine))
        elif not line:
            assert expected or not inputs, f"block without ----: {inputs}"
            inputs, expected = [], False
            out.append("")
        elif not expected:
            out.append(line)
            if not line.startswith("#"):
                inputs.append(line)
    return "\n".join(out).rstrip("\n") + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    expected = path.read_text(encoding="utf-8")
    assert actual(expected) == expected


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10


# ---- what must hold in any sequence of events ----


class Watch:
    """Checks every answer of a machine against what came before."""

    def __init__(self, machine: m.RecoveryMachine) -> None:
        self.machine = machine
        self.epoch = machine.epoch
        self.ran: tuple[tuple[Phase, ...], ...] = ()  # in this epoch
        self.undone: set[Phase] = set()
        self.actions = 0
        self.gave_up = False

    def clone(self) -> Watch:
        """A copy that lives on by itself, without the history; deepcopy takes a hundred times as long."""
        other = copy.copy(self)
        other.machine = copy.copy(self.machine)
        for name, value in vars(self.machine).items():
            if isinstance(value, list):
                setattr(other.machine, name, value.copy())
        other.machine._history = deque(maxlen=m.HISTORY_MAX)
        other.undone = self.undone.copy()
        return other

    def handle(self, event: m.Event, now_s: float) -> list[m.Action]:
        before = key(self.machine)
        try:
            actions = self.machine.handle(event, now_s)
        except m.IllegalTransition:
            assert key(self.machine) == before, "an illegal event must change nothing"
            raise
        self.machine.check()
        if isinstance(event, m.PhaseDone) and event.epoch == self.epoch:
            self.undone.discard(event.phase)
        assert not (self.gave_up and actions)
        for i, action in enumerate(actions):
            self.actions += 1
            self.see(action, is_last=i == len(actions) - 1)
        assert self.epoch == self.machine.epoch, "the epoch changes by RaiseEpoch only"
        return actions

    def see(self, action: m.Action, *, is_last: bool) -> None:
        complete = self.ran in (m.REPLACE, m.ROLL_BACK) and not self.undone
        assert is_last == (not isinstance(action, m.Fence | m.RaiseEpoch)), "work comes last"
        match action:
            case m.Fence(ranks):
                assert ranks
                assert ranks == self.machine.lost
            case m.RaiseEpoch(epoch):
                assert epoch == self.epoch + 1
                self.epoch, self.ran, self.undone = epoch, (), set()
            case m.Run(phases, epoch):
                plan = m.REPLACE if self.machine.lost else m.ROLL_BACK
                assert epoch == self.epoch
                assert not self.undone, "the run before is not done"
                self.ran = (*self.ran, phases)
                self.undone = set(phases)
                assert self.ran == plan[: len(self.ran)], "out of order"
            case m.RetryStep(epoch):
                assert epoch == self.epoch
                assert complete
            case m.FailStep() | m.Resume():
                assert complete
                assert self.machine.state is m.State.HEALTHY
            case m.GiveUp():
                self.gave_up = True


def key(machine: m.RecoveryMachine) -> tuple[object, ...]:
    """All that decides about the future, but for the history and the epoch's own value."""
    ages = tuple(min(machine.epoch - e, 2) for e in machine._started_in)
    return (
        machine.state,
        machine.lost,
        machine.attempts,
        ages,
        tuple(machine._groups),
        tuple(machine._outstanding),
        machine._spawned,
        machine._in_flight,
        machine._retrying,
        machine._retried,
        tuple(machine._raises),
        machine._fenced_for_raising,
        machine._fail_reason is None,
    )


def some_events(machine: m.RecoveryMachine) -> list[m.Event]:
    """Every event that could make a difference, and some that are stale or illegal."""
    epoch, old = machine.epoch, max(0, machine.epoch - 1)
    someone = [
        *(frozenset({r}) for r in range(len(machine._everyone))),
        frozenset(range(len(machine._everyone))),
    ]
    phases = [*machine._outstanding, Phase.RETRY if machine._outstanding else Phase.LEAVE]
    return [
        *(m.RanksLost(ranks, "exit", epoch, flight) for ranks in someone for flight in (False, True)),
        *(m.RanksLost(ranks, "exit", old, True) for ranks in someone),
        *(m.StepRaised(ranks, "boom", epoch) for ranks in someone),
        *(m.PhaseDone(phase, epoch) for phase in phases),
        *(m.PhaseFailed(phase, "no", epoch, ranks) for phase in phases for ranks in (m.NOBODY, *someone)),
        m.StepAccepted(epoch),
        m.StepAccepted(old),
        m.PhaseDone(Phase.LEAVE, old),
    ]


def helpful_event(machine: m.RecoveryMachine) -> m.Event:
    """What a world in which nothing fails any more would report."""
    assert machine.phase is not None
    if machine.phase is Phase.RETRY:
        return m.StepAccepted(machine.epoch)
    return m.PhaseDone(machine.phase, machine.epoch)


def settle(watch: Watch, now_s: float) -> None:
    """From here on nothing fails: the recovery must end within one run of all phases."""
    for _ in range(len(Phase)):
        if watch.machine.state is not m.State.RECOVERING:
            return
        watch.handle(helpful_event(watch.machine), now_s)
    assert watch.machine.state is not m.State.RECOVERING, watch.machine.history


@pytest.mark.parametrize(
    ("ranks", "attempts", "retries"), [(1, 3, 2), (2, 1, 0), pytest.param(2, 2, 1, marks=pytest.mark.long)]
)
def test_every_reachable_state(ranks: int, attempts: int, retries: int) -> None:
    """Order, epochs and invariants hold, nothing gets stuck, and no recovery can go on for ever."""
    start = Watch(m.RecoveryMachine(ranks, 1, max_attempts=attempts, max_step_retries=retries))
    edges: dict[tuple[object, ...], set[tuple[object, ...]]] = {}
    todo = [start]
    seen = {key(start.machine)}
    while todo:
        here = todo.pop()
        settle(here.clone(), 0.0)
        here_key = key(here.machine)
        goes_to = edges.setdefault(here_key, set())
        for event in some_events(here.machine):
            there = here.clone()
            try:
                there.handle(event, 0.0)
            except m.IllegalTransition:
                continue
            there_key = key(there.machine)
            if m.State.HEALTHY not in (here.machine.state, there.machine.state) and there_key != here_key:
                goes_to.add(there_key)
            if there_key not in seen:
                seen.add(there_key)
                todo.append(there)
    assert_no_cycle(edges)


def assert_no_cycle(edges: dict[tuple[object, ...], set[tuple[object, ...]]]) -> None:
    """Within a recovery every event that changes something brings it nearer to its end."""
    entering = dict.fromkeys(edges, 0)
    for goes_to in edges.values():
        for node in goes_to:
            entering[node] += 1
    free = [node for node, count in entering.items() if not count]
    removed = 0
    while free:
        removed += 1
        for node in edges[free.pop()]:
            entering[node] -= 1
            if not entering[node]:
                free.append(node)
    assert removed == len(edges), "a recovery can go round for ever"


@pytest.mark.parametrize("seed", range(100))
def test_random_walk(seed: int) -> None:
    """Any events in any order, most of them plausible; replay a failure by its seed."""
    rng = random.Random(seed)
    ranks, attempts, retries = rng.randint(1, 5), rng.randint(1, 4), rng.randint(0, 2)
    watch = Watch(
        m.RecoveryMachine(
            ranks,
            rng.randint(0, 2),
            max_attempts=attempts,
            max_step_retries=retries,
            calm_s=rng.choice([0.0, 10.0, 1e9]),
        )
    )
    now_s = 0.0
    for _ in range(200):
        now_s += rng.expovariate(1.0)
        plausible = watch.machine.state is m.State.RECOVERING and rng.random() < 0.7
        event = helpful_event(watch.machine) if plausible else rng.choice(some_events(watch.machine))
        with suppress(m.IllegalTransition):
            watch.handle(event, now_s)
    settle(watch, now_s)


@pytest.mark.parametrize("seed", range(100))
def test_an_outage_is_bounded(seed: int) -> None:
    """However the world answers, one outage takes a bounded number of actions."""
    rng = random.Random(seed)
    ranks, attempts, retries = rng.randint(1, 5), rng.randint(1, 4), rng.randint(0, 2)
    watch = Watch(m.RecoveryMachine(ranks, 1, max_attempts=attempts, max_step_retries=retries))
    watch.handle(m.RanksLost(frozenset({rng.randrange(ranks)}), "exit", 0, True), 0.0)
    for _ in range(10_000):
        if watch.machine.state is not m.State.RECOVERING:
            break
        events = [e for e in some_events(watch.machine) if not isinstance(e, m.StepAccepted)]
        event = helpful_event(watch.machine) if rng.random() < 0.5 else rng.choice(events)
        try:
            watch.handle(event, 0.0)
        except m.IllegalTransition:
            continue
    epochs_max = attempts * ranks + attempts + retries + 2  # losses that join + attempts + raises
    assert watch.machine.state is not m.State.RECOVERING
    assert watch.epoch <= epochs_max
    assert watch.actions <= epochs_max * (2 + len(m.REPLACE) + 1) + 1


# ---- single decisions ----


def test_expected_path_says_why() -> None:
    machine = m.RecoveryMachine(4, 1, max_attempts=3)
    machine.handle(m.RanksLost(frozenset({2}), "exit", 0), 0.0)
    assert machine.expected_path().choice is RecoveryPath.REBUILD
    machine.handle(m.RanksLost(frozenset({3}), "exit", 0), 0.0)
    assert machine.expected_path().choice is RecoveryPath.RECOMPUTE
    assert machine.expected_path().reason == "2 lost, parity covers 1, mirrors any number"


def test_phases_of_one_run_may_finish_in_any_order() -> None:
    machine = m.RecoveryMachine(2, 1, max_attempts=3)
    machine.handle(m.RanksLost(frozenset({1}), "exit", 0), 0.0)
    machine.handle(m.PhaseDone(Phase.LEAVE, 1), 0.0)
    for phase in (Phase.WEIGHTS, Phase.SPAWN):
        assert machine.handle(m.PhaseDone(phase, 1), 0.0) == []
    assert machine.phase is Phase.REGROUP
    assert machine.handle(m.PhaseDone(Phase.REGROUP, 1), 0.0) == [m.Run((Phase.STATE, Phase.KV), 1)]


def test_an_illegal_event_is_told_with_the_history() -> None:
    machine = m.RecoveryMachine(2, 1, max_attempts=3)
    machine.handle(m.RanksLost(frozenset({1}), "exit", 0), 0.0)
    with pytest.raises(m.IllegalTransition, match=r"PhaseDone phase=kv epoch=1 is illegal") as caught:
        machine.handle(m.PhaseDone(Phase.KV, 1), 1.0)
    assert str(caught.value).splitlines()[1:] == list(machine.history)
    assert "RanksLost ranks=1" in machine.history[0]


def test_a_performer_in_a_few_lines() -> None:
    """How engine/ drives the machine: one queue of events; whatever is performed may add to it."""
    machine = m.RecoveryMachine(2, 1, max_attempts=3)
    newcomers_that_fail = 1
    done: list[str] = []

    def perform(action: m.Action) -> list[m.Event]:
        nonlocal newcomers_that_fail
        match action:
            case m.Run(phases, epoch):
                if Phase.SPAWN in phases and newcomers_that_fail:
                    newcomers_that_fail -= 1
                    return [
                        m.PhaseDone(Phase.SPAWN, epoch),
                        m.RanksLost(machine.lost, "exited with 1", epoch),
                    ]
                return [m.PhaseDone(phase, epoch) for phase in phases]
            case m.RetryStep(epoch):
                return [m.StepAccepted(epoch)]
            case _:  # Fence, RaiseEpoch, FailStep, Resume, GiveUp: nothing to report
                return []

    events: deque[m.Event] = deque([m.RanksLost(frozenset({1}), "killed by SIGKILL", 0, step_in_flight=True)])
    while events:
        for action in machine.handle(events.popleft(), 0.0):
            done.append(m.text(action))
            events.extend(perform(action))
    assert machine.state is m.State.HEALTHY, machine.history
    assert done == [
        *("Fence ranks=1", "RaiseEpoch epoch=1", "Run phases=leave epoch=1"),
        "Run phases=spawn,regroup,weights epoch=1",
        *("Fence ranks=1", "RaiseEpoch epoch=2", "Run phases=leave epoch=2"),
        *("Run phases=spawn,regroup,weights epoch=2", "Run phases=state,kv epoch=2", "RetryStep epoch=2"),
    ]


def test_accepted_steps_leave_no_history() -> None:
    machine = m.RecoveryMachine(2, 1, max_attempts=3)
    for _ in range(1000):
        assert machine.handle(m.StepAccepted(0), 0.0) == []
    assert machine.history == ()


def test_history_is_bounded() -> None:
    machine = m.RecoveryMachine(2, 1, max_attempts=3, calm_s=0.0)
    for _ in range(100):
        machine.handle(m.RanksLost(frozenset({1}), "exit", machine.epoch), 0.0)
        while machine.state is m.State.RECOVERING:
            machine.handle(helpful_event(machine), 0.0)
    assert len(machine.history) == m.HISTORY_MAX


def test_scenario_text_is_reproduced_from_its_inputs_alone() -> None:
    assert actual("# a comment\nnew ranks=2 parity=1 attempts=3\n----\n") == (
        "# a comment\nnew ranks=2 parity=1 attempts=3\n----\n= healthy epoch=0 attempts=0/3\n"
    )


def lose_and_replace(
    machine: m.RecoveryMachine, rank: int, now_s: float, *, evicted: bool = False
) -> list[m.Action]:
    """A loss while idle, and a recovery in which all goes well; its last actions."""
    event = m.RanksLost(ranks=frozenset({rank}), reason="gone", epoch=machine.epoch, evicted=evicted)
    actions = machine.handle(event, now_s)
    while isinstance(actions[-1], m.Run):
        run = actions[-1]
        for phase in run.phases:
            actions = machine.handle(m.PhaseDone(phase, run.epoch), now_s) or actions
    machine.handle(m.StepAccepted(machine.epoch), now_s)
    return actions


def test_a_rank_that_dies_too_often_is_not_replaced_again() -> None:
    """Each recovery ends well, so attempts never run out; the rate does. Another rank has a rate of its own."""
    machine = m.RecoveryMachine(2, 1, max_attempts=3, loss_rate=LossRate(losses_max=3, window_s=60.0))
    for now_s in (0.0, 20.0, 40.0):
        assert isinstance(lose_and_replace(machine, 0, now_s)[-1], m.Resume)
    assert isinstance(lose_and_replace(machine, 1, 41.0)[-1], m.Resume)
    assert isinstance(lose_and_replace(machine, 0, 61.0)[-1], m.Resume)  # the first one is forgotten
    (given_up,) = lose_and_replace(machine, 0, 62.0)
    assert given_up == m.GiveUp("rank 0 was lost 4 times within 60 s: gone")
    machine.check()


def test_a_rank_that_is_evicted_is_not_one_that_dies() -> None:
    """The server works, though slowly: replacing a slow rank by choice must not be what ends it."""
    machine = m.RecoveryMachine(2, 1, max_attempts=3, loss_rate=LossRate(losses_max=3, window_s=60.0))
    for now_s in range(10):
        assert isinstance(lose_and_replace(machine, 0, now_s, evicted=True)[-1], m.Resume)
    for now_s in (11.0, 12.0, 13.0):
        assert isinstance(lose_and_replace(machine, 0, now_s)[-1], m.Resume)
    assert isinstance(lose_and_replace(machine, 0, 14.0)[-1], m.GiveUp), "those that died are still counted"


if __name__ == "__main__":
    names = [Path(name) for name in sys.argv[1:] if name != "--write"] or SCENARIOS
    for name in names:
        result = actual(name.read_text(encoding="utf-8"))
        if "--write" in sys.argv:
            name.write_text(result, encoding="utf-8")
        else:
            print(f"==> {name} <==\n{result}")
