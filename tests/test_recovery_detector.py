"""The detector's verdicts, what it expects of steps, and who is slow: pure, in milliseconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ghostserve.recovery.detector import (
    ALL_STUCK_FACTOR,
    Detector,
    Health,
    Limits,
    OpenWork,
    RankSample,
    RankVerdict,
    Stage,
    dead_ranks,
    exit_reason,
    laggards,
    reasons,
    waited_for,
)
from ghostserve.recovery.slow import STEPS_MIN, WINDOW_S, SlowRanks, Work
from ghostserve.recovery.step_times import StepSize, StepTimes

EPOCH, STEP = 3, 70
LIMITS = Limits(floor_s=1.0, ceiling_s=100.0, first_step_s=30.0)
WORK = OpenWork(epoch=EPOCH, step=STEP, stage=Stage.STEP, expected_s=0.01)
BEHIND = RankSample(rank=0, epoch=EPOCH, step=STEP - 1, status="done", met=8)
BEGUN = replace(BEHIND, step=STEP, at_work=True, status="begun")
WAITS = replace(BEGUN, met=9, waiting=True)
ANSWERED = replace(BEHIND, step=STEP, status="done", met=20)
EXITED = replace(BEHIND, exited=True, exit_code=-9)
STOPPED = replace(BEGUN, stopped=True)


def judge(
    *samples: RankSample, waited_s: float, work: OpenWork | None = WORK, limits: Limits = LIMITS
) -> list[RankVerdict]:
    """Verdicts on ranks that stayed like this for so long, looked at fifty times per second."""
    detector = Detector(limits)
    numbered = [replace(sample, rank=rank) for rank, sample in enumerate(samples)]
    looks = round(waited_s / 0.02)
    for look in range(looks + 1):
        verdicts = detector.look(100.0 + 0.02 * look, numbered, work)
    return verdicts


def states(verdicts: list[RankVerdict]) -> str:
    return " ".join(v.state.value for v in verdicts)


@pytest.mark.parametrize(
    ("samples", "waited_s", "expected"),
    [
        pytest.param((BEHIND, BEHIND), 0.2, "alive alive", id="a step has just been sent"),
        pytest.param((ANSWERED, BEGUN), 0.6, "alive suspect", id="past half of the deadline"),
        pytest.param((ANSWERED, BEGUN), 1.1, "alive dead", id="hung: the other has answered"),
        pytest.param((WAITS, BEGUN), 1.1, "suspect dead", id="its peer is a round ahead and waits for it"),
        pytest.param((BEGUN, BEHIND, BEGUN), 1.1, "suspect dead suspect", id="hung before the step"),
        pytest.param((ANSWERED, BEGUN, BEHIND), 1.1, "alive suspect dead", id="only those furthest behind"),
        pytest.param(
            (BEGUN, replace(BEGUN, waiting=True)), 1.1, "dead suspect", id="the one who does not wait"
        ),
        pytest.param((BEGUN, BEGUN), 1.1, "suspect suspect", id="nobody can be told apart"),
        pytest.param((BEGUN, BEGUN), 2.1, "dead dead", id="nobody can be told apart for too long"),
        pytest.param((WAITS, WAITS), 1.1, "suspect suspect", id="all wait for each other"),
        pytest.param((WAITS, WAITS), 2.1, "dead dead", id="all wait for each other for too long"),
        pytest.param((STOPPED, BEGUN), 1.1, "dead suspect", id="stopped"),
        pytest.param((STOPPED, BEHIND), 1.1, "dead dead", id="stopped, and another one further behind"),
        pytest.param((EXITED, BEHIND), 0.1, "dead alive", id="an exit counts at once"),
        pytest.param((EXITED, BEGUN, BEHIND), 30.0, "dead suspect suspect", id="an exit explains the wait"),
        pytest.param((BEHIND,), 2.1, "dead", id="a single rank"),
        pytest.param((ANSWERED, ANSWERED), 99.0, "alive alive", id="all have answered"),
    ],
)
def test_verdict(samples: tuple[RankSample, ...], waited_s: float, expected: str) -> None:
    assert states(judge(*samples, waited_s=waited_s)) == expected


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        pytest.param((WAITS, BEGUN), {1}, id="it waits for its peer"),
        pytest.param((BEGUN, replace(BEGUN, waiting=True)), {0}, id="the one who does not wait"),
        pytest.param((WAITS, BEGUN, BEHIND), {1, 2}, id="two are behind"),
        pytest.param((BEGUN, BEGUN), {0}, id="nothing tells them apart"),
        pytest.param((WAITS, WAITS), {0}, id="all wait"),
        pytest.param((BEGUN,), {0}, id="one"),
        pytest.param((), set(), id="nobody"),
    ],
)
def test_who_is_waited_for(samples: tuple[RankSample, ...], expected: set[int]) -> None:
    """By collectives alone: outside of steps nobody stamps."""
    assert waited_for([replace(sample, rank=rank) for rank, sample in enumerate(samples)]) == expected


def test_work_that_is_tried_again_gets_more_time() -> None:
    """It may be the work that takes so long: with the same deadline it would be called hung each time."""
    again = replace(WORK, patience=2.0)
    assert states(judge(ANSWERED, BEGUN, waited_s=1.9, work=WORK)) == "alive dead"
    assert states(judge(ANSWERED, BEGUN, waited_s=1.9, work=again)) == "alive suspect"
    assert states(judge(ANSWERED, BEGUN, waited_s=2.1, work=again)) == "alive dead"


def test_one_that_finished_and_does_not_answer() -> None:
    """Its peer may have begun the next step already, and waits there."""
    ahead = replace(WAITS, step=STEP + 1)
    awaited = replace(WORK, awaits=0)
    assert states(judge(ANSWERED, ahead, waited_s=1.1, work=awaited)) == "dead alive"
    assert states(judge(ANSWERED, BEGUN, waited_s=1.1, work=awaited)) == "alive dead"


def test_progress_starts_the_clock_anew() -> None:
    """However long a step takes: a rank whose collectives go on is not late."""
    detector = Detector(LIMITS)
    for look in range(2000):
        met = look // 40  # one round in 0.8 s
        verdicts = detector.look(0.02 * look, [replace(BEGUN, met=met)], WORK)
    assert states(verdicts) in ("alive", "suspect")


def test_the_observers_own_absence_is_not_held_against_anybody() -> None:
    detector = Detector(LIMITS)
    detector.look(100.0, [BEGUN, ANSWERED], WORK)
    verdicts = detector.look(160.0, [BEGUN, replace(ANSWERED, rank=1)], WORK)
    assert states(verdicts) == "alive alive"
    assert detector.quiet_s(0) < 0.2


def test_a_rank_without_a_processor_is_not_hung() -> None:
    """Of 4 s it was ready to run for 3.5 and had no processor."""
    detector = Detector(LIMITS)
    for look in range(201):
        starved = replace(BEGUN, starved_s=0.0175 * look)
        verdicts = detector.look(100.0 + 0.02 * look, [starved, replace(ANSWERED, rank=1)], WORK)
    assert states(verdicts) == "alive alive"


def test_idle_time_does_not_count() -> None:
    detector = Detector(LIMITS)
    for look in range(500):
        assert states(detector.look(0.02 * look, [ANSWERED, replace(EXITED, rank=1)], None)) == "alive dead"
    assert states(detector.look(10.0, [replace(ANSWERED)], replace(WORK, step=STEP + 1))) == "alive"


def test_the_deadline_scales_with_what_is_expected() -> None:
    assert LIMITS.deadline_s(Stage.STEP, 0.01) == 1.0
    assert LIMITS.deadline_s(Stage.STEP, 3.0) == 15.0
    assert LIMITS.deadline_s(Stage.STEP, 50.0) == 100.0
    assert LIMITS.deadline_s(Stage.FIRST_STEP, 0.01) == 30.0
    assert LIMITS.deadline_s(Stage.REPLACED, 0.01) == 4.0
    assert LIMITS.deadline_s(Stage.UNSEEN, 0.01) == 12.0
    assert LIMITS.deadline_s(Stage.UNSEEN, 3.0) == 15.0
    long = replace(WORK, expected_s=3.0)
    assert states(judge(ANSWERED, BEGUN, waited_s=14.0, work=long)) == "alive suspect"
    assert states(judge(ANSWERED, BEGUN, waited_s=15.1, work=long)) == "alive dead"


def test_a_floor_of_zero_turns_judging_by_time_off() -> None:
    limits = replace(LIMITS, floor_s=0.0)
    assert states(judge(EXITED, BEGUN, waited_s=20.0, limits=limits)) == "dead alive"


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1])
def test_a_stamp_of_another_epoch_says_nothing(epoch: int) -> None:
    assert states(judge(ANSWERED, replace(ANSWERED, epoch=epoch), waited_s=1.1)) == "alive dead"


def test_who_is_to_blame_where_only_time_tells() -> None:
    named = [
        replace(ANSWERED, rank=0),
        replace(WAITS, rank=1),
        replace(BEGUN, rank=2),
        replace(BEGUN, rank=3),
    ]
    assert laggards(named, WORK) == {2, 3}
    assert laggards(named[:1], WORK) == frozenset()


def test_reasons_are_for_people() -> None:
    verdicts = judge(WAITS, BEGUN, waited_s=1.1)
    assert dead_ranks(verdicts) == {1}
    assert reasons(verdicts[1:]) == (
        "rank 1 dead: step 70: no progress for 1.10 s of 1.00 s; the others are further on"
    )
    assert states(judge(BEGUN, BEGUN, waited_s=1.1 * ALL_STUCK_FACTOR)) == "dead dead"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (None, "process is gone"),
        (0, "exited with 0"),
        (3, "exited with 3"),
        (-9, "killed by SIGKILL"),
        (-11, "killed by SIGSEGV"),
        (-120, "killed by signal 120"),
    ],
)
def test_exit_reason(code: int | None, expected: str) -> None:
    assert exit_reason(code) == expected


# ---- what a step should take ----


def test_expectation_is_mean_and_four_deviations() -> None:
    times = StepTimes()
    size = StepSize(8, 1000)
    assert times.expect(size) == (Stage.FIRST_STEP, 0.0)
    for _ in range(100):
        times.learn(size, 0.010)
    stage, expected_s = times.expect(StepSize(9, 700))  # of the same class
    assert stage is Stage.STEP
    assert expected_s == pytest.approx(0.010, rel=0.01)
    times.learn(size, 0.030)
    assert times.expect(size)[1] > 0.025


def test_an_unseen_size_is_scaled_up_from_what_was_seen() -> None:
    times = StepTimes()
    for _ in range(50):
        times.learn(StepSize(1, 100), 0.010)
        times.learn(StepSize(256, 0), 0.200)
    stage, expected_s = times.expect(StepSize(512, 0))
    assert stage is Stage.UNSEEN
    assert expected_s == pytest.approx(0.400, rel=0.05)
    assert times.expect(StepSize(1, 300))[1] == pytest.approx(0.030, rel=0.05)


# ---- who is slow ----


def feed(slow: SlowRanks, busy_s: list[float], *, step_s: float = 0.02, seconds: float = 5.0) -> list[int]:
    """Ranks called slow after some seconds of steps in which they were busy for so long each."""
    found: list[int] = []
    for tick in range(int(seconds / 0.25)):
        steps = int(0.25 * tick / step_s)
        works = [
            Work(in_steps_s=steps * step_s, waited_s=steps * (step_s - busy), steps=steps) for busy in busy_s
        ]
        found = [one.rank for one in slow.look(0.25 * tick, works, epoch=0)]
    return found


@pytest.mark.parametrize(
    ("busy_s", "expected"),
    [
        ([0.004, 0.005], []),
        ([0.004, 0.018], [1]),
        ([0.018, 0.004, 0.005, 0.004], [0]),
        ([0.0001, 0.0009], []),  # nine times, and still nothing
        ([0.018], []),
    ],
)
def test_who_is_slow(busy_s: list[float], expected: list[int]) -> None:
    assert feed(SlowRanks(factor=3.0), busy_s) == expected


def test_too_few_steps_say_nothing() -> None:
    step_s = WINDOW_S / (STEPS_MIN - 5)
    assert feed(SlowRanks(factor=3.0), [0.004, 0.5 * step_s], step_s=step_s, seconds=2 * WINDOW_S) == []


def test_a_replacement_starts_with_a_clean_record() -> None:
    slow = SlowRanks(factor=3.0)
    assert feed(slow, [0.004, 0.018]) == [1]
    fresh = Work(in_steps_s=0.0, waited_s=0.0, steps=0)
    assert slow.look(10.0, [fresh, fresh], epoch=1) == []


@pytest.mark.parametrize(("epoch", "expected"), [(1, []), (0, [1])])  # 0: as if there had been no recovery
def test_what_survivors_waited_in_a_step_that_broke_makes_nobody_slow(
    epoch: int, expected: list[int]
) -> None:
    """Rank 0 waits a second for rank 1, which dies and is replaced; the step counts for nobody."""
    slow = SlowRanks(factor=3.0)
    sums, found = [(0.0, 0.0), (0.0, 0.0)], []
    for number in range(40):
        steps = 10 * number
        if number == 20:
            sums[0] = (0.0, 1.0)
        works = [
            Work(in_steps_s=steps * 0.02 + more, waited_s=steps * 0.014 + waited, steps=steps)
            for more, waited in sums
        ]
        found += slow.look(0.25 * number, works, epoch=epoch if number >= 20 else 0)
    assert sorted({one.rank for one in found}) == expected


def test_health_has_a_word_for_each() -> None:
    assert [health.value for health in Health] == ["alive", "slow", "suspect", "dead"]


@pytest.mark.parametrize(("starved", "expected"), [(0.0, [1]), (0.2, [1]), (0.9, [])])
def test_who_gets_no_processor_is_not_slow(starved: float, expected: list[int]) -> None:
    """Rank 1 takes five times as long as the other; `starved` of the difference it had no processor."""
    slow, found = SlowRanks(factor=3.0), []
    for number in range(30):
        steps = 10 * number
        late = Work(in_steps_s=steps * 0.02, waited_s=0.0, steps=steps, starved_s=starved * steps * 0.016)
        found = slow.look(
            0.25 * number, [Work(in_steps_s=steps * 0.02, waited_s=steps * 0.016, steps=steps), late], epoch=0
        )
    assert [one.rank for one in found] == expected


@pytest.mark.parametrize(("starved_s", "expected"), [(0.001, [0]), (0.018, [])])
def test_on_a_machine_that_is_too_busy_nobody_is_slow(starved_s: float, expected: list[int]) -> None:
    """Rank 1 was starved in threads that no step waited for: what is left of its time says nothing."""
    slow, found = SlowRanks(factor=3.0), []
    for number in range(30):
        steps = 10 * number
        works = [
            Work(in_steps_s=steps * 0.02, waited_s=steps * 0.010, steps=steps),
            Work(in_steps_s=steps * 0.02, waited_s=steps * 0.018, steps=steps, starved_s=steps * starved_s),
        ]
        found = slow.look(0.25 * number, works, epoch=0)
    assert [one.rank for one in found] == expected


def test_a_slow_rank_is_told_from_one_that_waits_for_a_core() -> None:
    """Rank 1 is slow; rank 0, hardly ever in steps, shares its core with the client, and is starved for most of that time
    (as measured on two cores)."""
    slow, found = SlowRanks(factor=3.0), []
    for number in range(4):
        steps = 31 * number
        fast = Work(in_steps_s=0.18 * number, waited_s=0.05 * number, steps=steps, starved_s=0.11 * number)
        late = Work(in_steps_s=0.95 * number, waited_s=0.01 * number, steps=steps, starved_s=0.08 * number)
        found = slow.look(float(number), [fast, late], epoch=0)
    assert [one.rank for one in found] == [1]
