"""Every fault by name: it strikes the real thing, and the tokens stay what they were. TP=2, float32, eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ghostserve.arena.fault_kinds import KINDS, FaultKind
from ghostserve.cli import main as cli
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import GhostserveError
from ghostserve.testing.client import StreamResult
from ghostserve.testing.fault_plan import FaultPlan
from ghostserve.testing.fault_runner import FaultRunner
from ghostserve.testing.oracle import compare_choices
from real.kit import LONG_PROMPT, SEEDED, Ask, Served, Stops, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]
LONG = Ask(max_tokens=150)


@pytest.fixture(autouse=True)
def _healthy(float32: Served):
    float32.settle()
    yield
    float32.server.admin.disarm_faults()
    float32.settle()


@pytest.fixture
def poisoned(float32: Served):
    """For a test that leaves wrong KV behind on purpose: nothing of it stays in the prefix cache."""
    yield
    float32.settle()
    float32.post("/reset_prefix_cache")


def counter(served: Served, name: str = "faults_struck_total") -> int:
    return int(served.server.status()["counters"][name])


def run(served: Served, plan: FaultPlan, ask: Ask = SEEDED) -> StreamResult:
    """One request while the plan is performed; all of the plan is. What is timed by a token finds it standing still there."""
    runner = FaultRunner(served.server.admin, plan)
    runner.start()
    runner.sending()
    tokens = [f.when.token for f in plan.faults if f.when.token and f.kind is not FaultKind.CLIENT_GONE]
    go_on = Stops(served, *((token, lambda: None) for token in tokens))
    result = served.run(ask, on_token=both(runner.watch(), go_on))
    assert runner.is_done
    assert go_on.done
    return result


def soon(plan: FaultPlan) -> FaultPlan:
    """In mid-answer: a signal when 40 tokens were shown; what is armed, in a step."""
    return plan.at_step(50) if KINDS[plan.faults[0].kind].by_signal is None else plan.at_token(40)


def test_an_armed_pause(float32: Served) -> None:
    """No fault, but what the others here rest on: the stream stands still at its token until it is resumed."""
    reference, before = float32.reference(SEEDED), float32.recoveries()
    steps: list[int] = []

    def look() -> None:
        for act in (float32.settle, float32.settle, float32.one_step, float32.settle):
            act()
            steps.append(counter(float32, "steps_total"))

    assert_same(reference, float32.run_with_stops(SEEDED, (40, look)))
    assert [step - steps[0] for step in steps] == [0, 0, 1, 1]
    assert counter(float32, "steps_total") > steps[0] + 50, "it went on"
    assert float32.recoveries() == before


# -- a worker ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crash", "segfault", "oom"])
def test_a_worker_that_ends(float32: Served, kind: str) -> None:
    before, reference, struck = float32.recoveries(), float32.reference(SEEDED), counter(float32)
    pid = float32.server.status()["ranks"][1]["pid"]
    assert_same(reference, run(float32, soon(getattr(FaultPlan(), kind)(rank=1))))
    report = float32.recovery(after=before)
    assert (report["lost_ranks"], report["lost_pids"]) == ([1], [pid])
    assert_rebuilt(report, sealed=True)
    assert counter(float32) == struck + 1  # itself, or the pause in which the signal came from outside
    assert not list(Path("/sys/fs/cgroup").glob("**/ghostserve-fault-*")), "the cgroup was left behind"


def test_an_exception_in_a_step(float32: Served) -> None:
    before, reference = float32.recoveries(), float32.reference(SEEDED)
    pids = [rank["pid"] for rank in float32.server.status()["ranks"]]
    assert_same(reference, run(float32, FaultPlan().exception(rank=0).at_step(50)))
    assert (
        "InjectedFault" in (report := float32.recovery(after=before))["reason"]
        or "injected" in report["reason"]
    )
    assert [rank["pid"] for rank in float32.server.status()["ranks"]] == pids


def test_a_crash_in_prefill(float32: Served) -> None:
    before, reference = float32.recoveries(), float32.reference(LONG_PROMPT)
    assert_same(reference, run(float32, FaultPlan().crash(rank=1).in_request("prefill"), LONG_PROMPT))
    assert float32.recovery(after=before)["lost_ranks"] == [1]


def test_a_crash_and_then_another_in_its_recovery(float32: Served) -> None:
    """A survivor that dies while it shares its KV: two losses, one parity, so that the request is recomputed."""
    before, reference = float32.recoveries(), float32.reference(LONG)
    plan = FaultPlan().crash(rank=1).at_token(70).then.crash(rank=0).in_recovery("kv")
    assert_same(reference, run(float32, plan, LONG))
    report = float32.recovery(after=before)
    assert set(report["lost_ranks"]) == {0, 1}
    assert report["path"] == "recompute"


@pytest.mark.parametrize("kind", ["hang", "spin", "blocked"])
def test_a_worker_that_makes_no_progress(float32: Served, kind: str) -> None:
    """Nothing has ended, so nothing says which rank it is but its own lack of progress."""
    before, reference, struck = float32.recoveries(), float32.reference(SEEDED), counter(float32)
    pid = float32.server.status()["ranks"][0]["pid"]
    assert_same(reference, run(float32, soon(getattr(FaultPlan(), kind)(rank=0))))
    report = float32.recovery(after=before)
    assert (report["lost_ranks"], report["lost_pids"]) == ([0], [pid])
    assert "no progress" in report["reason"] or "stopped" in report["reason"], report["reason"]
    assert_rebuilt(report, sealed=True)
    assert counter(float32) == struck + 1  # itself, or the pause in which the signal came from outside
    assert not psutil.pid_exists(pid)


def test_a_hang_at_a_point_of_a_step(float32: Served) -> None:
    before, reference, struck = float32.recoveries(), float32.reference(SEEDED), counter(float32)
    assert_same(reference, run(float32, FaultPlan().hang(rank=1).at_step(30)))
    assert float32.recovery(after=before)["lost_ranks"] == [1]
    assert counter(float32) == struck + 1


def test_a_slow_rank_is_slow_for_so_long(float32: Served) -> None:
    """Nobody is given up, and the gaps between tokens tell that it struck, and that it ended."""
    before, reference, struck = float32.recoveries(), float32.reference(LONG), counter(float32)
    result = run(float32, FaultPlan().slow(rank=1, factor=4, steps=12).at_token(50), LONG)
    assert_same(reference, result)
    assert float32.recoveries() == before
    assert counter(float32) == struck + 12 + 1  # and the pause before, in which the client catches up
    at_s = result.arrivals_s[0]
    slow = at_s[61] - at_s[51]
    quick, after = (min(at_s[n + 10] - at_s[n] for n in where) for where in (range(2, 39), range(64, 138)))
    assert slow > 1.8 * quick, (slow, quick)
    assert after < 0.7 * slow


# -- silent corruption ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned", "unscrubbed")
def test_corrupt_kv_changes_what_follows(float32: Served) -> None:
    """The negative control of every test that corrupts KV: nobody looks, and the answer is another."""
    struck, reference = counter(float32), float32.reference(SEEDED)
    faulted = run(float32, FaultPlan().corrupt_kv(rank=1).at_step(31))
    assert counter(float32) == struck + 1
    verdict = compare_choices(reference.token_ids, faulted.token_ids)
    assert verdict.first_difference is not None
    assert verdict.first_difference > 30


def test_corrupt_kv_of_a_rank_that_dies_in_the_same_step(float32: Served) -> None:
    """The mirror was taken before: what is restored is what the rank should have held."""
    before, reference = float32.recoveries(), float32.reference(SEEDED)
    assert_same(reference, run(float32, FaultPlan().corrupt_kv(rank=1, dies=True).at_step(31)))
    assert_rebuilt(float32.recovery(after=before), sealed=False)


@pytest.mark.parametrize(
    ("plan", "counted"),
    [
        (FaultPlan().corrupt_parity(), "checksum_refusals_total"),
        (FaultPlan().corrupt_mirror(rank=0).at_step(30), "checksum_refusals_total"),
    ],
    ids=["parity", "mirror"],
)
@pytest.mark.usefixtures("unscrubbed")
def test_a_corrupt_shadow_is_refused(float32: Served, plan: FaultPlan, counted: str) -> None:
    before, reference, refused = float32.recoveries(), float32.reference(LONG), counter(float32, counted)
    FaultRunner(float32.server.admin, plan).start()

    def once_coded() -> None:
        float32.settle()
        float32.kill_after(2, 1)

    assert_same(reference, float32.run_with_stops(LONG, (90, once_coded)))
    assert float32.recovery(after=before)["ok"]
    assert counter(float32, counted) > refused


# -- around the workers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["keeper_crash", "keeper_hang"])
def test_a_keeper_that_ends_or_hangs(float32: Served, kind: str) -> None:
    """Serving does not wait for it; another takes its place, and a loss after that is rebuilt."""
    before, reference, keeper = (
        float32.recoveries(),
        float32.reference(LONG),
        float32.settle()["keeper"],
    )
    plan: FaultPlan = getattr(FaultPlan(), kind)()

    def strike() -> None:
        FaultRunner(float32.server.admin, plan).start()
        if kind == "keeper_hang":  # a signal is sent before it has come
            wait(lambda: psutil.Process(keeper["pid"]).status() == psutil.STATUS_STOPPED, "it is stopped", 5)

    assert_same(reference, float32.run_with_stops(LONG, (20, strike)))
    wait(lambda: float32.server.status()["keeper"]["restarts"] > keeper["restarts"], "a keeper's restart", 20)
    float32.settle()
    assert float32.recoveries() == before, "a rank was replaced for it"
    assert float32.server.status()["keeper"]["pid"] != keeper["pid"]
    assert_same(reference, run(float32, FaultPlan().crash(rank=0).at_token(80), LONG))
    assert_rebuilt(float32.recovery(after=before), sealed=True)


def test_an_arena_that_takes_no_writes(float32: Served) -> None:
    """The step goes on; what it wrote is unprotected until a later one catches up, then all of it comes back."""
    before, reference = float32.recoveries(), float32.reference(LONG)
    errors = counter(float32, "shadow_errors_total")
    assert_same(reference, run(float32, FaultPlan().arena_write_failure(rank=1).at_step(20), LONG))
    assert counter(float32, "shadow_errors_total") > errors
    assert float32.recoveries() == before
    plan = FaultPlan().arena_write_failure(rank=1).at_step(60).then.crash(rank=1).at_step(1)
    assert_same(reference, run(float32, plan, LONG))
    report = float32.recovery(after=before)
    assert report["path"] == "recompute", "a block without its mirror was restored"
    assert report["tokens_recomputed"] > 0


def test_an_arena_without_frames(float32: Served) -> None:
    """New blocks are unprotected meanwhile: counted, recomputed after a loss, and protected again later."""
    before, reference = float32.recoveries(), float32.reference(LONG)
    plan = FaultPlan().memory_exhausted(steps=60).at_step(40).then.crash(rank=1).at_step(50)
    assert_same(reference, run(float32, plan, LONG))
    report = float32.recovery(after=before)
    assert report["path"] == "recompute"
    assert_same(reference, run(float32, FaultPlan().memory_exhausted(steps=20).at_step(30), LONG))
    assert float32.recoveries() == before + 1
    assert_same(reference, run(float32, FaultPlan().crash(rank=0).at_token(90), LONG))
    assert_rebuilt(float32.recovery(after=before + 1), sealed=True)


def test_a_client_that_is_gone(float32: Served) -> None:
    gone = run(float32, FaultPlan().client_gone(at_token=12))
    assert gone.aborted
    wait(lambda: float32.server.status()["counters"]["requests_open"] == 0, "the request to be forgotten", 10)


def test_a_standby_that_dies(float32: Served) -> None:
    """Another is started; nobody else notices. Where there is none, the error says how to have one."""
    admin, before = float32.server.admin, float32.recoveries()
    if not float32.server.status().get("standbys"):
        with pytest.raises(GhostserveError, match="--standbys 1"):
            admin.inflict("standby_dead")
        return
    pid = admin.inflict("standby_dead")["pid"]
    assert_same(float32.reference(SEEDED), float32.run(SEEDED))
    wait(
        lambda: [item["pid"] for item in float32.server.status()["standbys"]] not in ([], [pid]),
        "another standby",
        30,
    )
    assert float32.recoveries() == before


def test_from_the_command_line(float32: Served, capsys: pytest.CaptureFixture[str]) -> None:
    before, reference = float32.recoveries(), float32.reference(SEEDED)

    assert cli.main(["kill", "--rank", "0", "--how", "segfault", "--url", float32.server.base_url]) == 0
    assert "reads address 0" in capsys.readouterr().out
    assert_same(reference, float32.run(SEEDED))
    assert float32.recovery(after=before)["lost_ranks"] == [0]


def both(*callbacks: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        for callback in callbacks:
            callback(*arguments)

    return call


def wait(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline_s = monotonic_s() + timeout_s
    while not condition():
        assert monotonic_s() < deadline_s, what
        sleep_s(0.05)
