"""recovery/plan.py and costs.py: what is rebuilt, what is computed again, and why."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from ghostserve.recovery.costs import MeasuredCosts
from ghostserve.recovery.plan import Context, RecoveryPlan, plan
from ghostserve.recovery.step_times import StepSize, StepTimes

SIZE = 16


def context(name: str, blocks: list[int], *, tokens: int | None = None) -> Context:
    tokens = len(blocks) * SIZE if tokens is None else tokens
    return Context(request=name, tokens=tokens, tables=[blocks], block_sizes=(SIZE,))


@dataclass(frozen=True)
class Linear:
    """So many seconds per block and per token."""

    block_s: float
    token_s: float

    def rebuild_s(self, blocks: int) -> float:
        return blocks * self.block_s

    def compute_s(self, tokens: int, context: int) -> float:
        return tokens * self.token_s


def time_to_service(contexts: list[Context], left: set[int], costs: Linear) -> float:
    """What a plan takes that leaves these blocks: all others are rebuilt, who misses one computes from there on."""
    blocks = set().union(*(context.blocks for context in contexts))
    computed = sum(context.tokens - context.first_of(left) for context in contexts)
    return costs.rebuild_s(len(blocks - left)) + costs.compute_s(computed, 0)


# ---- exact: as much as can be, nothing that serves nobody ------------------------------------------------------------


def test_everything_is_rebuilt_that_somebody_goes_on_with() -> None:
    found = plan([context("a", [1, 2, 3]), context("b", [4, 5])], [1, 2, 3, 4, 5], lost=[])
    assert found == RecoveryPlan(rebuilt=(1, 2, 3, 4, 5), left={}, by_choice={})


def test_what_lies_behind_a_lost_block_is_left_and_what_lies_before_it_is_not() -> None:
    found = plan([context("a", [1, 2, 3, 4]), context("b", [5])], [1, 3, 4, 5], lost=[2])
    assert found.rebuilt == (1, 5)
    assert found.left.keys() == {3, 4}
    assert "request a computes it again" in found.left[3]
    assert not found.by_choice


def test_without_a_prefix_cache_nothing_of_it_is_of_use() -> None:
    found = plan([context("a", [1, 2, 3]), context("b", [5])], [1, 3, 5], lost=[2], prefix_cache=False)
    assert found.rebuilt == (5,)


def test_what_another_request_goes_on_with_is_rebuilt() -> None:
    contexts = [context("a", [1, 2, 3]), context("b", [3, 4])]
    assert plan(contexts, [1, 3, 4], lost=[2]).rebuilt == (1, 3, 4)
    assert plan([contexts[0]], [1, 3], lost=[2]).rebuilt == (1,)  # negative control
    assert plan([contexts[0]], [1, 3], lost=[2], others=[3]).rebuilt == (1, 3)


def test_what_only_requests_share_that_compute_again_is_left() -> None:
    found = plan([context("a", [1, 2, 3]), context("b", [1, 2, 3, 4])], [2, 3, 4], lost=[1])
    assert found.rebuilt == ()
    assert found.left.keys() == {2, 3, 4}


def test_blocks_of_the_prefix_cache_alone_are_not_its_business() -> None:
    assert plan([context("a", [1])], [1, 9], lost=[]).rebuilt == (1, 9)


def test_groups_of_layers_and_sliding_windows() -> None:
    """Two groups with blocks of 16 and 32 tokens; of the second the window has left the first block behind."""
    mixed = Context(request="a", tokens=80, tables=[[1, 2, 3, 4, 5], [0, 6, 7]], block_sizes=(16, 32))
    assert mixed.blocks == {1, 2, 3, 4, 5, 6, 7}
    assert plan([mixed], [1, 2, 3, 4, 5, 7], lost=[6]).rebuilt == (1, 2)  # 6 begins at token 32


# ---- fastest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_s", "chosen"), [(0.001, set()), (0.1, {"a", "b"})])
def test_the_shorter_way_is_chosen(block_s: float, chosen: set[str]) -> None:
    contexts = [context("a", [1, 2, 3]), context("b", [4])]
    found = plan(contexts, [1, 2, 3, 4], lost=[], costs=Linear(block_s, 0.001))
    assert found.by_choice.keys() == chosen
    assert found.rebuilt == (() if chosen else (1, 2, 3, 4))
    if chosen:
        assert found.by_choice["a"] == "48.0 ms for 48 tokens, 300.0 ms for 3 blocks"


def test_both_ways_side_by_side() -> None:
    """A block with one token costs as much to rebuild as a full one: the short request computes, the long does not."""
    found = plan(
        [context("long", [1, 2, 3]), context("short", [4], tokens=2)],
        [1, 2, 3, 4],
        [],
        costs=Linear(0.01, 0.001),
    )
    assert found.by_choice.keys() == {"short"}
    assert found.rebuilt == (1, 2, 3)


def test_a_shared_beginning_stays_and_only_the_rest_is_computed() -> None:
    shared = [context("a", [1, 2, 3], tokens=34), context("b", [1, 2, 4, 5])]
    found = plan(shared, [1, 2, 3, 4, 5], [], costs=Linear(0.01, 0.001))
    assert found.by_choice == {"a": "2.0 ms for 2 tokens, 10.0 ms for 1 blocks"}
    assert found.rebuilt == (1, 2, 4, 5)


def test_the_plan_is_never_slower_than_either_way_alone() -> None:
    """And, where nothing is shared, as fast as the best of all choices."""
    rng = random.Random(1)
    better_than_both = 0
    for _ in range(300):
        numbers = itertools.count(1)
        contexts = []
        for name in "abcde"[: rng.randint(1, 5)]:
            blocks = [next(numbers) for _ in range(rng.randint(1, 6))]
            contexts.append(context(name, blocks, tokens=(len(blocks) - 1) * SIZE + rng.randint(1, SIZE)))
        every = sorted(set().union(*(one.blocks for one in contexts)))
        costs = Linear(rng.choice([0.004, 0.012, 0.016, 0.03]), 0.001)
        mine = time_to_service(contexts, set(plan(contexts, every, [], costs=costs).left), costs)
        ways = [
            time_to_service(contexts, set().union(*(one.blocks for one in some)), costs)
            for count in range(len(contexts) + 1)
            for some in itertools.combinations(contexts, count)
        ]
        assert mine == pytest.approx(min(ways))
        better_than_both += mine < min(ways[0], ways[-1]) - 1e-9
    assert better_than_both > 15


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_costs_are_those_measured_on_the_way() -> None:
    times = StepTimes()
    costs = MeasuredCosts(times=times, chunk=256)
    assert not costs.known
    assert costs.compute_s(1, 0) == float("inf")
    costs.learn_restore(0, 1.0)
    assert not costs.known  # nothing was restored
    costs.learn_restore(10, 0.05)
    assert costs.known
    assert costs.rebuild_s(4) == pytest.approx(0.02)
    costs.learn_restore(10, 0.09)
    assert costs.rebuild_s(1) == pytest.approx(0.006)
    times.learn(StepSize(256, 0), 0.1)
    assert costs.compute_s(256, 0) == pytest.approx(0.1)
    assert costs.compute_s(300, 0) == pytest.approx(0.1 + 0.1 * 256)  # a class not seen is guessed high
